"""Steps of a schedule, and how parts become steps once it is known which part belongs to which step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eplb_core.arrays import IntArray
from eplb_core.planning.placement import EMPTY
from eplb_core.planning.plan import RearrangementPlan
from eplb_core.scheduling.batches import Parts
from eplb_core.scheduling.copy_order import CopyOrder

SLOT, WINDOW = 0, 1
"""The kinds of a copy's source and destination."""


class Transfers:
    """Names of the columns of `Step.transfers`; `PLACE` is a slot, or an offset in the window, as `KIND` says."""

    LAYER, EXPERT, SRC_RANK, SRC_SLOT, DST_RANK, KIND, PLACE = range(7)


class Copies:
    """Names of the columns of `Step.copies`."""

    RANK, LAYER, LEVEL, SRC_KIND, SRC_PLACE, DST_KIND, DST_PLACE = range(7)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step of a schedule, as int64 arrays. Slots are local to their rank, except in `changes`.

    Attributes:
        transfers: `[T, 7]`: layer, expert, source rank, source slot, destination rank, kind of destination,
            destination, as `Transfers` names them. Kinds as in `copies`. Both sides of a pair of ranks see its
            transfers in this order.
        copies: `[C, 7]`: rank, layer, level, kind of source, source, kind of destination, destination, as `Copies`
            names them. Kind 0 is a slot, 1 a byte offset in the rank's window. Sorted by rank and level. Copies of one
            level and rank do not overwrite what another of them reads. Level 0 only saves slots into the window.
        changes: `[K, 3]`: layer, slot counted over all ranks, the expert that it holds after the step or -1. Slots
            that a later step receives into become empty in an earlier one.
        staged_bytes: `[num_ranks]`, the bytes of the window that the step uses.
        finished_layers: `[F]`, the layers that are as the new placement says after the step, and were not before.
    """

    transfers: IntArray
    copies: IntArray
    changes: IntArray
    staged_bytes: IntArray
    finished_layers: IntArray

    @property
    def layers(self) -> IntArray:
        """The layers that the step touches, sorted."""
        return np.unique(self.changes[:, 0])

    def apply(self, placement: IntArray) -> IntArray:
        """Return the placement `[num_layers, num_slots]` after the step, given the one before."""
        after = placement.copy()
        after[self.changes[:, 0], self.changes[:, 1]] = self.changes[:, 2]
        return after


def make_steps(
    plan: RearrangementPlan, parts: Parts, order: CopyOrder, aligned: IntArray, step: IntArray
) -> list[Step]:
    """Assign places in the windows, and divide everything into steps."""
    if not len(step):
        return []
    num_steps, num_ranks = int(step.max()) + 1, plan.num_ranks
    part, expert, src_rank, src_slot, dst_rank, lands_in = parts.transfers.T
    move_part, rank, slot, moved, transfer, source = parts.moves.T
    saved = np.flatnonzero(order.saved)
    staged_transfer = np.flatnonzero(lands_in < 0)

    # Received experts, then saves: each starts where the one before it in its step and rank ends.
    staged_part = np.concatenate([part[staged_transfer], move_part[saved]])
    window = step[staged_part] * num_ranks + np.concatenate([dst_rank[staged_transfer], rank[saved]])
    offset, staged = _offsets(window, aligned[parts.layer[staged_part]], num_steps * num_ranks)
    destination = lands_in.copy()
    destination[staged_transfer] = offset[: len(staged_transfer)]
    save_offset = np.full(len(rank), -1, dtype=np.int64)
    save_offset[saved] = offset[len(staged_transfer) :]

    kind = np.where(lands_in < 0, WINDOW, SLOT)
    transfers = [parts.layer[part], expert, src_rank, src_slot, dst_rank, kind, destination]

    # Copies: the saves, then one for each move, but for those whose expert lands in its slot.
    received_kind, received_at = np.append(kind, WINDOW)[transfer], np.append(destination, 0)[transfer]  # -1: appended
    read_kind = np.where(transfer >= 0, received_kind, np.where(order.saved, WINDOW, SLOT))
    read_at = np.where(transfer >= 0, received_at, np.where(order.saved, save_offset, source))
    copied = np.flatnonzero((transfer < 0) | (received_kind != SLOT) | (received_at != slot))
    move = np.concatenate([saved, copied])
    is_save = np.arange(len(move)) < len(saved)
    layer = parts.layer[move_part]
    copy_step, copy_level = step[move_part[move]], np.where(is_save, 0, order.level[move])
    # Sorted by step, rank, level, layer and slot as one number, which is several times as fast as one after the other.
    # Saves are in the order of the window already.
    key = (copy_step * num_ranks + rank[move]) * (int(copy_level.max(initial=0)) + 1) + copy_level
    key = (key * plan.num_layers + layer[move]) * plan.slots_per_rank + np.where(is_save, 0, slot[move])
    sequence = np.argsort(key, kind="stable")
    move, is_save = move[sequence], is_save[sequence]
    copies = [
        rank[move],
        layer[move],
        copy_level[sequence],
        np.where(is_save, SLOT, read_kind[move]),
        np.where(is_save, source[move], read_at[move]),
        np.where(is_save, WINDOW, SLOT),
        np.where(is_save, save_offset[move], slot[move]),
    ]

    last = np.append(np.diff(parts.layer) != 0, True)  # the last part of its layer: emptied slots change with it
    last_part = np.full(plan.num_layers, -1, dtype=np.int64)
    last_part[parts.layer[last]] = np.flatnonzero(last)
    cleared_layer, cleared_slot = np.nonzero((plan.old != EMPTY) & (plan.new == EMPTY))
    vacated_part, vacated_slot = parts.vacated.T
    changes = [
        np.concatenate([layer, cleared_layer, parts.layer[vacated_part]]),
        np.concatenate([rank * plan.slots_per_rank + slot, cleared_slot, vacated_slot]),
        np.concatenate([moved, np.full(len(cleared_layer) + len(vacated_part), EMPTY)]),
    ]
    change_step = step[np.concatenate([move_part, last_part[cleared_layer], vacated_part])]

    by_step = zip(
        _split(transfers, step[part], num_steps),
        _split(copies, copy_step[sequence], num_steps),
        _split(changes, change_step, num_steps),
        staged.reshape(num_steps, num_ranks),
        _split([parts.layer[last]], step[last], num_steps),
        strict=True,
    )
    return [
        Step(moved_across, copied_here, changed, staged_bytes, finished[:, 0])
        for moved_across, copied_here, changed, staged_bytes, finished in by_step
    ]


def _offsets(window: IntArray, size: IntArray, num_windows: int) -> tuple[IntArray, IntArray]:
    """Lay things out one after the other in numbered windows.

    Returns:
        `[n]`, the offset of each, and `[num_windows]`, the bytes used of each window.
    """
    by_window = np.argsort(window, kind="stable")
    end = np.cumsum(size[by_window])
    total = np.zeros(num_windows, dtype=np.int64)
    np.add.at(total, window, size)
    offset = np.empty(len(window), dtype=np.int64)
    offset[by_window] = end - size[by_window] - (np.cumsum(total) - total)[window[by_window]]
    return offset, total


def _split(columns: Sequence[IntArray], step: IntArray, num_steps: int) -> list[IntArray]:
    """Return the rows of each step, in their order."""
    if not (step[1:] >= step[:-1]).all():
        by_step = np.argsort(step.astype(np.min_scalar_type(num_steps)), kind="stable")  # small numbers sort faster
        columns = [column[by_step] for column in columns]
    rows = np.stack(columns).T  # whoever reads rows reads columns first: they lie together
    return np.split(rows, np.cumsum(np.bincount(step, minlength=num_steps))[:-1])
