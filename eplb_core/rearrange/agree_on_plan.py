"""Before a rearrangement: every rank has been asked for the same, or none begins.

Ranks that were asked for the same find that out in one round, by a digest. Only if they differ, or one has a problem,
does each say what it was asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from eplb_core.control.agreement import exchange, not_all_answered
from eplb_core.control.call import Call, Calls
from eplb_core.control.plane import ControlPlane
from eplb_core.control.wire import UNREADABLE
from eplb_core.errors import ControlPlaneError, EplbError, HandshakeError, InputError
from eplb_core.rearrange.known_plan import KnownPlan

_ASKS, _REFUSES = b"a", b"r"  # what a rank's word begins with
_ATTEMPT = struct.Struct("<I")  # after that
_DIGEST = slice(1 + _ATTEMPT.size, 1 + _ATTEMPT.size + 32)
_PROBLEM = bytes(32)  # instead of a digest
_LONGEST_TEXT = 16_384  # characters of a problem that the other ranks are told


@dataclass(frozen=True, slots=True)
class Agreed:
    """What all ranks have.

    Attributes:
        known: the plan.
        scheduled: whether every rank has its schedule too.
        notes: what each rank has added.
    """

    known: KnownPlan
    scheduled: bool
    notes: tuple[bytes, ...] = ()


def agree_on_plan(
    calls: Calls,
    control: ControlPlane,
    make_plan: Callable[[], KnownPlan],
    asked: Mapping[str, str],
    timeout_s: float,
    attempt: int = 0,
    is_scheduled: Callable[[KnownPlan], bool] = lambda known: False,
    *,
    note: bytes = b"",
    asks_store: bool = True,
) -> tuple[Call, Agreed]:
    """Return the call of this rearrangement, and the plan, once all ranks have the same one.

    A rank that cannot make a plan, for any reason, says so: no other one waits for it.

    Args:
        calls: those of the rearranger.
        control: the control plane that the calls are made over.
        make_plan: makes this rank's plan.
        asked: what else must be the same on every rank; read once the plan is made.
        timeout_s: how long to wait for the slowest rank, in seconds.
        attempt: the how many-th rearranger of this rank it is; what others refused in an earlier attempt is passed.
        is_scheduled: whether this rank knows the schedule of a plan.
        note: what the other ranks are told besides; as long on all of them.
        asks_store: whether something that changes may only begin if the store answers.

    Raises:
        HandshakeError: the ranks differ, or one did not come; the same table on each.
        EplbError: what `make_plan` raised, if it raised the same on every rank.
    """
    known: KnownPlan | None = None
    problem: EplbError | None = None
    try:
        known = make_plan()
    except Exception as error:  # noqa: BLE001 - all that an argument brings about is told to the other ranks
        problem = as_problem(error, "an argument cannot be used")
    mine = _PROBLEM if known is None else _digest(known, asked)
    message = _ASKS + _ATTEMPT.pack(attempt) + mine + note + bytes([known is not None and is_scheduled(known)])
    try:
        try:
            if asks_store and known is not None and known.changes:
                control.ask_store()  # steps are decided there: without it none may begin
            call, said = calls.meet("the placements to rearrange", message, timeout_s)
        except ControlPlaneError as error:
            raise not_all_answered(error, control.world_size) from (problem or error)
        _raise_refusals(said)
        if any(len(value) != len(message) or not value.startswith(_ASKS) for value in said):
            raise HandshakeError("what a rank was asked for cannot be read", table={}, why="it has another length")
        if known is not None and all(value[_DIGEST] == mine for value in said):
            notes = tuple(value[-1 - len(note) : -1] for value in said)
            return call, Agreed(known, all(value[-1] for value in said), notes)
        _compare(call, known, problem, asked, timeout_s)
    except HandshakeError as error:
        error.placement = None if known is None else known.plan.old.copy()
        raise
    raise problem or EplbError("there is no plan")


def as_problem(error: Exception, what: str) -> EplbError:
    """Return `error` as one of ours, which says `what` if it is none."""
    if isinstance(error, EplbError):
        return error
    problem = InputError(what, why=f"{type(error).__name__}: {error}")
    problem.__cause__ = error
    return problem


def refuse(calls: Calls, problem: EplbError, attempt: int) -> None:
    """Tell the other ranks, without waiting for them, that this one cannot take part in the next call."""
    with contextlib.suppress(ControlPlaneError):
        calls.say(_REFUSES + _ATTEMPT.pack(attempt) + _problem(problem).encode(errors="replace"))


def stands(said: Sequence[bytes]) -> bool:
    """Return whether what the ranks have said is an answer: no rank refused in an attempt that others are past."""
    if not any(value.startswith(_REFUSES) for value in said):
        return True
    attempts = [_ATTEMPT.unpack_from(value, 1)[0] if len(value) > _ATTEMPT.size else 0 for value in said]
    return all(
        attempt >= max(attempts) for value, attempt in zip(said, attempts, strict=True) if value.startswith(_REFUSES)
    )


def _raise_refusals(said: Sequence[bytes]) -> None:
    """Raise if a rank could not make its rearranger."""
    if any(value.startswith(_REFUSES) for value in said):
        begin = 1 + _ATTEMPT.size
        problems = [value[begin:].decode(errors="replace") if value.startswith(_REFUSES) else "-" for value in said]
        raise HandshakeError(
            "the ranks were asked for different rearrangements", table={"problem": problems}, why="nothing was moved"
        )


def _compare(
    control: ControlPlane,
    known: KnownPlan | None,
    problem: EplbError | None,
    asked: Mapping[str, str],
    timeout_s: float,
) -> None:
    """Raise an error that says in what the ranks differ, the same on each. Return if they have the same problem."""
    old, new = ("-", "-") if known is None else (digest.hex()[:16] for digest in known.digests)
    mine = {"old placement": old, "new placement": new, "problem": _problem(problem), **asked}
    said = exchange(control, "what each rank was asked for", msgspec.msgpack.encode(mine), timeout_s)
    try:
        ranks = [msgspec.msgpack.decode(value, type=dict[str, str]) for value in said]
    except UNREADABLE as error:
        raise HandshakeError("what a rank was asked for cannot be read", table={}, why=str(error)) from error
    items = sorted({item for rank in ranks for item in rank})
    table = {item: [rank.get(item, "?") for rank in ranks] for item in items}
    table = {item: values for item, values in table.items() if len(set(values)) > 1}
    if table or problem is None:
        raise HandshakeError(
            "the ranks were asked for different rearrangements", table=table, why="nothing was moved"
        ) from problem


def _problem(problem: EplbError | None) -> str:
    return "-" if problem is None else f"{type(problem).__name__}: {problem}"[:_LONGEST_TEXT]


def _digest(known: KnownPlan, asked: Mapping[str, str]) -> bytes:
    """Return a digest of everything that must be the same on every rank."""
    return hashlib.sha256(msgspec.msgpack.encode((known.digests, sorted(asked.items())))).digest()
