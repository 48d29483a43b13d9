"""Cuts a plan into steps that fit into bounded memory, each safe to stop after.

A step is performed by all ranks together, in this order:

1. transfers: every source slot is read as it is when the step begins; what arrives lands in the receiver's window, or
   in a slot of it that was empty before the step;
2. copies of level 0: slots are saved into the window of their own rank;
3. copies of level 1, 2, ...: window -> slot and slot -> slot. A rank begins them when all ranks are done with 1.

Between steps every expert that the new placement needs has at least one copy. A relayed expert is sent on in a later
step than the one that brought it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from eplb_core.copy_order import CopyOrder, order_copies
from eplb_core.errors import PlacementError
from eplb_core.layer_cut import cut_in_place, cut_layer
from eplb_core.layer_task import MOVE_COLUMNS, Budget, LayerParts, LayerTask, Places
from eplb_core.placement import EMPTY, IntArray
from eplb_core.plan import RearrangementPlan, layer_bytes

ALIGNMENT = 256
"""Every expert in a window starts at a multiple of this many bytes; budgets count sizes rounded up to it."""

SLOT, WINDOW = 0, 1
"""The kinds of a copy's source and destination."""

_UNLIMITED = 2**62
_WORTH_SHARING = 500
"""From so many moves on, which take some 2 ms to cut, it pays to ask the other ranks."""

_LEAST_ROOM = 4
"""Experts that every group of layers has room for: with fewer, cycles are turned in more steps."""

Share = Callable[[Callable[[int], list[LayerParts]], int], list[list[LayerParts]]]
"""Returns what a function returns for each number below the second argument, in order."""
_LOOK_BACK_STEPS = 16


def in_turn(cut: Callable[[int], list[LayerParts]], groups: int) -> list[list[LayerParts]]:
    """Cut all groups in this process; a `Share`."""
    return [cut(group) for group in range(groups)]


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step of a schedule, as int64 arrays. Slots are local to their rank, except in `changes`.

    Attributes:
        transfers: `[T, 7]`: layer, expert, source rank, source slot, destination rank, kind of destination,
            destination. Kinds as in `copies`. Both sides of a pair of ranks see its transfers in this order.
        copies: `[C, 7]`: rank, layer, level, kind of source, source, kind of destination, destination. Kind 0 is a
            slot, 1 a byte offset in the rank's window. Sorted by rank and level. Copies of one level and rank do not
            overwrite what another of them reads. Level 0 only saves slots into the window.
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


