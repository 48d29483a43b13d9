"""Every rank schedules some of the layers and tells the others, rather than every rank all of them."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from eplb_core.control.agreement import all_answer, failed_ranks
from eplb_core.control.plane import ControlPlane
from eplb_core.control.wire import UNREADABLE
from eplb_core.errors import EplbError, HandshakeError
from eplb_core.scheduling.layer import LayerMoves

_Cuts = dict[int, list[LayerMoves]]
"""Group of layers -> its cuts."""


def share_cuts(
    control: ControlPlane, cut: Callable[[int], list[LayerMoves]], groups: int, timeout_s: float
) -> list[list[LayerMoves]]:
    """Return what `cut` returns for each group of layers. Every rank calls it, for the same plan.

    Args:
        control: the control plane of the ranks.
        cut: cuts one group of layers; the same on every rank.
        groups: how many groups there are.
        timeout_s: how long to wait for the slowest rank, in seconds.

    Raises:
        HandshakeError: a rank did not come, or what it says cannot be read.
        EplbError: `cut` failed, on any rank.
    """
    problem: EplbError | None = None
    mine: _Cuts = {}
    try:
        mine = {group: cut(group) for group in range(control.rank, groups, control.world_size)}
    except EplbError as error:
        problem = error
    answers = all_answer(control, "the schedule", timeout_s, value=msgspec.msgpack.encode(mine), problem=problem)
    if problem is not None:
        raise problem
    for rank in failed_ranks(answers):
        raise EplbError(f"rank {rank} could not schedule its layers", why=answers[rank].problem)
    try:
        shares = [msgspec.msgpack.decode(answer.value, type=_Cuts) for answer in answers]
    except UNREADABLE as error:
        raise HandshakeError("a rank's part of the schedule cannot be read", table={}, why=str(error)) from error
    cuts = {group: cut_up for share in shares for group, cut_up in share.items()}
    if sorted(cuts) != list(range(groups)):
        raise HandshakeError("the schedule is not whole", table={}, why=f"{len(cuts)} of {groups} groups of layers")
    return [cuts[group] for group in range(groups)]
