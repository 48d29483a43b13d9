"""Local search in one layer: change the fewest slots until no rank is loaded above a target.

While the most loaded rank is above the target, the change with the largest drop of its load per slot received anew is
made. No rank that a change touches ends above that load, so the sorted loads of the ranks fall and the search ends.

- *swap* two experts (two slots received);
- *relieve*: a further copy of an expert takes the place of a redundant copy on another rank (one slot);
- *drop*: a redundant copy gives way to a further copy of another expert (one slot);
- *via*: relieve over a third rank (two slots), where nothing else helps.

What returns to a rank that it was on costs nothing. A rank never gets a second copy of an expert. Where groups are kept
on nodes, only ranks of one node change with one another.

The functions are plain loops over arrays, so that numba can compile them; without it they run as they are.
"""

from __future__ import annotations

import numpy as np

from eplb_core.arrays import FloatArray, IntArray
from eplb_core.policies.compiled import compiled
from eplb_core.policies.incremental_candidates import Aim, Layer, best_put, best_swap, best_via, spare_copies
from eplb_core.policies.movement import CountArray

EXACT = 1e-12
"""Loads that differ by less, relative to one another, are the same: sums in another order differ by as much."""

LEAST_DROP = 1e-9
"""The least drop that a search goes on for, as a share of the mean load."""

_CHANGES_PER_SLOT = 8  # a layer is given up after so many; searches that succeed need less than one


def make_layer(
    place: IntArray, old: CountArray, load: FloatArray, room: IntArray, home: IntArray, node_ranks: int
) -> Layer:
    """Return the state of a layer to search from; see `Layer`."""
    layer = Layer(
        place=place,
        old=old,
        now=np.zeros_like(old),
        copies=np.zeros(len(load), dtype=np.int64),
        load=load,
        share=np.zeros(len(load)),
        rank_load=np.zeros(len(old)),
        room=room,
        home=home,
        node_ranks=node_ranks,
    )
    count(layer)
    return layer


