"""Groups of experts that are kept on nodes: where each is, and starts from which whole groups have changed node.

A search within nodes cannot level what the nodes themselves bear. So where a node bears more than its ranks may bear
together, two groups of different nodes are exchanged first, all their slots at once.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from eplb_core.arrays import FloatArray, IntArray

if TYPE_CHECKING:
    from eplb_core.policies.incremental_layer import LayerTask

_MOST_STARTS = 3


def homes(place: IntArray, task: LayerTask) -> IntArray | None:
    """Return the node of each expert, int64 `[experts]`, or None if groups are split or nodes have not as many."""
    group = place // (len(task.load) // task.num_groups)
    node = np.arange(len(place)) // (len(place) // task.num_nodes)
    node_of_group = np.full(task.num_groups, -1)
    node_of_group[group] = node
    if (node_of_group[group] != node).any():
        return None
    if (np.bincount(node_of_group, minlength=task.num_nodes) != task.num_groups // task.num_nodes).any():
        return None
    return np.repeat(node_of_group, len(task.load) // task.num_groups)


def group_starts(task: LayerTask, start: IntArray, target: float) -> list[IntArray]:
    """Return placements to start from, in which groups have changed node; none if the nodes can bear what they have.

    Exchanges of two groups are tried, then two exchanges one after the other: the fewest that bring every node to
    what its ranks may bear, and of those the ones that leave the most loaded node with the least.
    """
    if task.num_nodes == 1:
        return []
    home = homes(start, task)
    if home is None:
        return []
    size = len(task.load) // task.num_groups
    load = task.load.reshape(task.num_groups, size).sum(axis=1)
    node_of_group = home[::size]
    most = target * task.node_ranks
    if np.bincount(node_of_group, load, task.num_nodes).max() <= most:
        return []
    pairs = [
        (one, other)
        for one, other in itertools.combinations(range(task.num_groups), 2)
        if node_of_group[one] != node_of_group[other]
    ]
    for exchanges in ([(pair,) for pair in pairs], list(itertools.combinations(pairs, 2))):
        found = []
        for chosen in exchanges:
            if len({group for pair in chosen for group in pair}) < 2 * len(chosen):
                continue
            after = node_of_group.copy()
            for one, other in chosen:
                after[one], after[other] = after[other], after[one]
            highest = float(np.bincount(after, load, task.num_nodes).max())
            if highest <= most:
                found.append((highest, chosen))
        if found:
            return [_exchanged(task, start, chosen) for _, chosen in sorted(found)[:_MOST_STARTS]]
    return []


def _exchanged(task: LayerTask, start: IntArray, pairs: tuple[tuple[int, int], ...]) -> IntArray:
    place = start.copy()
    for one, other in pairs:
        size = len(task.load) // task.num_groups
        slots = [np.flatnonzero(place // size == group) for group in (one, other)]
        for group, taken in ((one, slots[1]), (other, slots[0])):
            place[taken] = _spread(place, taken, group, task)
    return place


def _spread(place: IntArray, slots: IntArray, group: int, task: LayerTask) -> IntArray:
    """Return the experts of a group for these slots: more copies of the busiest, heavy ones where heavy ones were."""
    size = len(task.load) // task.num_groups
    own = task.load[group * size : (group + 1) * size]
    copies = np.ones(size, dtype=np.int64)
    for _ in range(len(slots) - size):
        copies[(own / copies).argmax()] += 1
    share = own / copies
    experts = np.repeat(np.arange(size), copies)
    experts = experts[np.argsort(-share[experts], kind="stable")]
    before: FloatArray = task.load / np.maximum(np.bincount(place, minlength=len(task.load)), 1)
    taken = np.empty_like(slots)
    taken[np.argsort(-before[place[slots]], kind="stable")] = group * size + experts
    return taken
