"""The commit record: what the ranks of a rearrangement have decided, step by step, so that none reads it otherwise.

A step is committed only if every rank has said that it has all its bytes. Who says so last writes `commit`; who finds
that a step cannot end writes `abort`. Both go through one compare-and-set of the store, so the first one stands, and
every survivor reads the same. Ranks decide a step before they say anything of the next one, so the steps that are
committed are the same on all of them, and with them the placement.

The store has to outlive the ranks: torchrun's agent hosts it outside the workers, and so do local ranks. If it dies
with its host, nobody can tell how the last step ended; `DecisionUnknownError` says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from eplb_core.control.plane import ControlPlane
from eplb_core.errors import (
    ControlPlaneError,
    IntegrityError,
    PeerLostError,
    TransferError,
    TransferMismatchError,
    TransferOverflowError,
    TransferTimeoutError,
)

_RANKS_PER_WORD = 60  # a count of the store is a signed number of 64 bits
_NAP_S = 50e-6
_LONGEST_NAP_S = 20e-3  # so that many ranks that wait for one do not keep the store busy
_WATCH_S = 0.2
_TEXT_LIMIT = 2000  # characters of an error that the other ranks are told


_CLASSES = {
    kind.__name__: kind
    for kind in (IntegrityError, PeerLostError, TransferMismatchError, TransferOverflowError, TransferTimeoutError)
}


class Verdict(msgspec.Struct, frozen=True):
    """How a vote ended.

    Attributes:
        outcome: what the rank that settled it said, "abort" among others.
        rank: that rank.
        error: the class name of what went wrong there.
        text: what went wrong there.
        peers: the ranks that it blames.
        phase: the step of the transfer that failed.
        usable: whether its communicator can be used again.
    """

    outcome: str
    rank: int
    error: str = ""
    text: str = ""
    peers: tuple[int, ...] = ()
    phase: str = ""
    usable: bool = False

    @property
    def aborted(self) -> bool:
        """Whether some rank could not go on."""
        return self.outcome == ABORT


ABORT, COMMIT = "abort", "commit"


class Ledger:
    """The records of one rearrangement. Every rank makes one, of the same control plane.

    Args:
        control: a control plane that only this rearrangement uses.
        timeout_s: how long to wait for the slowest rank, in seconds.
    """

    def __init__(self, control: ControlPlane, timeout_s: float) -> None:
        self._control = control
        self._timeout_s = timeout_s
        self._words = -(-control.world_size // _RANKS_PER_WORD)

    def vote(
        self,
        question: str,
        outcome: Callable[[], str] | str = COMMIT,
        *,
        watch: Callable[[], TransferError | None] | None = None,
    ) -> Verdict:
        """Say yes to `question`, wait until every rank has or one has settled it otherwise, and return the verdict.

        Args:
            question: the same text on every rank, asked once.
            outcome: what the last rank settles; called on that rank alone.
            watch: asked a few times a second while others are missing, in place of the ledger's timeout; what it
                returns settles the question as an abort.

        Raises:
            ControlPlaneError: the store is gone.
        """
        if self._say_yes(question):
            return self._conclude(question, outcome)
        began = watched = time.monotonic()
        while (verdict := self._peek(question)) is None:
            now = time.monotonic()
            if now - watched > _WATCH_S:
                watched = now
                if not self.missing(question):
                    # Who was the last to say yes has died before it could settle it.
                    return self._conclude(question, outcome)
                error = None if watch is None else watch()
                if error is not None:
                    return self.abort(question, error)
            if watch is None and now - began > self._timeout_s:
                return self.abort(question, self._late(question))
            time.sleep(min(_LONGEST_NAP_S, max(_NAP_S, (now - began) / 10)))
        return verdict

    def settle(self, question: str, verdict: Verdict) -> Verdict:
        """Settle `question` unless it is settled, and return what stands."""
        value = self._control.settle(_verdict(question), msgspec.msgpack.encode(verdict))
        return _decode(value)

    def abort(self, question: str, error: BaseException) -> Verdict:
        """Settle `question` as an abort because of `error`, unless it is settled, and return what stands."""
        peers: tuple[int, ...] = ()
        phase, usable, text = "", False, f"{type(error).__name__}: {error}"
        if isinstance(error, TransferError):
            peers, phase, usable, text = error.peers, error.phase, error.usable, error.what
        return self.settle(
            question,
            Verdict(ABORT, self._control.rank, type(error).__name__, text[:_TEXT_LIMIT], peers, phase, usable),
        )

    def missing(self, question: str) -> tuple[int, ...]:
        """Return the ranks that have not said yes to `question`."""
        said = [self._control.add(f"{question}/{word}", 0) for word in range(self._words)]
        ranks = range(self._control.world_size)
        return tuple(r for r in ranks if not said[r // _RANKS_PER_WORD] >> (r % _RANKS_PER_WORD) & 1)

    def raise_flag(self, name: str) -> None:
        """Raise a flag that every rank can see."""
        self._control.add(name, 1)

    def flag(self, name: str) -> bool:
        """Return whether some rank has raised a flag."""
        return self._control.add(name, 0) > 0

    def beat(self) -> None:
        """Show the other ranks that this one is alive, though it does not answer yet."""
        self._control.add(_beat(self._control.rank), 1)

    def beats(self, rank: int) -> int:
        """Return how often a rank has shown that it is alive."""
        return self._control.add(_beat(rank), 0)

    def forget(self, question: str) -> None:
        """Remove a question that every rank knows the verdict of."""
        names = [_verdict(question), *(f"{question}/{word}" for word in range(self._words))]
        self._control.forget(names if self._words == 1 else [*names, f"{question}/words"])

    def _say_yes(self, question: str) -> bool:
        """Return whether this rank was the last one."""
        word, bit = divmod(self._control.rank, _RANKS_PER_WORD)
        said = self._control.add(f"{question}/{word}", 1 << bit)
        ranks_here = min(_RANKS_PER_WORD, self._control.world_size - word * _RANKS_PER_WORD)
        if said != (1 << ranks_here) - 1:
            return False
        return self._words == 1 or self._control.add(f"{question}/words", 1) == self._words

    def _conclude(self, question: str, outcome: Callable[[], str] | str) -> Verdict:
        text = outcome if isinstance(outcome, str) else outcome()
        return self.settle(question, Verdict(text, self._control.rank))

    def _peek(self, question: str) -> Verdict | None:
        value = self._control.settled(_verdict(question))
        return None if value is None else _decode(value)

    def _late(self, question: str) -> TransferTimeoutError:
        missing = self.missing(question)
        ranks = ("rank " if len(missing) == 1 else "ranks ") + ", ".join(map(str, missing))
        return TransferTimeoutError(
            f"{ranks} did not end {question} within {self._timeout_s:g} s", peers=missing, phase="commit"
        )


def _beat(rank: int) -> str:
    return f"beats of {rank}"


def _verdict(question: str) -> str:
    return f"{question}/verdict"


def error_of(verdict: Verdict, rank: int, *, usable: bool) -> TransferError:
    """Return what `rank` raises because of an abort: an error of the class that the rank that settled it met.

    Args:
        verdict: the abort.
        rank: this rank.
        usable: whether this rank's communicator can be used again.
    """
    kind = _CLASSES.get(verdict.error, TransferError)
    peers = set(verdict.peers) - {rank} or {verdict.rank}
    what = verdict.text if verdict.rank == rank else f"rank {verdict.rank} could not go on: {verdict.text}"
    return kind(what, peers=peers, phase=verdict.phase or "commit", usable=usable)


def who_is_to_blame(error: BaseException, verdict: Verdict, rank: int) -> BaseException:
    """Return what `rank` should raise for its own `error`, given how the question was settled.

    A rank that waited in vain for one that had given up itself blames the wrong one; the verdict says who it was.
    """
    misled = (
        verdict.aborted
        and isinstance(error, TransferError)
        and verdict.rank in error.peers
        and set(verdict.peers) - {rank, verdict.rank}
    )
    return error_of(verdict, rank, usable=False) if misled else error


def _decode(value: bytes) -> Verdict:
    try:
        return msgspec.msgpack.decode(value, type=Verdict)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ControlPlaneError("what the ranks have decided cannot be read", why=str(error)) from error
