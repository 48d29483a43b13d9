"""Where the experts of one layer are while it is cut into parts, and which slots may be overwritten.

`eplb_core.scheduling.split_layer` says in which order the parts are made, `eplb_core.scheduling.cycles` what happens to
slots that wait for one another. What is asked for every slot in every part is kept up to date instead of searched: the
spare copies of each expert, the slots that hold it, and those that still need it.
"""

from __future__ import annotations

from itertools import chain

from eplb_core.planning.placement import EMPTY
from eplb_core.scheduling.layer import MOVE_COLUMNS, Budget, LayerMoves, LayerTask, Use


class LayerState:
    """Where the experts of a layer are before the part that is being made, and what the part has used so far.

    Attributes:
        held: slot -> its expert when the part begins.
        holders: expert -> the slots that hold it when the part begins.
        spare: expert -> how many more slots hold it when the part has ended, as far as it is made, than must be left,
            which is one if the new placement needs the expert. No slot of an expert without a spare copy may be
            overwritten, which is most of them. Empty slots count as spare copies of `EMPTY`.
        pending: the slots that get another expert in this part or later, interleaved by rank, so that a part spreads
            over the ranks; in place, those that have got it already are among them.
        num_pending: how many slots still get another expert.
        empty: those of `pending` that are empty when the part begins.
        look_everywhere: whether any slot may be one that may be overwritten. In place every part gives up all that may
            be, so later only those can be new whose expert has moved in this part, or has come by in the last one.
        passed: slots that got an expert in the last part which is not theirs.
        waits: slot -> whether it is pending, and was not overwritten or given up in this part.
        targets: expert -> the slots that still get it.
        left: rank -> the bytes that its slots still get, in all layers that share the list.
        moved: the experts that a slot still gets, of those that have moved since cycles were looked for; None if cycles
            may be anywhere.
        waits_for_cycles: whether the last part had nothing of this layer, and not for want of budget: then only turning
            a cycle changes that.
        parts: what was made so far.
    """

    def __init__(self, task: LayerTask, left: list[int], *, in_place: bool) -> None:
        self.held = held = list(task.old)
        self.new = new = task.new
        self.size = size = task.expert_bytes
        places = task.places
        self.num_ranks, self.rank_of, self.node_of = places.num_ranks, places.rank_of, places.node_of
        self.levels = places.levels
        self.several_nodes = len(places.levels) > 1
        self.planned_source = task.planned_source
        self.relay = task.relay
        self.in_place = in_place
        self.parts = LayerMoves()
        self.num_transfers = 0
        self.moved: list[int] | None = None
        self.waits_for_cycles = False

        holders: dict[int, list[int]] = {EMPTY: []}
        for slot, expert in enumerate(held):
            if expert in holders:
                holders[expert].append(slot)
            else:
                holders[expert] = [slot]
        self.holders = holders
        needed = set(new) - {EMPTY}
        self.spare = {expert: len(slots) - (expert in needed) for expert, slots in holders.items()}

        self.waits = waits = [after != EMPTY and after != before for before, after in zip(held, new, strict=True)]
        self.pending = [slot for slot in places.in_turn if waits[slot]]
        self.num_pending = len(self.pending)
        self.look_everywhere = True
        self.passed: list[int] = []
        self.empty = [slot for slot in self.pending if held[slot] == EMPTY] if holders[EMPTY] else []
        self.targets: dict[int, list[int]] = {expert: [] for expert in holders}
        for slot in self.pending:
            self.targets[new[slot]].append(slot)
        per_rank = len(held) // self.num_ranks
        self._copies_on_ranks = self._any_on_its_rank(per_rank)
        self.left = left
        for rank in range(self.num_ranks):
            left[rank] += size * sum(waits[rank * per_rank : (rank + 1) * per_rank])

    def _any_on_its_rank(self, per_rank: int) -> bool:
        """Whether a slot gets an expert that its rank has in another slot, or that another slot of it gets too."""
        wanted = [(slot // per_rank, self.new[slot]) for slot in self.pending]
        here = set(wanted)
        held = {(slot // per_rank, expert) for slot, expert in enumerate(self.held)}
        return len(here) < len(wanted) or not here.isdisjoint(held)

    def begin_part(self, budget: Budget, use: Use) -> None:
        """Begin a part within what `budget` leaves of `use`, which other layers may share."""
        self.budget, self.use = budget, use
        self.staged_limit = budget.window
        self.waits_for_cycles = self.lacks_budget = False
        self.first_move, self.first_vacated = len(self.parts.moves), len(self.parts.vacated)
        self.copied_from: dict[int, int] = {}  # slot -> the slot of the same rank that it is copied from
        self.brought: dict[int, int] = {}  # expert * num_ranks + rank that gets it -> transfer, -1 if it is copied
        self.brought_to_node: set[tuple[int, int]] = set()  # (node, expert), where there is more than one
        self.passing: list[int] = []  # slots that get an expert which is not theirs

    def fill_empty(self) -> None:
        """Fill the slots that are empty."""
        self._overwrite(self.empty, follow=False)

    def overwrite(self, staged_limit: int | None = None) -> None:
        """Overwrite slots that may be, as long as no more than `staged_limit` bytes of the window are used.

        In turn, then those that held what was brought elsewhere, and so on along the chains.
        """
        if staged_limit is not None:
            self.staged_limit = staged_limit
        if self.staged_limit < self.size and not self._copies_on_ranks:
            return  # nothing may land in the window, and nothing is on its rank already
        self._overwrite(self._candidates(), follow=True)

    def vacate(self) -> None:
        """Give up the slots that may be overwritten, for the next part to fill."""
        held, spare, waits, targets = self.held, self.spare, self.waits, self.targets
        vacated = self.parts.vacated
        for slot in self._candidates():
            expert = held[slot]
            if spare[expert] and waits[slot] and expert != EMPTY and (not targets[expert] or self.stays(slot, expert)):
                vacated.append(slot)
                waits[slot] = False
                spare[expert] -= 1
        spare[EMPTY] += len(vacated) - self.first_vacated
        self.look_everywhere = False

    def _candidates(self) -> list[int]:
        """Return the slots that may have become free to be overwritten, in a list of its own."""
        if self.look_everywhere:
            return self.pending.copy()
        moved = dict.fromkeys(self.parts.moves[self.first_move + 1 :: MOVE_COLUMNS])
        return [*self.passed, *chain.from_iterable(map(self.holders.__getitem__, moved))]

    def end_part(self, step: int) -> bool:
        """Take the part's moves as done in `step`, and return whether there were any."""
        held, holders, targets, waits = self.held, self.holders, self.targets, self.waits
        moved = [] if self.moved is None else self.moved
        moves = self.parts.moves[self.first_move :]
        vacated = self.parts.vacated[self.first_vacated :]
        if not moves and not vacated:
            self.waits_for_cycles = not self.lacks_budget
            return False
        for slot, expert in zip(moves[::MOVE_COLUMNS], moves[1::MOVE_COLUMNS], strict=True):
            before = held[slot]
            if before != EMPTY:
                holders[before].remove(slot)
            holders[expert].append(slot)
            held[slot] = expert
            if targets[expert]:
                moved.append(expert)
            if targets[before]:
                moved.append(before)
        for slot in vacated:
            before = held[slot]
            holders[before].remove(slot)
            held[slot] = EMPTY
            waits[slot] = True
            if targets[before]:
                moved.append(before)
        for slot in self.passing:
            waits[slot] = True
        self.passed = self.passing
        if self.look_everywhere:
            self.pending = [slot for slot in self.pending if waits[slot]]
        unfilled = any(map(waits.__getitem__, self.empty))
        self.empty = [slot for slot in self.pending if held[slot] == EMPTY] if unfilled else vacated
        self.parts.ends.append((step, len(moves) // MOVE_COLUMNS, len(vacated)))
        return True

    def moved_experts(self) -> list[int] | None:
        """Return `moved` with what has moved in this part."""
        if self.moved is None:
            return None
        moves, held, targets = self.parts.moves[self.first_move :], self.held, self.targets
        moved = [*moves[1::MOVE_COLUMNS], *map(held.__getitem__, moves[::MOVE_COLUMNS])]
        return self.moved + [expert for expert in moved if targets[expert]]

    # --- slots that may be overwritten --------------------------------------------------------------------------------

    def stays(self, slot: int, expert: int) -> bool:
        """Whether every rank and node that still needs `expert` and has it in `slot` has another copy of it."""
        for place in self.levels:
            here = place[slot]
            for target in self.targets[expert]:
                if place[target] == here:
                    break
            else:
                continue  # not needed at this place
            for copy in self.holders[expert]:
                if copy != slot and place[copy] == here and not self._is_overwritten(copy):
                    break
            else:
                if place is self.rank_of:
                    if expert * self.num_ranks + here not in self.brought:
                        return False
                elif (here, expert) not in self.brought_to_node:
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
        held, new, holders, spare, waits = self.held, self.new, self.holders, self.spare, self.waits
        targets, rank_of, left, size = self.targets, self.rank_of, self.left, self.size
        brought, copied_from, moves, stays = self.brought, self.copied_from, self.parts.moves, self.stays
        in_place, relay, several_nodes = self.in_place, self.relay, self.several_nodes
        num_ranks, node_of = self.num_ranks, self.node_of
        window, sends, receives = self.use.window, self.use.sends, self.use.receives
        most_staged, most_saved = self.staged_limit - size, self.budget.window - size
        most_sent, most_received = self.budget.sends - size, self.budget.receives - size
        number, num_pending = self.num_transfers, self.num_pending
        for slot in slots:
            before = held[slot]
            if not spare[before] or not waits[slot] or (targets[before] and not stays(slot, before)):
                continue
            expert, rank = new[slot], rank_of[slot]
            source, lands = -1, 0
            arrival = expert * num_ranks + rank
            transfer = brought.get(arrival, -1)
            if transfer < 0:
                copies = holders[expert]
                source = copies[0] if len(copies) == 1 else self._best_source(slot, expert)
                if source < 0:
                    self.lacks_budget = True
                    continue
                sender = rank_of[source]
                if sender == rank:
                    if source in copied_from and self._closes_ring(slot, source):
                        if window[rank] > most_saved:
                            self.lacks_budget = True
                            continue
                        window[rank] += size
                    else:
                        copied_from[slot] = source
                    brought[arrival] = -1
                else:
                    lands = int(in_place and before == EMPTY)
                    if (
                        (window[rank] > most_staged and not lands)
                        or receives[rank] > most_received
                        or sends[sender] > most_sent
                        or (relay and self._awaits_relay(slot, expert))
                    ):
                        # A limit below one expert is there to stay; any other may leave room in the next part.
                        self.lacks_budget = self.lacks_budget or lands == 1 or most_staged >= 0
                        continue
                    if not lands:
                        window[rank] += size
                    receives[rank] += size
                    sends[sender] += size
                    brought[arrival] = transfer = number
                    number += 1
                if several_nodes:
                    self.brought_to_node.add((node_of[slot], expert))
            moves += (slot, expert, source, transfer, lands)
            waits[slot] = False
            spare[before] -= 1
            spare[expert] += 1
            targets[expert].remove(slot)
            left[rank] -= size
            num_pending -= 1
            if follow:
                slots += holders[expert]
        self.num_transfers, self.num_pending = number, num_pending

    def _best_source(self, slot: int, expert: int) -> int:
        """Return the slot to read `expert` from for `slot`, or -1 if all ranks that could send it may send no more."""
        rank_of, copies = self.rank_of, self.holders[expert]
        rank = rank_of[slot]
        here = [copy for copy in copies if rank_of[copy] == rank]
        if here:
            return here[0] if len(here) == 1 else min(here, key=lambda copy: (self._is_overwritten(copy), copy))
        able, sends, most = copies, self.use.sends, self.budget.sends - self.size
        if self.several_nodes:
            node_of = self.node_of
            able = [copy for copy in copies if node_of[copy] == node_of[slot]] or copies
        able = [copy for copy in able if sends[rank_of[copy]] <= most]
        if len(able) < 2:
            return able[0] if able else -1
        planned = self.planned_source.get(expert * self.num_ranks + rank)
        preferred = [copy for copy in able if rank_of[copy] == planned]
        return min(preferred) if preferred else min(able, key=lambda copy: (sends[rank_of[copy]], copy))

    def _is_overwritten(self, slot: int) -> bool:
        """Whether a slot was overwritten or given up in this part."""
        return not self.waits[slot] and self.held[slot] != self.new[slot] != EMPTY

    def _awaits_relay(self, slot: int, expert: int) -> bool:
        """Whether the node of `slot` has no copy of `expert`, but gets one in this part."""
        node_of = self.node_of
        node = node_of[slot]
        return (node, expert) in self.brought_to_node and all(node_of[copy] != node for copy in self.holders[expert])

    def _closes_ring(self, slot: int, source: int) -> bool:
        """Whether copying `source` to `slot` closes a ring of copies, which takes a save."""
        walk: int | None = source
        while walk is not None and walk != slot:
            walk = self.copied_from.get(walk)
        return walk == slot

    # --- moves of any expert ------------------------------------------------------------------------------------------

    def transfer(self, slot: int, expert: int, source: int) -> None:
        """Move `expert` into `slot`, which is not empty, from a slot of another rank."""
        rank_of, use, size = self.rank_of, self.use, self.size
        rank = rank_of[slot]
        use.window[rank] += size
        use.receives[rank] += size
        use.sends[rank_of[source]] += size
        self.brought[expert * self.num_ranks + rank] = self.num_transfers
        self._move(slot, expert, source, self.num_transfers)
        self.num_transfers += 1

    def copy(self, slot: int, expert: int, source: int, *, saved: bool) -> None:
        """Move `expert` into `slot`, which is not empty, from a slot of the same rank."""
        if not saved:
            self.copied_from[slot] = source
        self.brought.setdefault(expert * self.num_ranks + self.rank_of[slot], -1)
        self._move(slot, expert, source, -1)

    def _move(self, slot: int, expert: int, source: int, transfer: int) -> None:
        """Do what `_overwrite` does for a move, for any expert."""
        self.parts.moves += (slot, expert, source, transfer, 0)
        self.brought_to_node.add((self.node_of[slot], expert))
        self.waits[slot] = False
        before = self.held[slot]
        self.spare[before] -= 1
        self.spare[expert] += 1
        if expert == self.new[slot]:
            self.targets[expert].remove(slot)
            self.left[self.rank_of[slot]] -= self.size
            self.num_pending -= 1
        else:
            self.passing.append(slot)
            self._copies_on_ranks = True  # the rank needs it in another slot
