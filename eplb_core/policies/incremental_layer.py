"""One layer of the `incremental` policy: what is tried, in which order, and which outcome is taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from eplb_core.arrays import FloatArray, IntArray
from eplb_core.planning.placement import EMPTY
from eplb_core.policies.incremental_candidates import Aim
from eplb_core.policies.incremental_groups import group_starts, homes
from eplb_core.policies.incremental_search import EXACT, LEAST_DROP, make_layer, rank_loads, return_slots, search_layer
from eplb_core.policies.movement import CountArray, copies_on_ranks, relabelled

UNLIMITED = 2**40

WAYS = (
    (np.array([4.0, 4.0, 4.0, 1.0, 0.4]), False),
    (np.array([4.0, 4.0, 2.0, 1.0, 0.7]), True),
    (np.array([20.0, 20.0, 20.0, 1.0, 0.5]), True),
    (np.array([20.0, 20.0, 20.0, 1.0, 0.5]), False),
)
"""Ways of searching: what a drop is worth by the slots that it costs, -2 to 2, and whether a drop below the target
is worth no more than one to the target. Which of them is cheapest differs from layer to layer; together they save a
tenth over the best single one (`benchmarks/policies.py`)."""

FREELY = np.ones(5)
"""Moves are not counted: it gets out of where the others are stuck."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerTask:
    """What is asked in one layer.

    Attributes:
        old: int64 `[slots]`, where the experts are.
        load: float64 `[experts]`.
        fresh: int64 `[slots]`, what the fresh plan says.
        num_ranks: ranks that share the slots evenly.
        num_nodes: nodes that groups are kept on, 1 if they are not.
        num_groups: groups that are kept on nodes.
        within: how far above the fresh plan is good enough, 0.01 for 1 %.
        imbalance: the highest load over the mean that is good enough instead, or None.
        margin: what the highest load may be above all that by noise.
    """

    old: IntArray
    load: FloatArray
    fresh: IntArray
    num_ranks: int
    num_nodes: int
    num_groups: int
    within: float
    imbalance: float | None
    margin: float

    @property
    def node_ranks(self) -> int:
        """Ranks that may change experts with one another."""
        return self.num_ranks // self.num_nodes

    def target(self) -> float:
        """Return the highest load of a rank that is good enough."""
        if self.imbalance is None:
            good = self.highest(self.fresh) * (1 + self.within)
        else:
            good = self.imbalance * float(self.load.sum()) / self.num_ranks
        return (good + self.margin) * (1 + EXACT)

    def highest(self, place: IntArray) -> float:
        """Return the highest load of a rank in a placement without empty slots."""
        return float(rank_loads(place, self.load, self.num_ranks).max())

    def count(self, place: IntArray) -> CountArray:
        """Return the copies on each rank, `[ranks, experts]`."""
        return copies_on_ranks(place, self.num_ranks, len(self.load))

    def start(self) -> IntArray | None:
        """Return the old placement with its empty slots filled, or None if it lacks experts or splits groups."""
        place = fill_slots(self.old, self.load)
        if place is None or (self.num_nodes > 1 and homes(place, self) is None):
            return None
        return place


def plan_layer(task: LayerTask, effort: int) -> tuple[IntArray, str]:
    """Return the placement of a layer, int64 `[slots]`, and which plan it is."""
    target = task.target()
    start = task.start()
    if start is not None and task.highest(start) <= target:
        return start, "kept"
    old = task.count(task.old)
    best: tuple[bool, float, int] | None = None
    found, plan = task.fresh, "fresh relabelled"
    for place, reached, name in _outcomes(task, start, old, target, effort):
        anew = int(np.maximum(task.count(place) - old, 0).sum())
        # Of those that reach the target the cheapest, else the one with the best balance.
        rank = (not reached, 0.0 if reached else task.highest(place), anew)
        if best is None or rank < best:
            best, found, plan = rank, place, name
    return found, plan


def _outcomes(
    task: LayerTask, start: IntArray | None, old: CountArray, target: float, effort: int
) -> Iterator[tuple[IntArray, bool, str]]:
    """Yield placements, whether they reach the target, and what they are; costly ones only if none has reached it."""
    done = False
    starts = [] if start is None else [start, *group_starts(task, start, target)]
    for begin in starts:
        for value, capped in WAYS[:effort]:
            place, reached = search(task, begin, old, target, value, capped=capped)
            done = done or reached
            yield place, reached, "incremental"
    if done:
        return
    for begin in starts:
        yield *search(task, begin, old, target, FREELY, capped=False), "incremental"
    fresh = relabelled(task.old, task.fresh, task.num_ranks, task.num_nodes)
    yield *search(task, fresh, old, target, WAYS[0][0], capped=False), "fresh relabelled"


def search(
    task: LayerTask,
    start: IntArray,
    old: CountArray,
    target: float,
    value: FloatArray,
    *,
    capped: bool,
    room: IntArray | None = None,
    most_changes: int = UNLIMITED,
) -> tuple[IntArray, bool]:
    """Search from a start, and bring back what need not have moved if the target is reached.

    Args:
        task: the layer.
        start: int64 `[slots]`, where to start.
        old: the copies that each rank has, `[ranks, experts]`.
        target: the highest load of a rank that is good enough.
        value: what a drop is worth by the slots that it costs, -2 to 2.
        capped: whether a drop below the target is worth no more than one to the target.
        room: `[ranks]`, how many slots each rank may receive anew, and it is changed; None for no limit.
        most_changes: the search ends after so many, and nothing is brought back.

    Returns:
        The placement, int64 `[slots]`, and whether it reaches the target.
    """
    home = np.zeros(len(task.load), dtype=np.int64)
    if task.num_nodes > 1:
        found = homes(start, task)
        if found is None:
            return start, False
        home = found
    if room is None:
        room = np.full(task.num_ranks, UNLIMITED, dtype=np.int64)
    layer = make_layer(start.copy(), old, task.load, room, home, task.node_ranks)
    least = LEAST_DROP * float(task.load.sum()) / task.num_ranks
    whole = most_changes == UNLIMITED
    reached = bool(search_layer(layer, Aim(target, value, capped, whole, most_changes, least)))
    if reached and whole:
        return_slots(layer, target)
    return layer.place, reached


def fill_slots(place: IntArray, load: FloatArray) -> IntArray | None:
    """Return the placement with copies in its empty slots, those of the most loaded experts first.

    Returns:
        int64 `[slots]`, or None if an expert has no copy and finds no empty slot.
    """
    empty = np.flatnonzero(place == EMPTY)
    copies = np.bincount(place[place != EMPTY], minlength=len(load))
    missing = np.flatnonzero(copies == 0)
    if len(missing) > len(empty):
        return None
    filled = place.copy()
    for index, slot in enumerate(empty.tolist()):
        expert = int(missing[index]) if index < len(missing) else int((load / np.maximum(copies, 1)).argmax())
        filled[slot] = expert
        copies[expert] += 1
    return filled
