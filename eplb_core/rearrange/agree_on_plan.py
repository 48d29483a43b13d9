"""Before a rearrangement: every rank has been asked for the same, or none begins."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from eplb_core.control.agreement import exchange
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import EplbError, HandshakeError
from eplb_core.planning.plan import RearrangementPlan


def agree_on_plan(
    control: ControlPlane,
    make_plan: Callable[[], RearrangementPlan],
    asked: Mapping[str, str],
    timeout_s: float,
) -> RearrangementPlan:
    """Return the plan, once all ranks have the same one. A rank that cannot make one does not let others wait.

    Args:
        control: the control plane of the ranks.
        make_plan: makes this rank's plan.
        asked: what else has to be the same on every rank.
        timeout_s: how long to wait for the slowest rank, in seconds.

    Raises:
        HandshakeError: the ranks differ, or one did not come; the same table on each.
        EplbError: what `make_plan` raised, if it raised the same on every rank.
    """
    plan: RearrangementPlan | None = None
    problem: EplbError | None = None
    try:
        plan = make_plan()
    except EplbError as error:
        problem = error
    mine = {
        "old placement": "-" if plan is None else _digest(plan.old),
        "new placement": "-" if plan is None else _digest(plan.new),
        "problem": str(problem or "-"),
        **asked,
    }
    before = None if plan is None else plan.old.copy()
    try:
        said = exchange(control, "the placements to rearrange", msgspec.msgpack.encode(mine), timeout_s)
        ranks = [msgspec.msgpack.decode(value, type=dict[str, str]) for value in said]
    except HandshakeError as late:
        late.placement = before
        raise
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise HandshakeError("what a rank was asked for cannot be read", table={}, why=str(error)) from error
    table = {item: [rank.get(item, "?") for rank in ranks] for item in mine}
    table = {item: values for item, values in table.items() if len(set(values)) > 1}
    if table:
        different = HandshakeError(
            "the ranks were asked for different rearrangements", table=table, why="nothing was moved"
        )
        different.placement = before
        raise different from problem
    if plan is None:
        raise problem or EplbError("there is no plan")
    return plan


def _digest(placement: npt.NDArray[np.int64]) -> str:
    return hashlib.sha256(placement.tobytes()).hexdigest()[:16]
