"""Where the experts of one layer are while it is cut into parts, and which slots may be overwritten.

`eplb_core.layer_cut` says in which order the parts are made, `eplb_core.layer_cycles` what happens to slots that wait
for one another. What is asked for every slot in every part is kept up to date instead of searched: the spare copies of
each expert, the slots that hold it, and those that still need it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from eplb_core.placement import EMPTY


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


class Use:
    """What each rank uses in one step, in bytes; lists by rank, see `Budget`."""

    __slots__ = ("receives", "sends", "window")

    def __init__(self, num_ranks: int) -> None:
        self.window = [0] * num_ranks
        self.sends = [0] * num_ranks
        self.receives = [0] * num_ranks


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


class LayerState:
    """Where the experts of a layer are before the part that is being made, and what the part has used so far.

    Attributes:
        held: slot -> its expert when the part begins.
        holders: expert -> the slots that hold it when the part begins.
        after: expert -> the slots that hold it when the part has ended, as far as it is made.
        spare: expert -> how many of `after` are more than what must be left, which is one if the new placement needs
            the expert. No slot of an expert without a spare copy may be overwritten, which is most of them. Empty slots
            count as spare copies of `EMPTY`.
        pending: slots that still get another expert.
        targets: expert -> those of `pending` that get it.
        left: rank -> how many of `pending` are its own.
        overwritten: slot -> its expert after the part.
    """

    def __init__(self, task: LayerTask, *, in_place: bool) -> None:
        self.held = held = list(task.old)
        self.new = new = task.new
        self.size = task.expert_bytes
        num_ranks = len(task.node_of_rank)
        self.per_rank = per_rank = len(held) // num_ranks
        self.rank_of = [rank for rank in range(num_ranks) for _ in range(per_rank)]
        self.node_of = [node for node in task.node_of_rank for _ in range(per_rank)]
        self.planned_source = task.planned_source
        self.places = [self.rank_of, self.node_of] if len(set(task.node_of_rank)) > 1 else [self.rank_of]
        self.relay = task.relay
        self.in_place = in_place

        # Interleaved by rank, so that a part spreads over the ranks.
        by_local_slot = (slot for local in range(per_rank) for slot in range(local, len(held), per_rank))
        self.pending = {slot: None for slot in by_local_slot if new[slot] != held[slot] and new[slot] != EMPTY}
        self.left = [0] * num_ranks
        self.targets: dict[int, dict[int, None]] = defaultdict(dict)
        for slot in self.pending:
            self.targets[new[slot]][slot] = None
            self.left[self.rank_of[slot]] += 1
        self.holders: dict[int, list[int]] = defaultdict(list, {EMPTY: []})
        for slot, expert in enumerate(held):
            self.holders[expert].append(slot)
        self.after = {expert: slots.copy() for expert, slots in self.holders.items()}
        self.needed = set(new) - {EMPTY}
        self.spare = {expert: len(slots) - (expert in self.needed) for expert, slots in self.holders.items()}

    def begin_part(self, budget: Budget, use: Use) -> None:
        """Begin a part within what `budget` leaves of `use`, which other layers may share."""
        self.budget, self.use = budget, use
        self.staged_limit = budget.window
        self.part = LayerPart()
        self.overwritten: dict[int, int] = {}
        self.copied_from: dict[int, int] = {}  # slot -> the slot of the same rank that it is copied from
        self.arriving: dict[tuple[int, int], int] = {}  # (rank, expert) -> transfer
        self.arriving_on_node: set[tuple[int, int]] = set()  # (node, expert)

    def fill_empty(self) -> None:
        """Fill the slots that are empty."""
        held = self.held
        for slot in [slot for slot in self.pending if held[slot] == EMPTY]:
            self._bring(slot, self.new[slot])

    def overwrite(self, staged_limit: int | None = None) -> None:
        """Overwrite slots that may be, as long as no more than `staged_limit` bytes of the window are used.

        In turn, then those that held what was brought elsewhere, and so on along the chains.
        """
        if staged_limit is not None:
            self.staged_limit = staged_limit
        held, spare, new, pending, overwritten = self.held, self.spare, self.new, self.pending, self.overwritten
        freed: deque[int] = deque()
        for slot in list(pending):
            if spare[held[slot]] and slot not in overwritten and self.may_overwrite(slot):
                expert = new[slot]
                if self._bring(slot, expert):
                    freed.extend(self.holders[expert])
        while freed:
            slot = freed.popleft()
            if slot in pending and slot not in overwritten and self.may_overwrite(slot):
                expert = new[slot]
                if self._bring(slot, expert):
                    freed.extend(self.holders[expert])

    def vacate(self) -> None:
        """Give up the slots that may be overwritten, for the next part to fill."""
        held, spare, overwritten = self.held, self.spare, self.overwritten
        for slot in self.pending:
            expert = held[slot]
            if spare[expert] and expert != EMPTY and slot not in overwritten and self.may_overwrite(slot):
                self.part.vacated.append(slot)
                self.after[expert].remove(slot)
                spare[expert] -= 1
                spare[EMPTY] += 1
                overwritten[slot] = EMPTY

    def end_part(self) -> LayerPart:
        """Take the part's moves as done, and return it."""
        held = self.held
        changed = set()
        for slot, expert in self.overwritten.items():
            before = held[slot]
            changed.add(expert)
            changed.add(before)
            held[slot] = expert
        changed.discard(EMPTY)
        for expert in changed:
            self.holders[expert] = self.after[expert].copy()
        return self.part

    # --- slots that may be overwritten --------------------------------------------------------------------------------

    def may_overwrite(self, slot: int) -> bool:
        """Whether the slot's expert stays where it is needed when this slot is overwritten."""
        expert = self.held[slot]
        if not self.spare[expert]:
            return False
        targets = self.targets.get(expert)
        if not targets or expert not in self.needed:
            return True
        copies = self.after[expert]
        for place in self.places:
            here = place[slot]
            for target in targets:
                if place[target] == here:
                    break
            else:
                continue  # not needed at this place
            for copy in copies:
                if place[copy] == here and copy != slot:
                    break
            else:
                return False
        return True

    def _bring(self, slot: int, expert: int) -> bool:
        """Move `expert` into `slot` from wherever is best, or return False if the budget does not allow it."""
        rank_of = self.rank_of
        rank = rank_of[slot]
        transfer = self.arriving.get((rank, expert))
        if transfer is not None:
            self.move(slot, expert, transfer=transfer)
            return True
        here = [source for source in self.holders[expert] if rank_of[source] == rank]
        if here:
            source = min(here, key=lambda source: (source in self.overwritten, source))
            closes_ring = self._closes_ring(slot, source)
            if closes_ring:
                if self.use.window[rank] + self.size > self.budget.window:
                    return False
                self.use.window[rank] += self.size
            self.move(slot, expert, source=source, saved=closes_ring)
            return True
        best = self._best_source(expert, slot)
        if best is None:
            return False
        self.transfer(slot, expert, best)
        return True

    def _best_source(self, expert: int, slot: int) -> int | None:
        """Return the slot to read `expert` from for `slot`, or None if it has to wait for the next part."""
        rank_of, node_of = self.rank_of, self.node_of
        rank, use, size = rank_of[slot], self.use, self.size
        if use.window[rank] + size > self.staged_limit and not self._lands(slot):
            return None
        if use.receives[rank] + size > self.budget.receives:
            return None
        able = holders = self.holders[expert]
        if len(self.places) > 1:
            node = node_of[slot]
            able = [source for source in holders if node_of[source] == node]
            if not able and self.relay and (node, expert) in self.arriving_on_node:
                return None
        most = self.budget.sends - size
        able = [source for source in able or holders if use.sends[rank_of[source]] <= most]
        if len(able) < 2:
            return able[0] if able else None
        planned = self.planned_source.get((expert, rank))

        def preference(source: int) -> tuple[bool, int, int]:
            return rank_of[source] != planned, use.sends[rank_of[source]], source

        return min(able, key=preference)

    def _lands(self, slot: int) -> bool:
        """Whether what crosses for `slot` is received into it, not into the window."""
        return self.in_place and self.held[slot] == EMPTY

    def _closes_ring(self, slot: int, source: int) -> bool:
        """Whether copying `source` to `slot` closes a ring of copies, which takes a save."""
        walk: int | None = source
        while walk is not None and walk != slot:
            walk = self.copied_from.get(walk)
        return walk == slot

    # --- moves --------------------------------------------------------------------------------------------------------

    def transfer(self, slot: int, expert: int, source: int) -> None:
        """Move `expert` into `slot` from a slot of another rank."""
        rank, use, part, size = self.rank_of[slot], self.use, self.part, self.size
        number = len(part.transfers)
        if self._lands(slot):
            part.landings[number] = slot
        else:
            use.window[rank] += size
        use.receives[rank] += size
        use.sends[self.rank_of[source]] += size
        self.arriving[rank, expert] = number
        if self.relay:
            self.arriving_on_node.add((self.node_of[slot], expert))
        part.transfers.append((expert, source, rank))
        self.move(slot, expert, transfer=number)

    def move(self, slot: int, expert: int, *, transfer: int = -1, source: int = -1, saved: bool = False) -> None:
        """Move `expert` into `slot` out of a transfer of this part, or from a slot of the same rank."""
        self.part.moves.append((slot, expert, transfer, source))
        if source >= 0 and not saved:
            self.copied_from[slot] = source
        self.overwritten[slot] = expert
        before = self.held[slot]
        if before != EMPTY:
            self.after[before].remove(slot)
        self.after[expert].append(slot)
        self.spare[before] -= 1
        self.spare[expert] += 1
        if expert == self.new[slot]:
            del self.pending[slot]
            del self.targets[expert][slot]
            self.left[self.rank_of[slot]] -= 1
