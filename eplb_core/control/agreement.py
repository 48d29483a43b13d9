"""Ranks that tell one another how something went, so that all of them raise where one would."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from eplb_core.control.plane import ControlPlane
from eplb_core.control.wire import UNREADABLE
from eplb_core.errors import ControlPlaneError, HandshakeError

LONGEST_TEXT = 16_384
"""Characters of one answer; a longer one is cut, and differs from others all the same."""


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """What one rank tells all others.

    Attributes:
        problem: why something failed there; empty if it did not.
        value: what it made of it.
    """

    problem: str = ""
    value: bytes = b""


def all_say(
    control: ControlPlane, what: str, timeout_s: float, *, value: bytes = b"", problem: object = ""
) -> list[Answer]:
    """Tell every rank how something went here, and return what every rank tells, in rank order.

    All ranks get the same answers, so all of them come to the same conclusion.

    Args:
        control: the control plane of the ranks.
        what: what they tell of, for the error message.
        timeout_s: how long to wait for the slowest rank, in seconds.
        value: what this rank made of it.
        problem: why it failed here: an error, or a text. None and an empty text mean that it did not.

    Raises:
        ControlPlaneError: a rank did not answer in time, or the store is gone.
        HandshakeError: what a rank tells cannot be read.
    """
    text = "" if problem is None else str(problem)
    if isinstance(problem, BaseException) and not text:
        text = type(problem).__name__
    mine = msgspec.msgpack.encode(Answer(text[:LONGEST_TEXT], value))
    try:
        return [msgspec.msgpack.decode(said, type=Answer) for said in control.all_gather(what, mine, timeout_s)]
    except UNREADABLE as error:
        raise HandshakeError(
            f"{what} of a rank cannot be read", table={}, why=str(error), remedy="install the same eplb on every rank"
        ) from error


def all_answer(
    control: ControlPlane, what: str, timeout_s: float, *, value: bytes = b"", problem: object = ""
) -> list[Answer]:
    """Like `all_say`; a rank that does not answer raises `HandshakeError` on all that do."""
    try:
        return all_say(control, what, timeout_s, value=value, problem=problem)
    except ControlPlaneError as error:
        raise not_all_answered(error, control.world_size) from error


def failed_ranks(answers: Sequence[Answer]) -> list[int]:
    """Return the ranks that tell of a problem."""
    return [rank for rank, answer in enumerate(answers) if answer.problem]


def agree_on_outcome(control: ControlPlane, what: str, problem: Exception | None, timeout_s: float) -> None:
    """Return if `what` went well on every rank.

    Raises:
        HandshakeError: it failed on some rank, or one did not answer; the same table on every rank.
        Exception: it failed in the same way on every rank: this rank's own.
    """
    text = f"{type(problem).__name__}: {problem}" if problem is not None else ""
    said = [answer.problem for answer in all_answer(control, what, timeout_s, problem=text)]
    if not any(said):
        return
    if problem is not None and len(set(said)) == 1:
        raise problem
    raise HandshakeError(f"{what} failed", table={"problem": [value or "-" for value in said]}) from problem


def exchange(control: ControlPlane, what: str, message: bytes, timeout_s: float) -> list[bytes]:
    """Gather a message from every rank; a rank that does not answer raises `HandshakeError` on all that do."""
    try:
        return control.all_gather(what, message, timeout_s)
    except ControlPlaneError as error:
        raise not_all_answered(error, control.world_size) from error


def not_all_answered(error: ControlPlaneError, world_size: int) -> HandshakeError:
    """Return the error to raise where ranks did not answer, with a table of those that did and did not."""
    answered = ["no" if rank in error.missing else "yes" for rank in range(world_size)]
    return HandshakeError(
        error.what, table={"answered": answered} if error.missing else {}, missing=error.missing, why=error.why
    )
