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

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eplb_core.arrays import IntArray
from eplb_core.errors import PlacementError
from eplb_core.planning.plan import RearrangementPlan, layer_bytes
from eplb_core.scheduling.batches import cut_layers, whole_layers, without_moves
from eplb_core.scheduling.layer import Budget, LayerMoves, LayerTask, SlotMap
from eplb_core.scheduling.split_layer import cut_in_place, cut_layer
from eplb_core.scheduling.steps import SLOT, WINDOW, Step, make_steps

__all__ = ["ALIGNMENT", "SLOT", "WINDOW", "Step", "schedule_steps"]

ALIGNMENT = 256
"""Every expert in a window starts at a multiple of this many bytes; budgets count sizes rounded up to it."""

_UNLIMITED = 2**62
_LOOK_BACK_STEPS = 16
_WORTH_SHARING = 500
"""From so many moves on, which take some 2 ms to cut, it pays to ask the other ranks."""

_LEAST_ROOM = 4
"""Experts that every group of layers has room for: with fewer, cycles are turned in more steps."""

_WORTH_TURNS = 5_000
"""From so many moves on, which take some 50 ms to cut in one group, groups of layers take turns with the window."""

_ENOUGH_GROUPS = 4
"""So many groups are cut in a quarter of the time; more of them take turns with the window too seldom."""

Share = Callable[[Callable[[int], list[LayerMoves]], int], list[list[LayerMoves]]]
"""Returns what a function returns for each number below the second argument, in order."""


