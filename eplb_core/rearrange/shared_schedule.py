"""Every rank schedules some of the layers and tells the others, rather than every rank all of them."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from eplb_core.control.agreement import exchange
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import EplbError, HandshakeError
from eplb_core.scheduling.layer import LayerMoves


class _Share(msgspec.Struct, array_like=True, frozen=True):
    """What one rank tells.

    Attributes:
        cuts: group of layers -> its cuts.
        problem: why it has none.
    """

    cuts: dict[int, list[LayerMoves]] = {}
    problem: str = ""


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
    mine = _Share()
    try:
        mine = _Share({group: cut(group) for group in range(control.rank, groups, control.world_size)})
    except EplbError as error:
        problem, mine = error, _Share(problem=str(error) or type(error).__name__)
    try:
        said = exchange(control, "the schedule", msgspec.msgpack.encode(mine), timeout_s)
        shares = [msgspec.msgpack.decode(value, type=_Share) for value in said]
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise HandshakeError("a rank's part of the schedule cannot be read", table={}, why=str(error)) from error
    failed = [rank for rank, share in enumerate(shares) if share.problem]
    if problem is not None:
        raise problem
    if failed:
        raise EplbError(f"rank {failed[0]} could not schedule its layers", why=shares[failed[0]].problem)
    cuts = {group: cut_up for share in shares for group, cut_up in share.cuts.items()}
    if sorted(cuts) != list(range(groups)):
        raise HandshakeError("the schedule is not whole", table={}, why=f"{len(cuts)} of {groups} groups of layers")
    return [cuts[group] for group in range(groups)]
