"""Cuts the moves of one layer into parts that each fit into a few experts' worth of window, sends and receives.

A part reads every slot as it is when the part begins, and overwrites slots at its end. So a slot may be overwritten
once another copy of its expert stays, or arrives in the same part. A rank that still needs the expert elsewhere keeps a
copy of its own, and so does a node: cutting a layer never costs a transfer more than the plan has, in all or between
nodes. Where experts are relayed, a rank waits for one that another rank of its node receives in this part.

What is left when no slot may be overwritten are cycles: every slot waits for the expert that the next one holds. A
cycle is turned in one part if the budget allows. If it visits a rank too often, it is shortened first: two visits of
one rank are joined by turning only what lies between them, and what arrives lands in the slot that was just sent, one
local copy away from where it belongs. So one expert of window, send and receive per rank is always enough.

`cut_in_place` receives into empty slots directly, which takes no window. Then every part ends with giving up the slots
that may be overwritten and were not: they are empty from then on, for a later part to fill. So along a chain of slots
each is emptied by the part that brings its expert elsewhere, and filled by the next; the window is for cycles.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from eplb_core.errors import EplbError
from eplb_core.placement import EMPTY

_FEW = 3
"""So many times `cheap_bytes` are staged in one last step rather than moved in place in several."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What each rank may use in one step, in bytes.

    Attributes:
        window: experts received into the window, and slots saved.
        sends: experts sent.
        receives: experts received.
    """

    window: int
    sends: int
    receives: int


@dataclass(slots=True)
class Use:
    """What each rank uses in one step, in bytes; see `Budget`."""

    window: Counter[int] = field(default_factory=Counter)
    sends: Counter[int] = field(default_factory=Counter)
    receives: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class LayerTask:
    """What has to happen in a layer.

    Attributes:
        old: `[num_slots]`, the experts before.
        new: `[num_slots]`, the experts after; each has a copy in `old`.
        expert_bytes: bytes of an expert in the window.
        planned_source: `(expert, destination rank)` -> the rank that the plan reads it from, preferred if it can.
        node_of_rank: `[num_ranks]`; a source on the same node is read if there is one.
        relay: whether an expert crosses to a node without a copy only once, and is read there by the others.
    """

    old: Sequence[int]
    new: Sequence[int]
    expert_bytes: int
    planned_source: Mapping[tuple[int, int], int]
    node_of_rank: Sequence[int]
    relay: bool = False


@dataclass(slots=True)
class LayerPart:
    """Moves of one layer that run together. Slots are numbered over all ranks.

    Attributes:
        transfers: `(expert, source slot, destination rank)`.
        moves: `(slot, expert, transfer, source slot)`; one of the last two is -1: the bytes come out of a transfer of
            this part, or out of a slot of the same rank.
        landings: transfer -> the empty slot that it is received into; the others land in the window.
        vacated: slots that are empty when the part has ended.
    """

    transfers: list[tuple[int, int, int]] = field(default_factory=list)
    moves: list[tuple[int, int, int, int]] = field(default_factory=list)
    landings: dict[int, int] = field(default_factory=dict)
    vacated: list[int] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether nothing happens in it."""
        return not self.moves and not self.vacated


def cut_layer(task: LayerTask, budget: Budget) -> list[LayerPart]:
    """Cut the way of one layer from `old` to `new` into parts.

    After each part, every expert that `new` needs has a copy. What is empty in `new` keeps its expert to the end.

    Args:
        task: what has to happen.
        budget: what a part may use, at least one expert of each that the layer needs.
    """
    state = _LayerState(task, in_place=False)
    parts = []
    while state.pending:
        state.begin_part(budget, Use())
        state.overwrite()
        if state.turn_cycles():
            state.overwrite()
        parts.append(state.end_part())
    return parts


def cut_in_place(tasks: Sequence[LayerTask], budget: Budget, cheap_bytes: int) -> list[list[LayerPart]]:
    """Cut the ways of all layers into parts that share their steps, and receive into empty slots where they can.

    Args:
        tasks: what has to happen in each layer.
        budget: what all layers together may use in a step, at least one expert of each that they need.
        cheap_bytes: how much may land in the window of a rank in a step though it could go into a slot later.

    Returns:
        For each step the part of every layer. Parts may be empty, those of a layer that has ended are.
    """
    states = [_LayerState(task, in_place=True) for task in tasks]
    steps = []
    while any(state.pending for state in states):
        use = Use()
        for state in states:
            state.begin_part(budget, use)
            state.fill_empty()
        for state in states:
            state.turn_cycles()
        # What is left is few: better all of it now than a step for each end of a chain.
        limit = budget.window if _most_left(states) <= _FEW * cheap_bytes else min(budget.window, cheap_bytes)
        for state in states:
            state.overwrite(limit)
        for state in states:
            state.vacate()
        steps.append([state.end_part() for state in states])
        if all(part.is_empty for part in steps[-1]):
            raise _halted(budget)
    return steps


def _most_left(states: Sequence[_LayerState]) -> int:
    """Return the most bytes that the slots of any rank still wait for."""
    left: Counter[int] = Counter()
    for state in states:
        for slot in state.pending:
            left[state.rank_of[slot]] += state.size
    return max(left.values(), default=0)


def _halted(budget: Budget) -> EplbError:
    return EplbError(
        "the schedule of a layer came to a halt",
        why=f"no slot can be overwritten within {budget}, which is an error in eplb",
        remedy="use a larger window, and report this with both placements",
    )


