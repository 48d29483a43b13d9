"""Cycles of slots, each of which waits until its expert was brought to the next one, and how they are turned.

A cycle is turned in one part if the budget allows. If it visits a rank too often, it is shortened first: two visits of
one rank are joined by turning only what lies between them, and what arrives lands in the slot that was just sent, one
local copy away from where it belongs. So one expert of window, send and receive per rank is always enough.
"""

from __future__ import annotations

from collections import Counter

from eplb_core.layer_state import LayerState


def turn_cycles(state: LayerState) -> bool:
    """Move along cycles of slots that wait for one another; return whether there were any."""
    cycles = _find_cycles(state)
    for cycle in cycles:
        _turn_cycle(state, cycle)
    return bool(cycles)


def _find_cycles(state: LayerState) -> list[list[int]]:
    """Return cycles of slots, each of which waits until its expert was brought to the next one."""
    held, spare, targets = state.held, state.spare, state.targets
    cycles = []
    unseen = state.waits.copy()  # slot -> whether it waits, and no walk came by
    for start in state.pending:
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
    for place in state.places.levels:
        here = place[slot]
        for target in targets:
            if place[target] == here:
                return target
    return targets[0]


def _turn_cycle(state: LayerState, cycle: list[int]) -> None:
    """Turn the whole cycle, or else as many pieces of it between two visits of one rank as the budget allows."""
    visits = _visits(state, cycle)
    if _turn(state, [slot for visit in visits for slot in visit]) or len(visits) == 1:
        return
    path: list[list[int]] = []
    for visit in visits:
        rank = state.places.rank_of[visit[0]]
        earlier = next((i for i, other in enumerate(path) if state.places.rank_of[other[0]] == rank), None)
        if earlier is None:
            path.append(visit)
            continue
        piece = [path[earlier][-1], *(slot for between in path[earlier + 1 :] for slot in between)]
        # A visit whose end was turned cannot be passed through in this part, but another piece can start at it.
        path = [visit] if _turn(state, piece) else [*path[earlier + 1 :], visit]


def _visits(state: LayerState, cycle: list[int]) -> list[list[int]]:
    """Split a cycle into runs of slots of one rank, starting where the rank changes."""
    rank_of = state.places.rank_of
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
    rank_of, held, use, budget, size = state.places.rank_of, state.held, state.use, state.budget, state.size
    hops = list(zip(ring, ring[1:] + ring[:1], strict=True))
    crossing = [(rank_of[s], rank_of[d]) for s, d in hops if rank_of[s] != rank_of[d]]
    arrivals = Counter(d for _, d in crossing)
    departures = Counter(s for s, _ in crossing)
    in_window = arrivals or Counter({rank_of[ring[0]]: 1})  # a ring on one rank takes a save
    if (
        any(use.window[r] + n * size > budget.window for r, n in in_window.items())
        or any(use.receives[r] + n * size > budget.receives for r, n in arrivals.items())
        or any(use.sends[r] + n * size > budget.sends for r, n in departures.items())
    ):
        return False
    if not crossing:
        use.window[rank_of[ring[0]]] += size
    for source, slot in reversed(hops):
        if rank_of[source] == rank_of[slot]:
            state.copy(slot, held[source], source, saved=slot == ring[1])
        else:
            state.transfer(slot, held[source], source)
    return True
