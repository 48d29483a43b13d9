"""Cuts the moves of one layer into parts that each fit into a few experts' worth of window, sends and receives.

A part reads every slot as it is when the part begins, and overwrites slots at its end. So a slot may be overwritten
once another copy of its expert stays, or arrives in the same part. A rank that still needs the expert elsewhere keeps a
copy of its own, and so does a node: cutting a layer never costs a transfer more than the plan has, in all or between
nodes. Where experts are relayed, a rank waits for one that another rank of its node receives in this part.

What is left when no slot may be overwritten are cycles: every slot waits for the expert that the next one holds. A
cycle is turned in one part if the budget allows. If it visits a rank too often, it is shortened first: two visits of
one rank are joined by turning only what lies between them, and what arrives lands in the slot that was just sent, one
local copy away from where it belongs. So one expert of window, send and receive per rank is always enough.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from eplb_core.errors import EplbError
from eplb_core.placement import EMPTY


@dataclass(frozen=True, slots=True)
class Budget:
    """What each rank may use in one part, in experts.

    Attributes:
        window: experts received, and slots saved.
        sends: experts sent.
        receives: experts received.
    """

    window: int
    sends: int
    receives: int


@dataclass(slots=True)
class LayerPart:
    """Moves of one layer that run together. Slots are numbered over all ranks.

    Attributes:
        transfers: `(expert, source slot, destination rank)`.
        moves: `(slot, expert, transfer, source slot)`; one of the last two is -1: the bytes come out of a transfer of
            this part, or out of a slot of the same rank.
    """

    transfers: list[tuple[int, int, int]] = field(default_factory=list)
    moves: list[tuple[int, int, int, int]] = field(default_factory=list)


def cut_layer(
    old: Sequence[int],
    new: Sequence[int],
    num_ranks: int,
    budget: Budget,
    *,
    planned_source: Mapping[tuple[int, int], int],
    node_of_rank: Sequence[int],
    relay: bool = False,
) -> list[LayerPart]:
    """Cut the way of one layer from `old` to `new` into parts.

    After each part, every expert that `new` needs has a copy. Slots that become empty keep their expert to the end.

    Args:
        old: `[num_slots]`, the experts before.
        new: `[num_slots]`, the experts after; each has a copy in `old`.
        num_ranks: the number of ranks that share the slots evenly.
        budget: what a part may use, at least one expert of each that the layer needs.
        planned_source: `(expert, destination rank)` -> the rank that the plan reads it from, preferred if it can.
        node_of_rank: `[num_ranks]`; a source on the same node is read if there is one.
        relay: whether an expert crosses to a node without a copy only once, and is read there by the others.
    """
    state = _LayerState(old, new, num_ranks, budget, planned_source, node_of_rank, relay)
    parts = []
    while state.pending:
        part = state.next_part()
        if not part.moves:
            raise EplbError(
                "the schedule of a layer came to a halt",
                why=f"no slot can be overwritten within {budget}, which is an error in eplb",
                remedy="use a larger window, and report this with both placements",
            )
        parts.append(part)
    return parts


class _LayerState:
    """Where the experts of a layer are before the part that is being made, and what the part has used so far."""

    def __init__(
        self,
        old: Sequence[int],
        new: Sequence[int],
        num_ranks: int,
        budget: Budget,
        planned_source: Mapping[tuple[int, int], int],
        node_of_rank: Sequence[int],
        relay: bool,
    ) -> None:
        self.held = list(old)  # slot -> expert when the part begins
        self.new = new
        self.per_rank = len(self.held) // num_ranks
        self.rank_of = [slot // self.per_rank for slot in range(len(self.held))]
        self.node_of = [node_of_rank[rank] for rank in self.rank_of]
        self.budget = budget
        self.planned_source = planned_source
        self.places = [self.rank_of, self.node_of] if len(set(node_of_rank)) > 1 else [self.rank_of]
        self.relay = relay

        by_local_slot = sorted(range(len(self.held)), key=lambda slot: (slot % self.per_rank, slot))
        # Slots that still get another expert. Interleaved by rank, so that a part spreads over the ranks.
        self.pending = {slot: None for slot in by_local_slot if new[slot] != EMPTY and new[slot] != self.held[slot]}
        self.needed = set(new) - {EMPTY}
        self.holders: dict[int, list[int]] = {}
        for slot, expert in enumerate(self.held):
            self.holders.setdefault(expert, []).append(slot)
        self.targets: dict[int, dict[int, None]] = {}
        for slot in self.pending:
            self.targets.setdefault(new[slot], {})[slot] = None
        self.after = {expert: list(slots) for expert, slots in self.holders.items()}  # holders when the part has ended
        self._begin_part()

    def next_part(self) -> LayerPart:
        """Make one part that is as large as the budget allows, and take its moves as done."""
        self._begin_part()
        self._overwrite_what_may_be(self.pending)
        cycles = self._find_cycles()
        if cycles:
            for cycle in cycles:
                self._turn_cycle(cycle)
            self._overwrite_what_may_be(self.pending)
        for slot, expert in self.overwritten.items():
            self.holders[self.held[slot]].remove(slot)
            self.holders.setdefault(expert, []).append(slot)
            self.held[slot] = expert
        return self.part

    def _begin_part(self) -> None:
        self.part = LayerPart()
        self.overwritten: dict[int, int] = {}  # slot -> its expert after the part
        self.copied_from: dict[int, int] = {}  # slot -> the slot of the same rank that it is copied from
        self.arriving: dict[tuple[int, int], int] = {}  # (rank, expert) -> transfer
        self.arriving_on_node: set[tuple[int, int]] = set()  # (node, expert)
        self.window_used: Counter[int] = Counter()
        self.sends_used: Counter[int] = Counter()
        self.receives_used: Counter[int] = Counter()

    # --- slots that may be overwritten --------------------------------------------------------------------------------

    def _may_overwrite(self, slot: int) -> bool:
        """Whether the slot's expert stays where it is needed when this slot is overwritten."""
        expert = self.held[slot]
        if expert == EMPTY or expert not in self.needed:
            return True
        copies = self.after[expert]
        if len(copies) < 2:
            return False
        targets = self.targets.get(expert)
        return not targets or all(
            not any(place[target] == place[slot] for target in targets)
            or any(place[copy] == place[slot] and copy != slot for copy in copies)
            for place in self.places
        )

    def _overwrite_what_may_be(self, slots: Iterable[int]) -> None:
        """Overwrite slots in turn, then those that held what was brought elsewhere, and so on along the chains."""
        queue = deque(slots)
        while queue:
            slot = queue.popleft()
            if slot not in self.pending or slot in self.overwritten or not self._may_overwrite(slot):
                continue
            expert = self.new[slot]
            if self._bring(slot, expert):
                queue.extend(self.holders[expert])

    def _bring(self, slot: int, expert: int) -> bool:
        """Move `expert` into `slot` from wherever is best, or return False if the budget does not allow it."""
        rank = self.rank_of[slot]
        transfer = self.arriving.get((rank, expert))
        if transfer is not None:
            self._move(slot, expert, transfer=transfer)
            return True
        here = [source for source in self.holders[expert] if self.rank_of[source] == rank]
        if here:
            source = min(here, key=lambda source: (source in self.overwritten, source))
            closes_ring = self._closes_ring(slot, source)
            if closes_ring:
                if self.window_used[rank] >= self.budget.window:
                    return False
                self.window_used[rank] += 1
            self._move(slot, expert, source=source, saved=closes_ring)
            return True
        best = self._best_source(expert, slot)
        if best is None:
            return False
        self._transfer(slot, expert, best)
        return True

    def _best_source(self, expert: int, slot: int) -> int | None:
        """Return the slot to read `expert` from for `slot`, or None if it has to wait for the next part."""
        rank, node = self.rank_of[slot], self.node_of[slot]
        if self.window_used[rank] >= self.budget.window or self.receives_used[rank] >= self.budget.receives:
            return None
        holders = self.holders[expert]
        able = holders
        if len(self.places) > 1:
            able = [source for source in holders if self.node_of[source] == node]
            if not able and self.relay and (node, expert) in self.arriving_on_node:
                return None
        able = [source for source in able or holders if self.sends_used[self.rank_of[source]] < self.budget.sends]
        if len(able) < 2:
            return able[0] if able else None
        planned = self.planned_source.get((expert, rank))

        def preference(source: int) -> tuple[bool, int, int]:
            return self.rank_of[source] != planned, self.sends_used[self.rank_of[source]], source

        return min(able, key=preference)

    def _closes_ring(self, slot: int, source: int) -> bool:
        """Whether copying `source` to `slot` closes a ring of copies, which takes a save."""
        walk: int | None = source
        while walk is not None and walk != slot:
            walk = self.copied_from.get(walk)
        return walk == slot

    def _transfer(self, slot: int, expert: int, source: int) -> None:
        rank = self.rank_of[slot]
        self.window_used[rank] += 1
        self.receives_used[rank] += 1
        self.sends_used[self.rank_of[source]] += 1
        self.arriving[rank, expert] = len(self.part.transfers)
        self.arriving_on_node.add((self.node_of[slot], expert))
        self.part.transfers.append((expert, source, rank))
        self._move(slot, expert, transfer=self.arriving[rank, expert])

    def _move(self, slot: int, expert: int, *, transfer: int = -1, source: int = -1, saved: bool = False) -> None:
        self.part.moves.append((slot, expert, transfer, source))
        if source >= 0 and not saved:
            self.copied_from[slot] = source
        self.overwritten[slot] = expert
        self.after[self.held[slot]].remove(slot)
        self.after.setdefault(expert, []).append(slot)
        if expert == self.new[slot]:
            del self.pending[slot]
            del self.targets[expert][slot]

    # --- cycles of slots that wait for one another --------------------------------------------------------------------

    def _find_cycles(self) -> list[list[int]]:
        """Return cycles of slots, each of which waits until its expert was brought to the next one."""
        cycles = []
        seen: dict[int, int] = {}  # slot -> the walk that came by
        for start in self.pending:
            walk: list[int] = []
            slot = start
            while slot not in seen and slot not in self.overwritten and not self._may_overwrite(slot):
                seen[slot] = start
                walk.append(slot)
                slot = self._waits_for(slot)
            if walk and seen.get(slot) == start:
                cycles.append(walk[walk.index(slot) :])
        return cycles

    def _waits_for(self, slot: int) -> int:
        """Return a slot that needs the expert that `slot` must not lose: on its rank, else on its node, else any."""
        targets = self.targets[self.held[slot]]
        for place in self.places:
            for target in targets:
                if place[target] == place[slot]:
                    return target
        return next(iter(targets))

    def _turn_cycle(self, cycle: list[int]) -> None:
        """Turn the whole cycle, or else as many pieces of it between two visits of one rank as the budget allows."""
        visits = self._visits(cycle)
        if self._turn([slot for visit in visits for slot in visit]) or len(visits) == 1:
            return
        path: list[list[int]] = []
        for visit in visits:
            rank = self.rank_of[visit[0]]
            earlier = next((i for i, other in enumerate(path) if self.rank_of[other[0]] == rank), None)
            if earlier is None:
                path.append(visit)
                continue
            piece = [path[earlier][-1], *(slot for between in path[earlier + 1 :] for slot in between)]
            # A visit whose end was turned cannot be passed through in this part, but another piece can start at it.
            path = [visit] if self._turn(piece) else [*path[earlier + 1 :], visit]

    def _visits(self, cycle: list[int]) -> list[list[int]]:
        """Split a cycle into runs of slots of one rank, starting where the rank changes."""
        start = next(
            (i for i in range(len(cycle)) if self.rank_of[cycle[i - 1]] != self.rank_of[cycle[i]]),
            0,
        )
        visits: list[list[int]] = []
        for slot in cycle[start:] + cycle[:start]:
            if visits and self.rank_of[visits[-1][0]] == self.rank_of[slot]:
                visits[-1].append(slot)
            else:
                visits.append([slot])
        return visits

    def _turn(self, ring: list[int]) -> bool:
        """Move every slot's expert to the next slot of the ring, and the last one's to the first, if that fits."""
        hops = list(zip(ring, ring[1:] + ring[:1], strict=True))
        crossing = [(s, d) for s, d in hops if self.rank_of[s] != self.rank_of[d]]
        arrivals = Counter(self.rank_of[d] for _, d in crossing)
        departures = Counter(self.rank_of[s] for s, _ in crossing)
        in_window = arrivals or Counter({self.rank_of[ring[0]]: 1})  # a ring on one rank takes a save
        if (
            any(self.window_used[r] + n > self.budget.window for r, n in in_window.items())
            or any(self.receives_used[r] + n > self.budget.receives for r, n in arrivals.items())
            or any(self.sends_used[r] + n > self.budget.sends for r, n in departures.items())
        ):
            return False
        if not crossing:
            self.window_used[self.rank_of[ring[0]]] += 1
        for source, slot in reversed(hops):
            if self.rank_of[source] == self.rank_of[slot]:
                self._move(slot, self.held[source], source=source, saved=slot == ring[1])
            else:
                self._transfer(slot, self.held[source], source)
        return True
