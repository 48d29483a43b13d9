"""Search with a budget: of all layers together, the change that unloads most for each byte comes first."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from eplb_core.arrays import IntArray
from eplb_core.policies.incremental_layer import UNLIMITED, WAYS, LayerTask, search


def search_within_budget(
    tasks: Sequence[LayerTask], max_moves: int | None, max_bytes: int | None, expert_bytes: IntArray
) -> tuple[list[IntArray], list[str]]:
    """Return the placement of each layer, and which plan it is: kept or incremental.

    The time of a step of the model is the sum of its layers' highest loads, so drops of all layers weigh alike, by what
    they cost in bytes. No layer gets worse than it was.

    Args:
        tasks: one for each layer; an old placement that cannot be searched from is kept.
        max_moves: the most slots that a rank may receive anew, over all layers, or None.
        max_bytes: the most bytes that a rank may receive, or None.
        expert_bytes: int64 `[layers]`.
    """
    starts = [task.start() for task in tasks]
    places = [task.old.copy() if start is None else start for task, start in zip(tasks, starts, strict=True)]
    num_ranks = tasks[0].num_ranks if tasks else 0
    moves = np.full(num_ranks, UNLIMITED if max_moves is None else max_moves, dtype=np.int64)
    room_bytes = np.full(num_ranks, 2**62 if max_bytes is None else max_bytes, dtype=np.int64)
    for layer, task in enumerate(tasks):
        _charge(moves, room_bytes, _anew(task, task.old, places[layer]), int(expert_bytes[layer]))
    targets = [task.target() for task in tasks]
    changed = [False] * len(tasks)

    def room(layer: int) -> IntArray:
        size = int(expert_bytes[layer])
        return np.minimum(moves, room_bytes // size) if size else moves.copy()

    def next_change(layer: int) -> tuple[float, IntArray, IntArray] | None:
        """Return the drop for each byte, the placement, and what each rank receives more of the layer's experts."""
        task, allowed = tasks[layer], room(layer)
        before, after, place, left = task.highest(places[layer]), 0.0, places[layer], allowed.copy()
        old = task.count(task.old)
        # A change may leave another rank that bears as much: it is followed by more until the highest load has fallen.
        for _ in range(num_ranks):
            value, capped = WAYS[0]
            changed_place, _ = search(task, place, old, targets[layer], value, capped=capped, room=left, most_changes=1)
            after = task.highest(changed_place)
            if after < before or np.array_equal(place, changed_place):
                place = changed_place
                break
            place = changed_place
        if after >= before:
            return None
        received = allowed - left
        cost = max(int(received.sum()), 0) * max(int(expert_bytes[layer]), 1)
        return (before - after) / max(cost, 0.25), place, received

    waiting: list[tuple[float, int, IntArray, IntArray]] = []

    def look(layer: int) -> None:
        found = (
            None
            if starts[layer] is None or tasks[layer].highest(places[layer]) <= targets[layer]
            else next_change(layer)
        )
        if found is not None:
            heapq.heappush(waiting, (-found[0], layer, found[1], found[2]))

    for layer in range(len(tasks)):
        look(layer)
    while waiting:
        _, layer, place, received = heapq.heappop(waiting)
        if (received <= room(layer)).all():
            places[layer], changed[layer] = place, True
            _charge(moves, room_bytes, received, int(expert_bytes[layer]))
        look(layer)
    return places, ["incremental" if each else "kept" for each in changed]


def _anew(task: LayerTask, old: IntArray, new: IntArray) -> IntArray:
    anew: IntArray = np.maximum(task.count(new) - task.count(old), 0).sum(axis=1, dtype=np.int64)
    return anew


def _charge(moves: IntArray, room_bytes: IntArray, received: IntArray, size: int) -> None:
    moves -= received
    room_bytes -= received * size