@compiled
def count(layer: Layer) -> None:
    """Set all that follows from where the experts are."""
    place, now, copies, share, rank_load = layer.place, layer.now, layer.copies, layer.share, layer.rank_load
    per_rank = len(place) // len(rank_load)
    now[:] = 0
    copies[:] = 0
    rank_load[:] = 0.0
    for slot in range(len(place)):
        now[slot // per_rank, place[slot]] += 1
        copies[place[slot]] += 1
    share[:] = layer.load / np.maximum(copies, 1)
    for slot in range(len(place)):
        rank_load[slot // per_rank] += share[place[slot]]


@compiled
def rank_loads(place: IntArray, load: FloatArray, num_ranks: int) -> FloatArray:
    """Return the loads of the ranks, float64 `[ranks]`, added up as a search does."""
    per_rank = len(place) // num_ranks
    copies = np.zeros(len(load), dtype=np.int64)
    for slot in range(len(place)):
        copies[place[slot]] += 1
    share = load / np.maximum(copies, 1)
    rank_load = np.zeros(num_ranks)
    for slot in range(len(place)):
        rank_load[slot // per_rank] += share[place[slot]]
    return rank_load


@compiled
def put(layer: Layer, slot: int, expert: int) -> None:
    """Let a copy of `expert` take the place of what the slot holds, of which there are other copies."""
    place, now, copies, load, share = layer.place, layer.now, layer.copies, layer.load, layer.share
    rank_load = layer.rank_load
    rank, gone = slot // (len(place) // len(rank_load)), place[slot]
    rank_load[rank] -= share[gone]
    now[rank, gone] -= 1
    copies[gone] -= 1
    piece = load[gone] / copies[gone]
    rank_load += now[:, gone] * (piece - share[gone])
    share[gone] = piece
    copies[expert] += 1
    piece = load[expert] / copies[expert]
    rank_load += now[:, expert] * (piece - share[expert])
    share[expert] = piece
    place[slot] = expert
    now[rank, expert] += 1
    rank_load[rank] += piece


@compiled
def swap(layer: Layer, slot: int, other: int) -> None:
    """Let two slots of different ranks exchange their experts."""
    place, now, rank_load = layer.place, layer.now, layer.rank_load
    per_rank = len(place) // len(rank_load)
    rank, there = slot // per_rank, other // per_rank
    out, into = place[slot], place[other]
    less = layer.share[out] - layer.share[into]
    rank_load[rank] -= less
    rank_load[there] += less
    now[rank, out] -= 1
    now[there, into] -= 1
    now[rank, into] += 1
    now[there, out] += 1
    place[slot], place[other] = into, out


@compiled
def search_layer(layer: Layer, aim: Aim) -> bool:
    """Change `layer` until no rank is above the target, or nothing helps; return whether the target is reached."""
    place, rank_load = layer.place, layer.rank_load
    per_rank = len(place) // len(rank_load)
    for _ in range(min(aim.most_changes, _CHANGES_PER_SLOT * len(place))):
        hot = int(rank_load.argmax())
        if rank_load[hot] <= aim.target:
            break
        enough = max(rank_load[hot] - aim.target, aim.least) if aim.capped else np.inf
        score, slot, other = best_swap(layer, aim, hot, enough)
        spare = spare_copies(layer, hot)
        put_score, put_slot, expert = best_put(layer, aim, hot, enough, spare)
        if max(score, put_score) < 0:
            if not aim.with_via:
                return False
            _, slot, expert, third = best_via(layer, aim, hot, spare)
            if slot < 0:
                return False
            moved, gone = int(place[slot]), int(place[third])
            _take(layer, third // per_rank, moved, gone)
            put(layer, third, moved)
            _take(layer, slot // per_rank, expert, moved)
            put(layer, slot, expert)
        elif put_score > score:
            _take(layer, put_slot // per_rank, expert, int(place[put_slot]))
            put(layer, put_slot, expert)
        else:
            out, into = int(place[slot]), int(place[other])
            _take(layer, hot, into, out)
            _take(layer, other // per_rank, out, into)
            swap(layer, slot, other)
    # The loads were changed again and again, so they are added up once more.
    count(layer)
    return bool(rank_load.max() <= aim.target)


@compiled
def _take(layer: Layer, rank: int, expert: int, gone: int) -> None:
    """Count that a rank receives one expert for another."""
    if layer.now[rank, expert] >= layer.old[rank, expert]:
        layer.room[rank] -= 1
    if layer.now[rank, gone] > layer.old[rank, gone]:
        layer.room[rank] += 1


@compiled
def return_slots(layer: Layer, target: float) -> None:
    """Bring back what was moved and need not have been: changes that save slots and keep all ranks within `target`."""
    place, now, old = layer.place, layer.now, layer.old
    per_rank = len(place) // len(layer.rank_load)
    again = True
    while again:
        again = False
        for slot in range(len(place)):
            rank, here = slot // per_rank, int(place[slot])
            if now[rank, here] <= old[rank, here]:
                continue
            for missing in range(len(layer.load)):
                if old[rank, missing] == 0 or now[rank, missing] > 0:
                    continue  # it never was here, or is; a second copy on a rank is of no use
                if _may_put(layer, rank, here, missing, target):
                    _take(layer, rank, missing, here)
                    put(layer, slot, missing)
                    again = True
                    break
                other = _slot_to_swap(layer, slot, missing, target)
                if other >= 0:
                    _take(layer, rank, missing, here)
                    _take(layer, other // per_rank, here, missing)
                    swap(layer, slot, other)
                    again = True
                    break


@compiled
def _may_put(layer: Layer, rank: int, gone: int, expert: int, target: float) -> bool:
    """Return whether a copy of `expert` can take the place of one of `gone` on a rank within the target."""
    copies, load, share, now, rank_load = layer.copies, layer.load, layer.share, layer.now, layer.rank_load
    if copies[gone] < 2 or layer.home[gone] != layer.home[expert]:
        return False
    more = load[gone] / (copies[gone] - 1) - share[gone]
    piece = load[expert] / (copies[expert] + 1)
    if rank_load[rank] - share[gone] + more * (now[rank, gone] - 1) + piece > target:
        return False
    for other in range(len(rank_load)):
        if other != rank and now[other, gone] > 0 and rank_load[other] + more * now[other, gone] > target:
            return False
    return True


@compiled
def _slot_to_swap(layer: Layer, slot: int, missing: int, target: float) -> int:
    """Return a slot of another rank that holds `missing` and can be swapped with `slot` to save slots, or -1."""
    place, now, old, rank_load = layer.place, layer.now, layer.old, layer.rank_load
    per_rank = len(place) // len(rank_load)
    rank, here = slot // per_rank, place[slot]
    first = rank // layer.node_ranks * layer.node_ranks
    less = layer.share[here] - layer.share[missing]
    if rank_load[rank] - less > target:
        return -1
    for other in range(first, first + layer.node_ranks):
        if other == rank or now[other, missing] == 0 or now[other, here] > 0 or rank_load[other] + less > target:
            continue
        if now[other, missing] <= old[other, missing] and now[other, here] >= old[other, here]:
            continue  # it would cost that rank what it saves this one
        for candidate in range(other * per_rank, (other + 1) * per_rank):
            if place[candidate] == missing:
                return candidate
    return -1
