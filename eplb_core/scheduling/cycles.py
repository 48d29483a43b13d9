"""Cycles of slots, each of which waits until its expert was brought to the next one, and how they are turned.

A cycle is turned in one part if the budget allows. If it visits a rank too often, it is shortened first: two visits of
one rank are joined by turning only what lies between them, and what arrives lands in the slot that was just sent, one
local copy away from where it belongs. So one expert of window, send and receive per rank is always enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain

from eplb_core.scheduling.layer_state import LayerState


def turn_cycles(state: LayerState) -> bool:
    """Move along cycles of slots that wait for one another; return whether any was, in whole or in part."""
    moved = state.moved_experts()
    # Where nothing has moved since, there is no cycle that was not found before. Mostly there is none at all.
    if moved is not None and not _find_cycles(state, chain.from_iterable(map(state.holders.__getitem__, moved))):
        state.moved = []
        return False
    cycles = _find_cycles(state, state.pending)
    first = len(state.parts.moves)
    turned = [_turn_cycle(state, cycle) for cycle in cycles]
    state.moved = [] if all(turned) else None
    return len(state.parts.moves) > first


def _find_cycles(state: LayerState, starts: Iterable[int]) -> list[list[int]]:
    """Return cycles of slots, each of which waits until its expert was brought to the next one.

    Args:
        state: where the experts are.
        starts: the slots that are walked on from.
    """
    held, spare, targets = state.held, state.spare, state.targets
    cycles = []
    unseen = state.waits.copy()  # slot -> whether it waits, and no walk came by
    for start in starts:
        if not unseen[start]:
            continue
        walk: list[int] = []
        slot = start
        while unseen[slot]:
            unseen[slot] = False
            expert = held[slot]
            needing = targets[expert]
            if spare[expert] and (not needing or state.stays(slot, expert)):
                break
            walk.append(slot)
            slot = needing[0] if len(needing) == 1 else _nearest(state, slot, needing)
        if slot in walk:
            cycles.append(walk[walk.index(slot) :])
    return cycles


def _nearest(state: LayerState, slot: int, targets: list[int]) -> int:
    """Return one of the slots that need what `slot` must not lose: on its rank, else on its node, else any."""
    for place in state.levels:
        here = place[slot]
        for target in targets:
            if place[target] == here:
                return target
    return targets[0]


def _turn_cycle(state: LayerState, cycle: list[int]) -> bool:
    """Turn the whole cycle, or else as many pieces of it between two visits of one rank as the budget allows.

    Returns:
        Whether the whole cycle was turned.
    """
    visits = _visits(state, cycle)
    rank_of = state.rank_of
    all_open = all(_is_open(state, rank_of[visit[0]]) for visit in visits)
    if all_open and _turn(state, [slot for visit in visits for slot in visit]):
        return True
    if len(visits) == 1:
        return False
    path: list[list[int]] = []
    for visit in visits:
        rank = rank_of[visit[0]]
        if not _is_open(state, rank):
            path = []  # no piece can pass through it
            continue
        earlier = next((i for i, other in enumerate(path) if rank_of[other[0]] == rank), None)
        if earlier is None:
            path.append(visit)
            continue
        piece = [path[earlier][-1], *(slot for between in path[earlier + 1 :] for slot in between)]
        # A visit whose end was turned cannot be passed through in this part, but another piece can start at it.
        path = [visit] if _turn(state, piece) else [*path[earlier + 1 :], visit]
    return False


def _is_open(state: LayerState, rank: int) -> bool:
    """Whether a rank may send, receive and stage one more expert."""
    use, budget, size = state.use, state.budget, state.size
    return (
        use.window[rank] + size <= budget.window
        and use.receives[rank] + size <= budget.receives
        and use.sends[rank] + size <= budget.sends
    )


def _visits(state: LayerState, cycle: list[int]) -> list[list[int]]:
    """Split a cycle into runs of slots of one rank, starting where the rank changes."""
    rank_of = state.rank_of
    start = next((i for i in range(len(cycle)) if rank_of[cycle[i - 1]] != rank_of[cycle[i]]), 0)
    visits: list[list[int]] = []
    for slot in cycle[start:] + cycle[:start]:
        if visits and rank_of[visits[-1][0]] == rank_of[slot]:
            visits[-1].append(slot)
        else:
            visits.append([slot])
    return visits


def _turn(state: LayerState, ring: list[int]) -> bool:
    """Move every slot's expert to the next slot of the ring, and the last one's to the first, if that fits."""
    rank_of, held, use, budget, size = state.rank_of, state.held, state.use, state.budget, state.size
    hops = list(zip(ring, ring[1:] + ring[:1], strict=True))
    crossings = Counter([rank_of[slot] for source, slot in hops if rank_of[source] != rank_of[slot]])
    for rank, count in crossings.items():  # a ring leaves a rank as often as it arrives there
        if (
            use.window[rank] + count * size > budget.window
            or use.receives[rank] + count * size > budget.receives
            or use.sends[rank] + count * size > budget.sends
        ):
            return False
    if not crossings:  # a ring on one rank takes a save
        rank = rank_of[ring[0]]
        if use.window[rank] + size > budget.window:
            return False
        use.window[rank] += size
    for source, slot in reversed(hops):
        if rank_of[source] == rank_of[slot]:
            state.copy(slot, held[source], source, saved=slot == ring[1])
        else:
            state.transfer(slot, held[source], source)
    return True
