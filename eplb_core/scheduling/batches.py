"""Pieces of work that are never divided: whole layers, or the parts that layers were cut into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from eplb_core.arrays import IntArray
from eplb_core.planning.plan import RearrangementPlan
from eplb_core.scheduling.copy_order import CopyOrder, order_copies
from eplb_core.scheduling.layer import MOVE_COLUMNS, LayerMoves


@dataclass(frozen=True, slots=True)
class Parts:
    """Pieces of work, each of one layer; those of one layer follow one another.

    Attributes:
        layer: `[P]`, ascending.
        transfers: `[T, 6]`: part, expert, source rank, source slot, destination rank, the slot that it lands in or -1.
        moves: `[M, 6]`: part, rank, slot, expert, transfer or -1, source slot or -1.
        vacated: `[V, 2]`: part, slot counted over all ranks.
    """

    layer: IntArray
    transfers: IntArray
    moves: IntArray
    vacated: IntArray

    def without(self, layers: IntArray) -> Parts:
        """Return those of other layers than `layers`."""
        kept = ~np.isin(self.layer, layers)
        number = np.cumsum(kept) - 1
        kept_transfers, kept_moves = kept[self.transfers[:, 0]], kept[self.moves[:, 0]]
        transfer_number = np.append(np.cumsum(kept_transfers) - 1, -1)  # the last one answers for -1, no transfer
        transfers, moves = self.transfers[kept_transfers], self.moves[kept_moves]
        vacated = self.vacated[kept[self.vacated[:, 0]]]
        for rows in (transfers, moves, vacated):
            rows[:, 0] = number[rows[:, 0]]
        moves[:, 4] = transfer_number[moves[:, 4]]
        return Parts(self.layer[kept], transfers, moves, vacated)

    def joined(self, other: Parts) -> Parts:
        """Return these and those of `other`, which are of other layers."""
        layer = np.concatenate([self.layer, other.layer])
        by_layer = np.argsort(layer, kind="stable")
        number = np.empty_like(by_layer)
        number[by_layer] = np.arange(len(layer))
        transfers = np.concatenate([self.transfers, other.transfers])
        moves = np.concatenate([self.moves, other.moves])
        vacated = np.concatenate([self.vacated, other.vacated])
        for rows, count in ((transfers, len(self.transfers)), (moves, len(self.moves)), (vacated, len(self.vacated))):
            rows[count:, 0] += len(self.layer)
            rows[:, 0] = number[rows[:, 0]]
        transfer = moves[len(self.moves) :, 4]
        transfer[transfer >= 0] += len(self.transfers)
        return Parts(layer[by_layer], transfers, moves, vacated)

    def order(self, plan: RearrangementPlan) -> CopyOrder:
        """Return the order of the copies, each part for itself."""
        rank = (self.moves[:, 0] * plan.num_ranks + self.moves[:, 1]) * plan.slots_per_rank
        source = self.moves[:, 5]
        return order_copies(rank + self.moves[:, 2], np.where(source >= 0, rank + source, -1))

    def use(self, order: CopyOrder, aligned: IntArray, num_ranks: int) -> IntArray:
        """Return what each part uses, `[P, 3 * num_ranks]`: bytes of window, sent, and received, of each rank."""
        use = np.zeros((len(self.layer), 3 * num_ranks), dtype=np.int64)
        part, _, src_rank, _, dst_rank, lands_in = self.transfers.T
        staged = lands_in < 0
        np.add.at(use, (part[staged], dst_rank[staged]), 1)
        np.add.at(use, (part, num_ranks + src_rank), 1)
        np.add.at(use, (part, 2 * num_ranks + dst_rank), 1)
        np.add.at(use, (self.moves[order.saved, 0], self.moves[order.saved, 1]), 1)
        use *= aligned[self.layer, None]
        return use


def whole_layers(plan: RearrangementPlan) -> Parts:
    """Return one part for each layer that changes, and a second one for what is relayed in it."""
    relayed = plan.transfer_after >= 0
    count = (plan.old != plan.new).any(axis=1).astype(np.int64)
    count[plan.transfer_layer[relayed]] = 2
    first = np.cumsum(count) - count
    slot = plan.move_rank * plan.slots_per_rank + plan.move_slot
    transfers = (
        first[plan.transfer_layer] + relayed,
        plan.transfer_expert,
        plan.transfer_src_rank,
        plan.transfer_src_slot,
        plan.transfer_dst_rank,
        np.full(plan.num_transfers, -1),
    )
    moves = (
        first[plan.move_layer] + np.append(relayed, False)[plan.move_transfer],  # the last one answers for -1
        plan.move_rank,
        plan.move_slot,
        plan.new[plan.move_layer, slot],
        plan.move_transfer,
        plan.move_source,
    )
    return Parts(
        np.repeat(np.arange(plan.num_layers), count),
        np.stack(transfers).T,
        np.stack(moves).T,
        np.empty((0, 2), dtype=np.int64),
    )


def without_moves(layers: IntArray) -> Parts:
    """Return one part for each of `layers`, in which slots become empty and nothing moves."""
    no_row = np.empty((0, 6), dtype=np.int64)
    return Parts(layers, no_row, no_row, np.empty((0, 2), dtype=np.int64))


def cut_layers(plan: RearrangementPlan, layers: IntArray, cuts: Sequence[LayerMoves]) -> Parts:
    """Return the parts that `layers`, ascending, were cut into."""
    num_parts = [len(cut.ends) for cut in cuts]
    _, num_moves, num_vacated = np.array([end for cut in cuts for end in cut.ends], dtype=np.int64).reshape(-1, 3).T
    part = np.repeat(np.arange(len(num_moves)), num_moves)
    slot, expert, source, transfer, lands = _table([cut.moves for cut in cuts], MOVE_COLUMNS).T
    (rank, local), (src_rank, src_slot) = np.divmod(slot, plan.slots_per_rank), np.divmod(source, plan.slots_per_rank)
    begins = np.flatnonzero((source >= 0) & (transfer >= 0))
    # The transfers of each layer are counted from 0: here they follow one another, layer by layer.
    cut_of_move = np.repeat(np.arange(len(cuts)), [len(cut.moves) // MOVE_COLUMNS for cut in cuts])
    of_cut = np.bincount(cut_of_move[begins], minlength=len(cuts))
    index = np.where(transfer >= 0, transfer + (np.cumsum(of_cut) - of_cut)[cut_of_move], -1)
    transfers = [part, expert, src_rank, src_slot, rank, np.where(lands, local, -1)]
    moves = [part, rank, local, expert, index, np.where(transfer >= 0, -1, src_slot)]
    vacated = [np.repeat(np.arange(len(num_vacated)), num_vacated), _table([cut.vacated for cut in cuts], 1)[:, 0]]
    return Parts(
        np.repeat(layers, num_parts),
        np.stack([column[begins] for column in transfers], axis=1),
        np.stack(moves, axis=1),
        np.stack(vacated, axis=1),
    )


def _table(rows: Sequence[Sequence[int]], columns: int) -> IntArray:
    """Return an array `[n, columns]` of lists of rows, one after the other."""
    return np.fromiter(chain.from_iterable(rows), np.int64, sum(map(len, rows))).reshape(-1, columns)
