"""Ranks that tell one another how something went, so that all of them raise where one would."""

from __future__ import annotations

from eplb_core.control.plane import ControlPlane
from eplb_core.errors import ControlPlaneError, HandshakeError

LONGEST_TEXT = 16_384
"""Characters of one answer; a longer one is cut, and differs from others all the same."""


def agree_on_outcome(control: ControlPlane, what: str, problem: Exception | None, timeout_s: float) -> None:
    """Return if `what` went well on every rank.

    Raises:
        HandshakeError: it failed on some rank, or one did not answer; the same table on every rank.
        Exception: it failed in the same way on every rank: this rank's own.
    """
    text = f"{type(problem).__name__}: {problem}"[:LONGEST_TEXT] if problem is not None else ""
    said = [value.decode(errors="replace") for value in exchange(control, what, text.encode(), timeout_s)]
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
