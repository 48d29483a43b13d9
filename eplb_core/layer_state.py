"""Where the experts of one layer are while it is cut into parts, and which slots may be overwritten.

`eplb_core.layer_cut` says in which order the parts are made, `eplb_core.layer_cycles` what happens to slots that wait
for one another. What is asked for every slot in every part is kept up to date instead of searched: the spare copies of
each expert, the slots that hold it, and those that still need it.
"""

from __future__ import annotations

from eplb_core.layer_task import MOVE_COLUMNS, Budget, LayerParts, LayerTask, Use
from eplb_core.placement import EMPTY


class LayerState:
    """Where the experts of a layer are before the part that is being made, and what the part has used so far.

    Attributes:
        held: slot -> its expert when the part begins.
        holders: expert -> the slots that hold it when the part begins.
        after: expert -> the slots that hold it when the part has ended, as far as it is made.
        spare: expert -> how many of `after` are more than what must be left, which is one if the new placement needs
            the expert. No slot of an expert without a spare copy may be overwritten, which is most of them. Empty slots
            count as spare copies of `EMPTY`.
        pending: the slots that get another expert in this part or later, interleaved by rank, so that a part spreads
            over the ranks.
        waits: slot -> whether it is pending, and was not overwritten in this part.
        targets: expert -> the slots that still get it.
        left: rank -> the bytes that its slots still get.
        parts: what was made so far.
    """

    def __init__(self, task: LayerTask, *, in_place: bool) -> None:
        self.held = held = list(task.old)
        self.new = new = task.new
        self.size = size = task.expert_bytes
        self.places = task.places
        self.planned_source = task.planned_source
        self.relay = task.relay
        self.in_place = in_place
        self.parts = LayerParts()
        self.num_transfers = 0

        holders: dict[int, list[int]] = {EMPTY: []}
        for slot, expert in enumerate(held):
            if expert in holders:
                holders[expert].append(slot)
            else:
                holders[expert] = [slot]
        self.holders = holders
        self.after = {expert: slots.copy() for expert, slots in holders.items()}
        self.spare = {expert: len(slots) for expert, slots in holders.items()}
        for expert in set(new):
            if expert != EMPTY:
                self.spare[expert] -= 1

        self.waits = waits = [new[slot] != held[slot] and new[slot] != EMPTY for slot in range(len(held))]
        self.pending = [slot for slot in task.places.in_turn if waits[slot]]
        self.left = [0] * task.places.num_ranks
        self.targets: dict[int, list[int]] = {expert: [] for expert in holders}
        for slot in self.pending:
            self.targets[new[slot]].append(slot)
            self.left[task.places.rank_of[slot]] += size

    def begin_part(self, budget: Budget, use: Use) -> None:
        """Begin a part within what `budget` leaves of `use`, which other layers may share."""
        self.budget, self.use = budget, use
        self.staged_limit = budget.window
        self.first_move, self.first_vacated = len(self.parts.moves), len(self.parts.vacated)
        self.copied_from: dict[int, int] = {}  # slot -> the slot of the same rank that it is copied from
        self.arriving: dict[int, dict[int, int]] = {}  # expert -> rank -> transfer
        self.passing: list[int] = []  # slots that get an expert which is not theirs

    def fill_empty(self) -> None:
        """Fill the slots that are empty."""
        held = self.held
        self._overwrite([slot for slot in self.pending if held[slot] == EMPTY], follow=False)

    def overwrite(self, staged_limit: int | None = None) -> None:
        """Overwrite slots that may be, as long as no more than `staged_limit` bytes of the window are used.

        In turn, then those that held what was brought elsewhere, and so on along the chains.
        """
        if staged_limit is not None:
            self.staged_limit = staged_limit
        self._overwrite(self.pending.copy(), follow=True)

    def vacate(self) -> None:
        """Give up the slots that may be overwritten, for the next part to fill."""
        held, spare, waits, targets, after = self.held, self.spare, self.waits, self.targets, self.after
        vacated = self.parts.vacated
        for slot in self.pending:
            expert = held[slot]
            if spare[expert] and waits[slot] and expert != EMPTY and (not targets[expert] or self.stays(slot, expert)):
                vacated.append(slot)
                after[expert].remove(slot)
                spare[expert] -= 1
        spare[EMPTY] += len(vacated) - self.first_vacated

    def end_part(self, step: int) -> bool:
        """Take the part's moves as done in `step`, and return whether there were any."""
        held, new, holders, waits = self.held, self.new, self.holders, self.waits
        moves = self.parts.moves[self.first_move :]
        vacated = self.parts.vacated[self.first_vacated :]
        if not moves and not vacated:
            return False
        # The same as happened to `after`, in the same order.
        for slot, expert in zip(moves[::MOVE_COLUMNS], moves[1::MOVE_COLUMNS], strict=True):
            before = held[slot]
            if before != EMPTY:
                holders[before].remove(slot)
            holders[expert].append(slot)
            held[slot] = expert
        for slot in vacated:
            holders[held[slot]].remove(slot)
            held[slot] = EMPTY
        self.pending = [slot for slot in self.pending if held[slot] != new[slot]]
        for slot in self.passing:
            waits[slot] = True
        self.parts.ends.append((step, len(moves) // MOVE_COLUMNS, len(vacated)))
        return True

    # --- slots that may be overwritten --------------------------------------------------------------------------------

    def may_overwrite(self, slot: int) -> bool:
        """Whether the slot's expert stays where it is needed when this slot is overwritten."""
        expert = self.held[slot]
        return self.spare[expert] > 0 and (not self.targets[expert] or self.stays(slot, expert))

    def stays(self, slot: int, expert: int) -> bool:
        """Whether every rank and node that still needs `expert` and has it in `slot` has another copy of it."""
        targets, copies = self.targets[expert], self.after[expert]
        for place in self.places.levels:
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

    def _overwrite(self, slots: list[int], *, follow: bool) -> None:
        """Overwrite those of `slots` that may be with what they get, as far as the budget allows.

        Nearly all of the time that a schedule takes is spent here, so what is done for every slot stands in this one
        loop, and the names in it are local.

        Args:
            slots: in the order in which they are looked at; changed.
            follow: whether slots that held what was brought elsewhere are looked at as well, after the others.
        """
        held, new, holders, after, spare = self.held, self.new, self.holders, self.after, self.spare
        waits, targets, rank_of, left, size = self.waits, self.targets, self.places.rank_of, self.left, self.size
        arriving, copied_from, moves = self.arriving, self.copied_from, self.parts.moves
        in_place, relay, stays = self.in_place, self.relay, self.stays
        window, sends, receives = self.use.window, self.use.sends, self.use.receives
        most_staged, most_saved = self.staged_limit - size, self.budget.window - size
        most_sent, most_received = self.budget.sends - size, self.budget.receives - size
        number = self.num_transfers
        for slot in slots:
            before = held[slot]
            if not spare[before] or not waits[slot] or (targets[before] and not stays(slot, before)):
                continue
            expert, rank = new[slot], rank_of[slot]
            source = transfer = -1
            lands = 0
            if expert in arriving and rank in arriving[expert]:
                transfer = arriving[expert][rank]
            else:
                copies = holders[expert]
                source = copies[0] if len(copies) == 1 else self._best_source(slot, expert)
                if source < 0:
                    continue
                sender = rank_of[source]
                if sender == rank:
                    if source in copied_from and self._closes_ring(slot, source):
                        if window[rank] > most_saved:
                            continue
                        window[rank] += size
                    else:
                        copied_from[slot] = source
                else:
                    lands = int(in_place and before == EMPTY)
                    if (
                        (window[rank] > most_staged and not lands)
                        or receives[rank] > most_received
                        or sends[sender] > most_sent
                        or (relay and self._awaits_relay(slot, expert))
                    ):
                        continue
                    if not lands:
                        window[rank] += size
                    receives[rank] += size
                    sends[sender] += size
                    transfer = number
                    number += 1
                    if expert in arriving:
                        arriving[expert][rank] = transfer
                    else:
                        arriving[expert] = {rank: transfer}
            moves += (slot, expert, source, transfer, lands)
            waits[slot] = False
            if before != EMPTY:
                after[before].remove(slot)
            after[expert].append(slot)
            spare[before] -= 1
            spare[expert] += 1
            targets[expert].remove(slot)
            left[rank] -= size
            if follow:
                slots += holders[expert]
        self.num_transfers = number

    def _best_source(self, slot: int, expert: int) -> int:
        """Return the slot to read `expert` from for `slot`, or -1 if all ranks that could send it may send no more."""
        rank_of, node_of, sends = self.places.rank_of, self.places.node_of, self.use.sends
        rank, node, copies = rank_of[slot], node_of[slot], self.holders[expert]
        here = [copy for copy in copies if rank_of[copy] == rank]
        if here:
            return min(here, key=lambda copy: (self._is_overwritten(copy), copy))
        able = copies
        if len(self.places.levels) > 1:
            able = [copy for copy in copies if node_of[copy] == node] or copies
        most = self.budget.sends - self.size
        able = [copy for copy in able if sends[rank_of[copy]] <= most]
        if len(able) < 2:
            return able[0] if able else -1
        planned = self.planned_source.get((expert, rank))
        return min(able, key=lambda copy: (rank_of[copy] != planned, sends[rank_of[copy]], copy))

    def _is_overwritten(self, slot: int) -> bool:
        """Whether a slot was overwritten in this part."""
        return not self.waits[slot] and self.held[slot] != self.new[slot] != EMPTY

    def _awaits_relay(self, slot: int, expert: int) -> bool:
        """Whether the node of `slot` has no copy of `expert`, but gets one in this part."""
        rank_of, node_of = self.places.rank_of, self.places.node_of
        node, per_rank = node_of[slot], len(rank_of) // self.places.num_ranks
        return any(node_of[rank * per_rank] == node for rank in self.arriving.get(expert, ())) and all(
            node_of[copy] != node for copy in self.holders[expert]
        )

    def _closes_ring(self, slot: int, source: int) -> bool:
        """Whether copying `source` to `slot` closes a ring of copies, which takes a save."""
        walk: int | None = source
        while walk is not None and walk != slot:
            walk = self.copied_from.get(walk)
        return walk == slot

    # --- moves of any expert ------------------------------------------------------------------------------------------

    def transfer(self, slot: int, expert: int, source: int) -> None:
        """Move `expert` into `slot`, which is not empty, from a slot of another rank."""
        rank_of, use, size = self.places.rank_of, self.use, self.size
        rank = rank_of[slot]
        use.window[rank] += size
        use.receives[rank] += size
        use.sends[rank_of[source]] += size
        self.arriving.setdefault(expert, {})[rank] = self.num_transfers
        self._move(slot, expert, source, self.num_transfers)
        self.num_transfers += 1

    def copy(self, slot: int, expert: int, source: int, *, saved: bool) -> None:
        """Move `expert` into `slot`, which is not empty, from a slot of the same rank."""
        if not saved:
            self.copied_from[slot] = source
        self._move(slot, expert, source, -1)

    def _move(self, slot: int, expert: int, source: int, transfer: int) -> None:
        """Do what `_overwrite` does for a move, for any expert."""
        self.parts.moves += (slot, expert, source, transfer, 0)
        self.waits[slot] = False
        before = self.held[slot]
        self.after[before].remove(slot)
        self.after[expert].append(slot)
        self.spare[before] -= 1
        self.spare[expert] += 1
        if expert == self.new[slot]:
            self.targets[expert].remove(slot)
            self.left[self.places.rank_of[slot]] -= self.size
        else:
            self.passing.append(slot)