def schedule_steps(
    plan: RearrangementPlan,
    expert_bytes: npt.ArrayLike,
    *,
    window_bytes: int,
    send_limit_bytes: int | None = None,
    recv_limit_bytes: int | None = None,
    max_layers_per_step: int | None = None,
    in_place_from: int | None = None,
    share: Share = in_turn,
) -> list[Step]:
    """Cut `plan` into steps, as few as a greedy packing finds, in the order in which they have to run.

    Whole layers share a step as long as the budgets allow; what is relayed in a layer follows in a later one. A layer
    that is too large for a step of its own is cut into several; that costs no additional transfer. Every step's limits
    hold for each rank. Smaller limits, or fewer layers a step, give more and smaller steps, which overlap better.

    What lands in the window is copied once more. With `in_place_from`, slots are given up (empty) as soon as their
    expert has another copy, and received into directly by later steps, if that is cheaper: each step counts like
    `in_place_from` bytes in the window of the rank that uses most.

    Args:
        plan: what has to move.
        expert_bytes: bytes of one expert, one number or `[num_layers]`. It is staged contiguously, starting at a
            multiple of `ALIGNMENT`; all limits count sizes rounded up to that.
        window_bytes: what received experts and saved slots may take together.
        send_limit_bytes: what a rank may send in a step, None for no limit.
        recv_limit_bytes: what a rank may receive in a step, None for no limit.
        max_layers_per_step: the most layers that a step may touch, None for no limit.
        in_place_from: bytes of staging that take as long as an additional step; None stages everything, as does
            `max_layers_per_step`.
        share: calls what cuts a group of layers for every group. It may leave groups to other processes, which call
            this function with the same arguments; most of the time is spent there.

    Returns:
        The steps; none if the two placements are the same.

    Raises:
        PlacementError: a limit is smaller than one expert of a layer that needs it.
    """
    sizes = layer_bytes(expert_bytes, plan.num_layers)
    aligned = -(-sizes // ALIGNMENT) * ALIGNMENT
    if max_layers_per_step is not None and max_layers_per_step < 1:
        raise PlacementError(f"a step must touch at least one layer, not {max_layers_per_step}")
    limits = {
        "window": window_bytes,
        "send limit": _UNLIMITED if send_limit_bytes is None else send_limit_bytes,
        "receive limit": _UNLIMITED if recv_limit_bytes is None else recv_limit_bytes,
    }
    whole = _whole_layers(plan)
    order = whole.order(plan)
    use = whole.use(order, aligned, plan.num_ranks)
    _check_limits(whole.layer, use, aligned, limits, plan.num_ranks)
    work = _Work(plan, whole, order, use, aligned, limits, max_layers_per_step, share)
    if in_place_from is None or max_layers_per_step is not None:
        return work.staged()
    # Both schedules cost time to make, so neither is if what is known about it shows that the other one is cheaper.
    least_staged = work.least_staged_cost(in_place_from)
    least_in_place = 2 * in_place_from  # it takes two steps at least, and more bytes than none
    staged = work.staged() if least_staged <= least_in_place else None
    if staged is not None and _cost(staged, in_place_from) <= least_in_place:
        return staged
    in_place = work.in_place(min(window_bytes, in_place_from))
    if staged is None:
        if _cost(in_place, in_place_from) < least_staged:
            return in_place
        staged = work.staged()
    return min(staged, in_place, key=lambda each: _cost(each, in_place_from))


def _cost(steps: Sequence[Step], step_bytes: int) -> int:
    """Return what steps cost, in bytes of staging."""
    return sum(step_bytes + int(step.staged_bytes.max()) for step in steps)


@dataclass(frozen=True, slots=True)
class _Work:
    """What has to be scheduled.

    Attributes:
        plan: what has to move.
        whole: the same as parts, of whole layers.
        order: the order of its copies.
        use: what its parts use, see `_Parts.use`.
        aligned: `[num_layers]`, bytes of an expert in the window.
        limits: name -> bytes a rank and step: window, sent, received.
        max_layers: the most layers of a step, None for no limit.
        share: calls what cuts a group of layers for every group.
    """

    plan: RearrangementPlan
    whole: _Parts
    order: CopyOrder
    use: IntArray
    aligned: IntArray
    limits: dict[str, int]
    max_layers: int | None
    share: Share

    def staged(self) -> list[Step]:
        """Return steps that receive everything into the window."""
        parts, order, use = self.whole, self.order, self.use
        too_large = np.unique(parts.layer[(use > self._bound).any(axis=1)])
        if len(too_large):
            budget = Budget(*self.limits.values())
            cuts = [cut_layer(task, budget) for task in _tasks(self.plan, too_large, self.aligned)]
            parts = _with_cuts(self.plan, parts, too_large, cuts)
            order = parts.order(self.plan)
            use = parts.use(order, self.aligned, self.plan.num_ranks)
        step = _pack(parts.layer, use, self._bound, self.max_layers or len(parts.layer))
        return _make_steps(self.plan, parts, order, self.aligned, step)

    def least_staged_cost(self, step_bytes: int) -> int:
        """Return what the steps of `staged` cost at least: the rank that receives most stages all of that."""
        busiest = int(self.use[:, 2 * self.plan.num_ranks :].sum(axis=0).max())
        unit = max(1, int(np.gcd.reduce(self.aligned)))  # every expert takes a multiple of this
        room = min(self.limits["window"], self.limits["receive limit"]) // unit * unit
        return -(-busiest // max(room, 1)) * step_bytes + busiest

    def in_place(self, cheap_bytes: int) -> list[Step]:
        """Return steps that receive into empty slots; each may stage `cheap_bytes` on a rank besides.

        The layers are cut in groups, which share the limits evenly, so that no group has to know of the others.
        """
        layers = np.unique(self.plan.move_layer)
        groups = np.array_split(layers, self._num_groups(layers))
        budget = Budget(*(limit // len(groups) for limit in self.limits.values()))

        def cut(group: int) -> list[LayerParts]:
            return cut_in_place(_tasks(self.plan, groups[group], self.aligned), budget, cheap_bytes // len(groups))

        share = self.share if len(groups) > 1 and self.plan.num_moves >= _WORTH_SHARING else in_turn
        cuts = [cut_up for of_group in share(cut, len(groups)) for cut_up in of_group]
        parts = _with_cuts(self.plan, self.whole, layers, cuts)
        step = np.zeros(len(parts.layer), dtype=np.int64)  # where a layer only gets empty slots
        step[np.isin(parts.layer, layers)] = [own for cut in cuts for own, _, _ in cut.ends]
        return _make_steps(self.plan, parts, parts.order(self.plan), self.aligned, step)

    def _num_groups(self, layers: IntArray) -> int:
        """Return how many groups of layers to cut: one for each rank, as far as every group can move its experts."""
        room = min(self.limits.values()) // max(1, int(self.aligned[layers].max(initial=0)))
        return max(1, min(self.plan.num_ranks, len(layers), room // _LEAST_ROOM))

    @property
    def _bound(self) -> IntArray:
        return np.repeat(np.array(list(self.limits.values()), dtype=np.int64), self.plan.num_ranks)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Pieces of work that are never divided, each of one layer; those of one layer follow one another.

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


def _whole_layers(plan: RearrangementPlan) -> _Parts:
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
    return _Parts(
        np.repeat(np.arange(plan.num_layers), count),
        np.stack(transfers, axis=1),
        np.stack(moves, axis=1),
        np.empty((0, 2), dtype=np.int64),
    )


def _check_limits(layer: IntArray, use: IntArray, aligned: IntArray, limits: dict[str, int], num_ranks: int) -> None:
    """Check that each limit holds one expert of every layer that it concerns."""
    for index, (name, limit) in enumerate(limits.items()):
        concerned = use[:, index * num_ranks : (index + 1) * num_ranks].any(axis=1)
        needed = np.where(concerned, aligned[layer], 0)
        if needed.max(initial=0) > limit:
            largest = int(needed.argmax())
            raise PlacementError(
                f"the {name} of {limit} bytes is smaller than one expert",
                where=f"layer {int(layer[largest])}",
                why=f"the smallest possible step needs {int(needed[largest])} bytes on a rank",
                remedy=f"make the {name} at least {int(needed[largest])} bytes",
            )


def _with_cuts(plan: RearrangementPlan, whole: _Parts, layers: IntArray, cuts: Sequence[LayerParts]) -> _Parts:
    """Return `whole` with the parts of `layers`, ascending, replaced by those of `cuts`."""
    is_cut_layer = np.zeros(plan.num_layers, dtype=np.bool_)
    is_cut_layer[layers] = True
    is_cut = is_cut_layer[whole.layer]
    parts_of_cut = np.array([len(cut.ends) for cut in cuts])
    count = (~is_cut).astype(np.int64)
    pieces = np.searchsorted(whole.layer, layers)
    count[pieces] = parts_of_cut
    first = np.cumsum(count) - count

    kept_moves = ~is_cut[whole.moves[:, 0]]
    kept_transfers = ~is_cut[whole.transfers[:, 0]]
    new_index = np.append(np.cumsum(kept_transfers) - 1, -1)  # the last one answers for -1, no transfer
    transfers, moves = whole.transfers[kept_transfers], whole.moves[kept_moves]
    transfers[:, 0], moves[:, 0] = first[transfers[:, 0]], first[moves[:, 0]]
    moves[:, 4] = new_index[moves[:, 4]]

    _, num_moves, num_vacated = _table((cut.ends for cut in cuts), 3).T
    own = np.flatnonzero(is_cut_layer[np.repeat(whole.layer, count)])
    part = np.repeat(own, num_moves)
    slot, expert, source, transfer, lands = _table((cut.moves for cut in cuts), MOVE_COLUMNS).T
    (rank, local), (src_rank, src_slot) = np.divmod(slot, plan.slots_per_rank), np.divmod(source, plan.slots_per_rank)
    begins = (source >= 0) & (transfer >= 0)
    # The transfers of each layer are counted from 0: here they follow those that are kept, layer by layer.
    cut_of_move = np.repeat(np.arange(len(cuts)), [len(cut.moves) // MOVE_COLUMNS for cut in cuts])
    of_cut = np.bincount(cut_of_move[begins], minlength=len(cuts))
    index = np.where(transfer >= 0, transfer + (len(transfers) + np.cumsum(of_cut) - of_cut)[cut_of_move], -1)
    new_transfers = np.stack([part, expert, src_rank, src_slot, rank, np.where(lands, local, -1)], axis=1)[begins]
    new_moves = np.stack([part, rank, local, expert, index, np.where(transfer >= 0, -1, src_slot)], axis=1)
    vacated = np.stack([np.repeat(own, num_vacated), _table((cut.vacated for cut in cuts), 1)[:, 0]], axis=1)
    return _Parts(
        np.repeat(whole.layer, count),
        np.concatenate([transfers, new_transfers]),
        np.concatenate([moves, new_moves]),
        vacated,
    )


def _table(rows: Iterable[Sequence[int] | Sequence[tuple[int, ...]]], columns: int) -> IntArray:
    """Return an array `[n, columns]` of lists, one after the other."""
    return np.array(list(chain.from_iterable(rows)), dtype=np.int64).reshape(-1, columns)


def _tasks(plan: RearrangementPlan, layers: IntArray, aligned: IntArray) -> list[LayerTask]:
    """Return what has to happen in each of `layers`."""
    places = Places(plan.node_of_rank.tolist(), plan.slots_per_rank)
    needs = list(zip(plan.transfer_expert.tolist(), plan.transfer_dst_rank.tolist(), strict=True))
    senders = plan.transfer_src_rank.tolist()
    bounds = np.searchsorted(plan.transfer_layer, [layers, layers + 1]).T.tolist()
    tasks = zip(plan.old[layers].tolist(), plan.new[layers].tolist(), aligned[layers].tolist(), bounds, strict=True)
    return [
        LayerTask(
            old,
            new,
            expert_bytes,
            planned_source=dict(zip(needs[begin:end], senders[begin:end], strict=True)),
            places=places,
            relay=bool((plan.transfer_after[begin:end] >= 0).any()),
        )
        for old, new, expert_bytes, (begin, end) in tasks
    ]


def _pack(layer: IntArray, use: IntArray, bound: IntArray, max_parts: int) -> IntArray:
    """Put each part into the first step that has room for it, after the step of its layer's part before.

    Only the last few steps are looked at: an early step with room for a late layer is rare, and searching all of them
    would take time that grows with the square of their number.

    Returns:
        `[P]`, the step of each part.
    """
    step = np.zeros(len(layer), dtype=np.int64)
    used = np.zeros((len(layer), use.shape[1]), dtype=np.int64)
    parts = np.zeros(len(layer), dtype=np.int64)
    num_steps = 0
    for part in range(len(layer)):
        follows = part > 0 and layer[part] == layer[part - 1]
        begin = max(num_steps - _LOOK_BACK_STEPS, 0, int(step[part - 1]) + 1 if follows else 0)
        room = (used[begin:num_steps] <= bound - use[part]).all(axis=1) & (parts[begin:num_steps] < max_parts)
        chosen = begin + int(room.argmax()) if room.any() else num_steps
        num_steps = max(num_steps, chosen + 1)
        step[part] = chosen
        used[chosen] += use[part]
        parts[chosen] += 1
    return step


def _make_steps(
    plan: RearrangementPlan, parts: _Parts, order: CopyOrder, aligned: IntArray, step: IntArray
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
    transfers = np.stack([parts.layer[part], expert, src_rank, src_slot, dst_rank, kind, destination], axis=1)
    layer = parts.layer[move_part]
    # Appended, for moves without a transfer: index -1.
    received_kind, received_at = np.append(kind, WINDOW)[transfer], np.append(destination, 0)[transfer]
    read = np.where(transfer >= 0, received_at, np.where(order.saved, save_offset, source))
    read_kind = np.where(transfer >= 0, received_kind, np.where(order.saved, WINDOW, SLOT))
    commits = np.stack([rank, layer, order.level, read_kind, read, np.full(len(rank), SLOT), slot], axis=1)
    saves = commits[saved]
    saves[:, 2:] = 0
    saves[:, 3], saves[:, 4], saves[:, 5], saves[:, 6] = SLOT, source[saved], WINDOW, save_offset[saved]
    copied = ~((transfer >= 0) & (received_kind == SLOT) & (received_at == slot))  # the others are there already
    copies = np.concatenate([saves, commits[copied]])
    copy_step = step[np.concatenate([move_part[saved], move_part[copied]])]
    # Sorted by step, rank, level, layer and slot as one number, which is several times as fast as one after the other.
    # Saves are in the order of the window already.
    place = np.concatenate([np.zeros(len(saved), dtype=np.int64), slot[copied]])
    key = copy_step * num_ranks + copies[:, 0]
    key = key * (int(order.level.max(initial=0)) + 1) + copies[:, 2]
    key = (key * plan.num_layers + copies[:, 1]) * plan.slots_per_rank + place
    sequence = np.argsort(key, kind="stable")

    last = np.append(np.diff(parts.layer) != 0, True)  # the last part of its layer: emptied slots change with it
    last_part = np.full(plan.num_layers, -1, dtype=np.int64)
    last_part[parts.layer[last]] = np.flatnonzero(last)
    cleared_layer, cleared_slot = np.nonzero((plan.old != EMPTY) & (plan.new == EMPTY))
    gone = np.full(len(cleared_layer), EMPTY, dtype=np.int64)
    vacated_part, vacated_slot = parts.vacated.T
    changes = np.concatenate(
        [
            np.stack([layer, rank * plan.slots_per_rank + slot, moved], axis=1),
            np.stack([cleared_layer, cleared_slot, gone], axis=1),
            np.stack([parts.layer[vacated_part], vacated_slot, np.full(len(vacated_part), EMPTY)], axis=1),
        ]
    )
    change_step = step[np.concatenate([move_part, last_part[cleared_layer], vacated_part])]

    by_step = zip(
        _split(transfers, step[part], num_steps),
        _split(copies[sequence], copy_step[sequence], num_steps),
        _split(changes, change_step, num_steps),
        staged.reshape(num_steps, num_ranks),
        _split(parts.layer[last], step[last], num_steps),
        strict=True,
    )
    return [Step(*arrays) for arrays in by_step]


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


def _split(rows: IntArray, step: IntArray, num_steps: int) -> list[IntArray]:
    """Return the rows of each step, in their order."""
    ends = np.cumsum(np.bincount(step, minlength=num_steps))
    by_step = np.argsort(step.astype(np.min_scalar_type(num_steps)), kind="stable")  # fast for small numbers
    return np.split(rows.take(by_step, axis=0), ends[:-1])
