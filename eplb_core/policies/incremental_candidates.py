"""The changes of one layer that unload its most loaded rank, and which of them drops most per slot received.

Each of the three searches exists twice: as loops, which numba compiles, and as array expressions, which numpy runs
where numba is not installed. Both look at the same candidates in the same order, compute the same expressions and keep
the first of equals, so they return the same bits.

A change must drop the highest load by more than the least of the `Aim`, and no rank that it touches may end above that.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eplb_core.arrays import FloatArray, IntArray
from eplb_core.policies.compiled import COMPILES, compiled
from eplb_core.policies.movement import CountArray


class Layer(NamedTuple):
    """The state of one layer while it is searched. The arrays are changed in place.

    Attributes:
        place: int64 `[slots]`, the expert of each slot; no slot is empty.
        old: int16 `[ranks, experts]`, the copies that each rank had at first.
        now: the same, as it is now.
        copies: int64 `[experts]`, on all ranks together.
        load: float64 `[experts]`.
        share: float64 `[experts]`, the load of one copy.
        rank_load: float64 `[ranks]`.
        room: int64 `[ranks]`, how many slots each rank may still receive anew.
        home: int64 `[experts]`, the node of each expert; all 0 unless groups are kept on nodes.
        node_ranks: ranks of a node, which change with one another; all ranks unless groups are kept on nodes.
    """

    place: IntArray
    old: CountArray
    now: CountArray
    copies: IntArray
    load: FloatArray
    share: FloatArray
    rank_load: FloatArray
    room: IntArray
    home: IntArray
    node_ranks: int


class Aim(NamedTuple):
    """What a search wants.

    Attributes:
        target: the highest load of a rank that is good enough.
        value: float64 `[5]`, what a drop is worth by the slots that it costs, -2 to 2.
        capped: whether a drop below the target is worth no more than one to the target.
        with_via: whether experts may go over a third rank where nothing else helps.
        most_changes: the search ends after so many.
        least: the smallest drop that counts: a search that creeps does not end.
    """

    target: float
    value: FloatArray
    capped: bool
    with_via: bool
    most_changes: int
    least: float


class Spare(NamedTuple):
    """What happens to the others if an expert with several copies loses one that is not on the most loaded rank.

    Attributes:
        more: float64 `[experts]`, the load that each other copy gets.
        highest: float64 `[experts]`, the highest load of another rank with a copy after that; -1 if there is none.
        where: int64 `[experts]`, that rank.
        second: float64 `[experts]`, the second highest such load.
    """

    more: FloatArray
    highest: FloatArray
    where: IntArray
    second: FloatArray


NOTHING = (-1.0, -1, -1)
"""Score, slot and slot, or slot and expert, where no candidate will do."""


@compiled
def _ranks_of_node(layer: Layer, hot: int) -> tuple[int, int, int]:
    """Return the first rank that `hot` changes experts with, the one after the last, and the slots of a rank."""
    first = hot // layer.node_ranks * layer.node_ranks
    return first, first + layer.node_ranks, len(layer.place) // len(layer.rank_load)


# --- swap: the experts of two slots ---------------------------------------------------------------------------------


def _best_swap_loops(layer: Layer, aim: Aim, hot: int, enough: float) -> tuple[float, int, int]:
    """Return the best score, a slot of the rank `hot`, and the slot of another rank of its node to swap with."""
    place, old, now, _, _, share, rank_load, room, _, _ = layer
    value, least = aim.value, aim.least
    first, last, per_rank = _ranks_of_node(layer, hot)
    high = rank_load[hot]
    best, best_slot, best_other = -1.0, -1, -1
    for slot in range(hot * per_rank, (hot + 1) * per_rank):
        out = place[slot]
        given_back = 1 if now[hot, out] > old[hot, out] else 0
        for rank in range(first, last):
            if rank == hot or now[rank, out] > 0:
                continue
            received = 1 if now[rank, out] >= old[rank, out] else 0
            for other in range(rank * per_rank, (rank + 1) * per_rank):
                into = place[other]
                less = share[out] - share[into]
                if now[hot, into] > 0:
                    continue
                drop = high - max(high - less, rank_load[rank] + less)
                if drop <= least:
                    continue
                here = (1 if now[hot, into] >= old[hot, into] else 0) - given_back
                there = received - (1 if now[rank, into] > old[rank, into] else 0)
                if here > room[hot] or there > room[rank]:
                    continue
                score = min(drop, enough) * value[2 + here + there]
                if score > best:
                    best, best_slot, best_other = score, slot, other
    return best, best_slot, best_other


def _best_swap_arrays(layer: Layer, aim: Aim, hot: int, enough: float) -> tuple[float, int, int]:
    place, old, now, _, _, share, rank_load, room, _, _ = layer
    value, least = aim.value, aim.least
    first, last, per_rank = _ranks_of_node(layer, hot)
    high = rank_load[hot]
    out = place[hot * per_rank : (hot + 1) * per_rank]
    into = place[first * per_rank : last * per_rank]
    rank = np.repeat(np.arange(first, last), per_rank)
    less = share[out][:, None] - share[into]
    drop = high - np.maximum(high - less, rank_load[rank] + less)
    allowed = (drop > least) & (now[hot, into] == 0) & (rank != hot) & (now[:, out].T[:, rank] == 0)
    here = (now[hot, into] >= old[hot, into]).astype(np.int64) - (now[hot, out] > old[hot, out])[:, None]
    there = (now[:, out] >= old[:, out]).T[:, rank].astype(np.int64) - (now[rank, into] > old[rank, into])
    allowed &= (here <= room[hot]) & (there <= room[rank])
    score = np.where(allowed, np.minimum(drop, enough) * value[2 + here + there], -1.0)
    best = int(score.argmax())
    if score.flat[best] < 0:
        return NOTHING
    slot, other = divmod(best, len(into))
    return score.flat[best], hot * per_rank + slot, first * per_rank + other


# --- put: a copy of an expert in place of a redundant copy of another one ---------------------------------------------


def _spare_copies_loops(layer: Layer, hot: int) -> Spare:
    """Return what happens to the others if an expert with several copies loses one.

    Returns:
        `[experts]` the load that each other copy then gets; and the highest load that a rank other than `hot` with a
        copy then has, that rank, and the second highest: -1 where there is none.
    """
    place, _, now, copies, load, share, rank_load, _, _, _ = layer
    first, last, per_rank = _ranks_of_node(layer, hot)
    more = np.zeros(len(load))
    highest = np.full(len(load), -1.0)
    second = np.full(len(load), -1.0)
    where = np.full(len(load), -1)
    for expert in range(len(load)):
        if copies[expert] > 1:
            more[expert] = load[expert] / (copies[expert] - 1) - share[expert]
    for slot in range(first * per_rank, last * per_rank):
        rank, expert = slot // per_rank, place[slot]
        if rank == hot or copies[expert] < 2:
            continue
        after = rank_load[rank] + more[expert] * now[rank, expert]
        if after >= highest[expert]:
            second[expert] = highest[expert]
            highest[expert], where[expert] = after, rank
        elif after > second[expert]:
            second[expert] = after
    return Spare(more, highest, where, second)


def _spare_copies_arrays(layer: Layer, hot: int) -> Spare:
    place, _, now, copies, load, share, rank_load, _, _, _ = layer
    first, last, per_rank = _ranks_of_node(layer, hot)
    several = copies > 1
    more = np.where(several, load / np.maximum(copies - 1, 1) - share, 0.0)
    slot = np.arange(first * per_rank, last * per_rank)
    slot = slot[(slot // per_rank != hot) & several[place[slot]]]
    rank, expert = slot // per_rank, place[slot]
    after = rank_load[rank] + more[expert] * now[rank, expert]
    upwards = np.lexsort((after, expert))  # stable: of equals the last slot comes last
    expert, after, rank = expert[upwards], after[upwards], rank[upwards]
    last_of = np.append(expert[1:] != expert[:-1], True) if len(expert) else np.zeros(0, dtype=np.bool_)
    highest = np.full(len(load), -1.0)
    second = np.full(len(load), -1.0)
    where = np.full(len(load), -1)
    highest[expert[last_of]], where[expert[last_of]] = after[last_of], rank[last_of]
    expert, after = expert[~last_of], after[~last_of]
    second[expert] = after  # of several the last one stays, which is the highest
    return Spare(more, highest, where, second)


def _best_put_loops(layer: Layer, aim: Aim, hot: int, enough: float, spare: Spare) -> tuple[float, int, int]:
    """Return the best score, a slot with a redundant copy, and the expert that takes its place.

    *Relieve*: an expert of `hot` gets a further copy on another rank. *Drop*: `hot` gives up a redundant copy, and
    another expert gets a further copy there.
    """
    place, old, now, copies, load, share, rank_load, room, home, _ = layer
    more, highest, where, second = spare.more, spare.highest, spare.where, spare.second
    home, value, least = layer.home, aim.value, aim.least
    first, last, per_rank = _ranks_of_node(layer, hot)
    high = rank_load[hot]
    best, best_slot, best_expert = -1.0, -1, -1
    for held in range(hot * per_rank, (hot + 1) * per_rank):
        expert = place[held]
        piece = load[expert] / (copies[expert] + 1)
        fewer = (share[expert] - piece) * now[hot, expert]
        for rank in range(first, last):
            if rank == hot or now[rank, expert] > 0:
                continue
            received = 1 if now[rank, expert] >= old[rank, expert] else 0
            for slot in range(rank * per_rank, (rank + 1) * per_rank):
                gone = place[slot]
                if copies[gone] < 2:
                    continue
                after = high - fewer + more[gone] * now[hot, gone]
                after = max(after, rank_load[rank] + piece - share[gone] + more[gone] * (now[rank, gone] - 1))
                after = max(after, second[gone] if where[gone] == rank else highest[gone])
                drop = high - after
                if drop <= least:
                    continue
                cost = received - (1 if now[rank, gone] > old[rank, gone] else 0)
                if cost > room[rank]:
                    continue
                score = min(drop, enough) * value[2 + cost]
                if score > best:
                    best, best_slot, best_expert = score, slot, expert
    for slot in range(hot * per_rank, (hot + 1) * per_rank):
        gone = place[slot]
        if copies[gone] < 2:
            continue
        given_back = 1 if now[hot, gone] > old[hot, gone] else 0
        for expert in range(len(load)):
            if now[hot, expert] > 0 or home[expert] != home[gone]:
                continue
            piece = load[expert] / (copies[expert] + 1)
            after = high - share[gone] + more[gone] * (now[hot, gone] - 1) + piece
            drop = high - max(after, highest[gone])
            if drop <= least:
                continue
            cost = (1 if now[hot, expert] >= old[hot, expert] else 0) - given_back
            if cost > room[hot]:
                continue
            score = min(drop, enough) * value[2 + cost]
            if score > best:
                best, best_slot, best_expert = score, slot, expert
    return best, best_slot, best_expert


def _best_put_arrays(layer: Layer, aim: Aim, hot: int, enough: float, spare: Spare) -> tuple[float, int, int]:
    place, old, now, copies, load, share, rank_load, room, home, _ = layer
    more, highest, where, second = spare.more, spare.highest, spare.where, spare.second
    home, value, least = layer.home, aim.value, aim.least
    first, last, per_rank = _ranks_of_node(layer, hot)
    high = rank_load[hot]
    held = place[hot * per_rank : (hot + 1) * per_rank]
    slots = np.arange(first * per_rank, last * per_rank)
    slots = slots[(copies[place[slots]] > 1) & (slots // per_rank != hot)]
    found = NOTHING
    if len(slots):
        gone, rank = place[slots], slots // per_rank
        piece = load[held] / (copies[held] + 1)
        fewer = (share[held] - piece) * now[hot, held]
        after = (high - fewer)[:, None] + more[gone] * now[hot, gone]
        there = (rank_load[rank] + piece[:, None]) - share[gone] + more[gone] * (now[rank, gone] - 1)
        after = np.maximum(np.maximum(after, there), np.where(where[gone] == rank, second[gone], highest[gone]))
        drop = high - after
        cost = (now[:, held] >= old[:, held]).T[:, rank].astype(np.int64) - (now[rank, gone] > old[rank, gone])
        allowed = (drop > least) & (now[:, held].T[:, rank] == 0) & (cost <= room[rank])
        score = np.where(allowed, np.minimum(drop, enough) * value[2 + cost], -1.0)
        best = int(score.argmax())
        if score.flat[best] >= 0:
            which, slot = divmod(best, len(slots))
            found = (score.flat[best], slots[slot], held[which])
    slots = np.arange(hot * per_rank, (hot + 1) * per_rank)
    slots = slots[copies[place[slots]] > 1]
    if len(slots):
        gone = place[slots]
        piece = load / (copies + 1)
        after = (high - share[gone] + more[gone] * (now[hot, gone] - 1))[:, None] + piece
        drop = high - np.maximum(after, highest[gone][:, None])
        cost = (now[hot] >= old[hot]).astype(np.int64) - (now[hot, gone] > old[hot, gone])[:, None]
        allowed = (drop > least) & (now[hot] == 0) & (home == home[gone][:, None]) & (cost <= room[hot])
        score = np.where(allowed, np.minimum(drop, enough) * value[2 + cost], -1.0)
        best = int(score.argmax())
        if score.flat[best] > found[0]:
            slot, expert = divmod(best, len(load))
            found = (score.flat[best], slots[slot], expert)
    return found


# --- via: relieve over a third rank -----------------------------------------------------------------------------------


def _best_via_loops(layer: Layer, aim: Aim, hot: int, spare: Spare) -> tuple[float, int, int, int]:
    """Return the drop, the slot that gets a copy of an expert of `hot`, that expert, and where the slot's own goes.

    The slot's expert takes the place of a redundant copy on a third rank. That costs two slots, and there are many
    candidates, so this is looked for only where nothing else will do.
    """
    place, _, now, copies, load, share, rank_load, room, _, _ = layer
    more, highest, where, second = spare.more, spare.highest, spare.where, spare.second
    first, last, per_rank = _ranks_of_node(layer, hot)
    high = rank_load[hot]
    best, best_slot, best_expert, best_third = aim.least, -1, -1, -1
    thirds = np.empty(len(place), dtype=np.int64)
    rest = np.empty(len(place))
    number = 0
    for third in range(first * per_rank, last * per_rank):
        other, gone = third // per_rank, place[third]
        if other != hot and copies[gone] > 1 and now[hot, gone] == 0 and room[other] >= 1:
            thirds[number] = third
            rest[number] = second[gone] if where[gone] == other else highest[gone]
            number += 1
    for held in range(hot * per_rank, (hot + 1) * per_rank):
        expert = place[held]
        piece = load[expert] / (copies[expert] + 1)
        here = high - (share[expert] - piece) * now[hot, expert]
        if high - here <= best:
            continue
        for slot in range(first * per_rank, last * per_rank):
            rank, moved = slot // per_rank, place[slot]
            if rank == hot or now[rank, expert] > 0 or moved == expert or room[rank] < 1:
                continue
            there = max(here, rank_load[rank] + piece - share[moved])
            if high - there <= best:
                continue
            for index in range(number):
                # Most candidates are ruled out by loads alone, so those come first.
                if high - rest[index] <= best:
                    continue
                other, gone = thirds[index] // per_rank, place[thirds[index]]
                after = rank_load[other] + share[moved] - share[gone] + more[gone] * (now[other, gone] - 1)
                after = max(there, after, rest[index])
                if high - after <= best or other == rank or gone in (expert, moved):
                    continue
                if now[other, moved] == 0 and now[rank, gone] == 0:
                    best, best_slot, best_expert, best_third = high - after, slot, expert, thirds[index]
    return best, best_slot, best_expert, best_third


def _best_via_arrays(layer: Layer, aim: Aim, hot: int, spare: Spare) -> tuple[float, int, int, int]:
    place, _, now, copies, load, share, rank_load, room, _, _ = layer
    more, highest, where, second = spare.more, spare.highest, spare.where, spare.second
    first, last, per_rank = _ranks_of_node(layer, hot)
    high = rank_load[hot]
    best, found = aim.least, (-1, -1, -1)
    slots = np.arange(first * per_rank, last * per_rank)
    ranks, moved = slots // per_rank, place[slots]
    thirds = slots[(copies[moved] > 1) & (ranks != hot) & (now[hot, moved] == 0) & (room[ranks] >= 1)]
    others, gone = thirds // per_rank, place[thirds]
    if not len(thirds):
        return best, -1, -1, -1
    rest = np.where(where[gone] == others, second[gone], highest[gone])
    gives = more[gone] * (now[others, gone] - 1)
    fits = (now[others][:, moved] == 0).T & (others != ranks[:, None]) & (gone != moved[:, None])
    fits &= (now[ranks][:, gone] == 0) & ((ranks != hot) & (room[ranks] >= 1))[:, None]
    stacked = np.maximum(rank_load[others] + share[moved][:, None] - share[gone] + gives, rest)
    for held in range(hot * per_rank, (hot + 1) * per_rank):
        expert = place[held]
        piece = load[expert] / (copies[expert] + 1)
        here = high - (share[expert] - piece) * now[hot, expert]
        if high - here <= best:
            continue
        there = np.maximum(here, rank_load[ranks] + piece - share[moved])
        allowed = fits & (gone != expert) & ((now[ranks, expert] == 0) & (moved != expert))[:, None]
        drop = np.where(allowed, high - np.maximum(there[:, None], stacked), -1.0)
        top = int(drop.argmax())
        if drop.flat[top] > best:
            slot, third = divmod(top, len(thirds))
            best, found = drop.flat[top], (slots[slot], expert, thirds[third])
    return best, found[0], found[1], found[2]


best_swap = compiled(_best_swap_loops) if COMPILES else _best_swap_arrays
spare_copies = compiled(_spare_copies_loops) if COMPILES else _spare_copies_arrays
best_put = compiled(_best_put_loops) if COMPILES else _best_put_arrays
best_via = compiled(_best_via_loops) if COMPILES else _best_via_arrays
