"""Before a rearrangement: every rank has been asked for the same, or none begins.

Ranks that were asked for the same find that out in one round, by a digest. Only if they differ, or one has a problem,
does each say what it was asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from eplb_core.control.agreement import exchange, not_all_answered
from eplb_core.control.plane import ControlPlane
from eplb_core.control.wire import UNREADABLE
from eplb_core.errors import ControlPlaneError, EplbError, HandshakeError
from eplb_core.rearrange.known_plan import KnownPlan

_DIGEST_BYTES = 32
_PROBLEM = bytes(_DIGEST_BYTES)  # instead of a digest


@dataclass(frozen=True, slots=True)
class Agreed:
    """What all ranks have.

    Attributes:
        known: the plan.
        scheduled: whether every rank has its schedule too.
    """

    known: KnownPlan
    scheduled: bool


def agree_on_plan(
    control: ControlPlane,
    make_plan: Callable[[], KnownPlan],
    asked: Mapping[str, str],
    timeout_s: float,
    is_scheduled: Callable[[KnownPlan], bool] = lambda known: False,
) -> Agreed:
    """Return the plan, once all ranks have the same one. A rank that cannot make one does not let others wait.

    Args:
        control: the control plane of the ranks.
        make_plan: makes this rank's plan.
        asked: what else has to be the same on every rank.
        timeout_s: how long to wait for the slowest rank, in seconds.
        is_scheduled: whether this rank knows the schedule of a plan.

    Raises:
        HandshakeError: the ranks differ, or one did not come; the same table on each.
        EplbError: what `make_plan` raised, if it raised the same on every rank.
    """
    known: KnownPlan | None = None
    problem: EplbError | None = None
    try:
        known = make_plan()
    except EplbError as error:
        problem = error
    mine = _PROBLEM if known is None else _digest(known, asked)
    message = mine + bytes([known is not None and is_scheduled(known)])
    try:
        if known is not None and known.changes:
            _ask_store(control)  # steps are decided there: without it none may begin
        said = exchange(control, "the placements to rearrange", message, timeout_s)
        if any(len(value) != len(message) for value in said):
            raise HandshakeError("what a rank was asked for cannot be read", table={}, why="it has another length")
        if known is not None and all(value[:_DIGEST_BYTES] == mine for value in said):
            return Agreed(known, all(value[_DIGEST_BYTES] for value in said))
        _compare(control, known, problem, asked, timeout_s)
    except HandshakeError as error:
        error.placement = None if known is None else known.plan.old.copy()
        raise
    raise problem or EplbError("there is no plan")


def _ask_store(control: ControlPlane) -> None:
    try:
        control.ask_store()
    except ControlPlaneError as error:
        raise not_all_answered(error, control.world_size) from error


def _compare(
    control: ControlPlane,
    known: KnownPlan | None,
    problem: EplbError | None,
    asked: Mapping[str, str],
    timeout_s: float,
) -> None:
    """Raise an error that says in what the ranks differ, the same on each. Return if they have the same problem."""
    old, new = ("-", "-") if known is None else (digest.hex()[:16] for digest in known.digests)
    mine = {"old placement": old, "new placement": new, "problem": str(problem or "-"), **asked}
    said = exchange(control, "what each rank was asked for", msgspec.msgpack.encode(mine), timeout_s)
    try:
        ranks = [msgspec.msgpack.decode(value, type=dict[str, str]) for value in said]
    except UNREADABLE as error:
        raise HandshakeError("what a rank was asked for cannot be read", table={}, why=str(error)) from error
    table = {item: [rank.get(item, "?") for rank in ranks] for item in mine}
    table = {item: values for item, values in table.items() if len(set(values)) > 1}
    if table or problem is None:
        raise HandshakeError(
            "the ranks were asked for different rearrangements", table=table, why="nothing was moved"
        ) from problem


def _digest(known: KnownPlan, asked: Mapping[str, str]) -> bytes:
    """Return a digest of everything that has to be the same on every rank."""
    return hashlib.sha256(msgspec.msgpack.encode((known.digests, sorted(asked.items())))).digest()