class _LayerState:
    """Where the experts of a layer are before the part that is being made, and what the part has used so far."""

    def __init__(self, task: LayerTask, *, in_place: bool) -> None:
        self.held = list(task.old)  # slot -> expert when the part begins
        self.new = new = task.new
        self.size = task.expert_bytes
        num_ranks = len(task.node_of_rank)
        self.per_rank = len(self.held) // num_ranks
        self.rank_of = [slot // self.per_rank for slot in range(len(self.held))]
        self.node_of = [task.node_of_rank[rank] for rank in self.rank_of]
        self.planned_source = task.planned_source
        self.places = [self.rank_of, self.node_of] if len(set(task.node_of_rank)) > 1 else [self.rank_of]
        self.relay = task.relay
        self.in_place = in_place

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

    def begin_part(self, budget: Budget, use: Use) -> None:
        """Begin a part within what `budget` leaves of `use`, which other layers may share."""
        self.budget, self.use = budget, use
        self.staged_limit = budget.window
        self.part = LayerPart()
        self.overwritten: dict[int, int] = {}  # slot -> its expert after the part
        self.copied_from: dict[int, int] = {}  # slot -> the slot of the same rank that it is copied from
        self.arriving: dict[tuple[int, int], int] = {}  # (rank, expert) -> transfer
        self.arriving_on_node: set[tuple[int, int]] = set()  # (node, expert)

    def fill_empty(self) -> None:
        """Fill the slots that are empty."""
        for slot in [slot for slot in self.pending if self.held[slot] == EMPTY]:
            self._bring(slot, self.new[slot])

    def turn_cycles(self) -> bool:
        """Move along cycles of slots that wait for one another; return whether there were any."""
        cycles = self._find_cycles()
        for cycle in cycles:
            self._turn_cycle(cycle)
        return bool(cycles)

    def overwrite(self, staged_limit: int | None = None) -> None:
        """Overwrite slots that may be, as long as no more than `staged_limit` bytes of the window are used."""
        if staged_limit is not None:
            self.staged_limit = staged_limit
        self._overwrite_what_may_be(self.pending)

    def vacate(self) -> None:
        """Give up the slots that may be overwritten, for the next part to fill."""
        for slot in self.pending:
            if slot not in self.overwritten and self.held[slot] != EMPTY and self._may_overwrite(slot):
                self.part.vacated.append(slot)
                self.after[self.held[slot]].remove(slot)
                self.after.setdefault(EMPTY, []).append(slot)
                self.overwritten[slot] = EMPTY

    def end_part(self) -> LayerPart:
        """Take the part's moves as done, and return it."""
        if not self.in_place and not self.part.moves:
            raise _halted(self.budget)
        for slot, expert in self.overwritten.items():
            self.holders[self.held[slot]].remove(slot)
            self.holders.setdefault(expert, []).append(slot)
            self.held[slot] = expert
        return self.part

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

    def _lands(self, slot: int) -> bool:
        """Whether what crosses for `slot` is received into it, not into the window."""
        return self.in_place and self.held[slot] == EMPTY

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
                if self.use.window[rank] + self.size > self.budget.window:
                    return False
                self.use.window[rank] += self.size
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
        if self.use.window[rank] + self.size > self.staged_limit and not self._lands(slot):
            return None
        if self.use.receives[rank] + self.size > self.budget.receives:
            return None
        holders = self.holders[expert]
        able = holders
        if len(self.places) > 1:
            able = [source for source in holders if self.node_of[source] == node]
            if not able and self.relay and (node, expert) in self.arriving_on_node:
                return None
        able = [source for source in able or holders if self._may_send(self.rank_of[source])]
        if len(able) < 2:
            return able[0] if able else None
        planned = self.planned_source.get((expert, rank))

        def preference(source: int) -> tuple[bool, int, int]:
            return self.rank_of[source] != planned, self.use.sends[self.rank_of[source]], source

        return min(able, key=preference)

    def _may_send(self, rank: int) -> bool:
        return self.use.sends[rank] + self.size <= self.budget.sends

    def _closes_ring(self, slot: int, source: int) -> bool:
        """Whether copying `source` to `slot` closes a ring of copies, which takes a save."""
        walk: int | None = source
        while walk is not None and walk != slot:
            walk = self.copied_from.get(walk)
        return walk == slot

    def _transfer(self, slot: int, expert: int, source: int) -> None:
        rank = self.rank_of[slot]
        if self._lands(slot):
            self.part.landings[len(self.part.transfers)] = slot
        else:
            self.use.window[rank] += self.size
        self.use.receives[rank] += self.size
        self.use.sends[self.rank_of[source]] += self.size
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
            any(self.use.window[r] + n * self.size > self.budget.window for r, n in in_window.items())
            or any(self.use.receives[r] + n * self.size > self.budget.receives for r, n in arrivals.items())
            or any(self.use.sends[r] + n * self.size > self.budget.sends for r, n in departures.items())
        ):
            return False
        if not crossing:
            self.use.window[self.rank_of[ring[0]]] += self.size
        for source, slot in reversed(hops):
            if self.rank_of[source] == self.rank_of[slot]:
                self._move(slot, self.held[source], source=source, saved=slot == ring[1])
            else:
                self._transfer(slot, self.held[source], source)
        return True