def in_turn(cut: Callable[[int], list[LayerMoves]], groups: int) -> list[list[LayerMoves]]:
    """Cut all groups in this process; a `Share`."""
    return [cut(group) for group in range(groups)]


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
    if min(limits.values()) < aligned.max(initial=0):
        _check_limits(plan, aligned, limits)
    work = _Scheduler(plan, aligned, limits, max_layers_per_step, share)
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
class _Scheduler:
    """What has to be scheduled.

    Attributes:
        plan: what has to move.
        aligned: `[num_layers]`, bytes of an expert in the window.
        limits: name -> bytes a rank and step: window, sent, received.
        max_layers: the most layers of a step, None for no limit.
        share: calls what cuts a group of layers for every group.
    """

    plan: RearrangementPlan
    aligned: IntArray
    limits: dict[str, int]
    max_layers: int | None
    share: Share

    def staged(self) -> list[Step]:
        """Return steps that receive everything into the window."""
        parts = whole_layers(self.plan)
        order = parts.order(self.plan)
        use = parts.use(order, self.aligned, self.plan.num_ranks)
        too_large = np.unique(parts.layer[(use > self._bound).any(axis=1)])
        if len(too_large):
            budget = Budget(*self.limits.values())
            cuts = [cut_layer(task, budget) for task in _tasks(self.plan, too_large, self.aligned)]
            parts = parts.without(too_large).joined(cut_layers(self.plan, too_large, cuts))
            order = parts.order(self.plan)
            use = parts.use(order, self.aligned, self.plan.num_ranks)
        step = _pack(parts.layer, use, self._bound, self.max_layers or len(parts.layer))
        return make_steps(self.plan, parts, order, self.aligned, step)

    def least_staged_cost(self, step_bytes: int) -> int:
        """Return what the steps of `staged` cost at least: the rank that receives most stages all of that."""
        received = np.zeros(self.plan.num_ranks, dtype=np.int64)
        np.add.at(received, self.plan.transfer_dst_rank, self.aligned[self.plan.transfer_layer])
        busiest = int(received.max())
        unit = max(1, int(np.gcd.reduce(self.aligned)))  # every expert takes a multiple of this
        room = min(self.limits["window"], self.limits["receive limit"]) // unit * unit
        return -(-busiest // max(room, 1)) * step_bytes + busiest

    def in_place(self, cheap_bytes: int) -> list[Step]:
        """Return steps that receive into empty slots; each may stage `cheap_bytes` on a rank besides.

        The layers are cut in groups, so that no group has to know of the others. They share the limits evenly, or take
        turns with the window.
        """
        moves = np.zeros(self.plan.num_layers, dtype=np.bool_)
        moves[self.plan.move_layer] = True
        layers = np.flatnonzero(moves)
        sharers, turns = self._sharers_and_turns(layers)
        groups = np.array_split(layers, sharers * turns)
        budget = Budget(*(limit // sharers for limit in self.limits.values()))

        def cut(group: int) -> list[LayerMoves]:
            tasks = _tasks(self.plan, groups[group], self.aligned)
            return cut_in_place(tasks, budget, cheap_bytes // sharers, turn=group % turns, turns=turns)

        share = self.share if len(groups) > 1 and self.plan.num_moves >= _WORTH_SHARING else in_turn
        cuts = [cut_up for of_group in share(cut, len(groups)) for cut_up in of_group]
        parts = cut_layers(self.plan, layers, cuts)
        only_emptied = np.flatnonzero((self.plan.old != self.plan.new).any(axis=1) & ~moves)
        if len(only_emptied):
            parts = parts.joined(without_moves(only_emptied))
        step = np.zeros(len(parts.layer), dtype=np.int64)
        own_steps = [own for cut in cuts for own, _, _ in cut.ends]
        step[moves[parts.layer]] = np.unique(own_steps, return_inverse=True)[1]  # in some steps no group did anything
        return make_steps(self.plan, parts, parts.order(self.plan), self.aligned, step)

    def _sharers_and_turns(self, layers: IntArray) -> tuple[int, int]:
        """Return into how many shares to cut the limits, and how many groups of layers take turns with each share.

        One group for each rank, as far as every share has room for a few experts. Where that are few groups and the
        plan is large, groups take turns with the window, which costs some more steps.
        """
        room = min(self.limits.values()) // max(1, int(self.aligned[layers].max(initial=0)))
        most = min(self.plan.num_ranks, len(layers))
        sharers = max(1, min(most, room // _LEAST_ROOM))
        only_window = min(self.limits["send limit"], self.limits["receive limit"]) == _UNLIMITED
        if not only_window or self.plan.num_moves < _WORTH_TURNS:
            return sharers, 1
        return sharers, max(1, min(most, _ENOUGH_GROUPS) // sharers)

    @property
    def _bound(self) -> IntArray:
        return np.repeat(np.array(list(self.limits.values()), dtype=np.int64), self.plan.num_ranks)


def _check_limits(plan: RearrangementPlan, aligned: IntArray, limits: dict[str, int]) -> None:
    """Check that each limit holds one expert of every layer that it concerns."""
    whole = whole_layers(plan)
    use = whole.use(whole.order(plan), aligned, plan.num_ranks)
    for (name, limit), used in zip(limits.items(), np.split(use, len(limits), axis=1), strict=True):
        needed = np.where(used.any(axis=1), aligned[whole.layer], 0)
        if needed.max(initial=0) > limit:
            largest = int(needed.argmax())
            raise PlacementError(
                f"the {name} of {limit} bytes is smaller than one expert",
                where=f"layer {int(whole.layer[largest])}",
                why=f"the smallest possible step needs {int(needed[largest])} bytes on a rank",
                remedy=f"make the {name} at least {int(needed[largest])} bytes",
            )


def _tasks(plan: RearrangementPlan, layers: IntArray, aligned: IntArray) -> list[LayerTask]:
    """Return what has to happen in each of `layers`."""
    places = SlotMap(plan.node_of_rank.tolist(), plan.slots_per_rank)
    bounds = np.searchsorted(plan.transfer_layer, [layers, layers + 1])
    first = int(bounds.min(initial=plan.num_transfers))
    own = slice(first, int(bounds.max(initial=first)))  # the transfers of these layers, and of those between them
    needs = (plan.transfer_expert[own] * plan.num_ranks + plan.transfer_dst_rank[own]).tolist()
    senders, relayed = plan.transfer_src_rank[own].tolist(), (plan.transfer_after[own] >= 0).tolist()
    tasks = zip(
        plan.old[layers].tolist(),
        plan.new[layers].tolist(),
        aligned[layers].tolist(),
        (bounds - first).T.tolist(),
        strict=True,
    )
    return [
        LayerTask(
            old,
            new,
            expert_bytes,
            planned_source=dict(zip(needs[begin:end], senders[begin:end], strict=True)),
            places=places,
            relay=True in relayed[begin:end],
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
    if len(layer) <= max_parts and (np.diff(layer) > 0).all() and (use.sum(axis=0) <= bound).all():
        return step
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
