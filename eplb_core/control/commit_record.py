"""Records whether each step was committed or aborted, so that every surviving rank reads the same answer.

A step is committed only if every rank has said that it has all its bytes. Who says so last writes `commit`; who finds
that a step cannot end writes `abort`. Both go through one compare-and-set of the store, so the first one stands, and
every survivor reads the same. Ranks decide a step before they say anything of the next one, so the steps that are
committed are the same on all of them, and with them the placement.

The store has to outlive the ranks: torchrun's agent hosts it outside the workers, and so do local ranks. If it dies
with its host, nobody can tell how the last step ended; `DecisionUnknownError` says so.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec

from eplb_core.control.plane import ControlPlane
from eplb_core.control.wire import UNREADABLE
from eplb_core.errors import (
    ControlPlaneError,
    IntegrityError,
    PeerLostError,
    TransferError,
    TransferMismatchError,
    TransferOverflowError,
    TransferTimeoutError,
)
from eplb_core.words import ranks_text

_RANKS_PER_WORD = 60  # a count of the store is a signed number of 64 bits
_NAP_S = 50e-6
_LONGEST_NAP_S = 20e-3  # so that many ranks that wait for one do not keep the store busy
_WATCH_S = 0.2
AFTER_TRANSFERS_S = 1.5
"""How much longer a decision waits than a transfer: who waits in a transfer knows better which rank is late."""
_TEXT_LIMIT = 2000  # characters of an error that the other ranks are told


_CLASSES = {
    kind.__name__: kind
    for kind in (IntegrityError, PeerLostError, TransferMismatchError, TransferOverflowError, TransferTimeoutError)
}


class Decision(msgspec.Struct, frozen=True):
    """How a key was decided.

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


class Record(Protocol):
    """What decides the steps of a rearrangement, the same for every rank."""

    def decide(self, key: str) -> Decision:
        """Say yes to `key`, wait until it is decided, and return the decision."""
        ...

    def abort(self, key: str, error: BaseException) -> Decision:
        """Settle `key` as an abort because of `error`, unless it is decided, and return what stands."""
        ...

    def forget(self, key: str) -> None:
        """Remove a key whose decision every rank has read."""
        ...

    def require_store(self) -> None:
        """Return unless it is known that nothing can be decided any more."""
        ...

    def last_words(self, waited_s: float) -> AbstractContextManager[None]:
        """Ask inside the block what is left to ask after waiting `waited_s` for others in vain."""
        ...


class CommitRecord:
    """What the ranks of one rearrangement decide. Every rank makes one, of the same control plane.

    Args:
        control: a control plane that only this rearrangement uses.
        timeout_s: how long to wait for the slowest rank, in seconds.
        forgotten: what removes keys of earlier records that every rank has read the decision of, the oldest first:
            called while this rank waits for others.
    """

    def __init__(
        self, control: ControlPlane, timeout_s: float, forgotten: deque[Callable[[], None]] | None = None
    ) -> None:
        self._control = control
        self._timeout_s = timeout_s
        self._forgotten = forgotten
        self._words = -(-control.world_size // _RANKS_PER_WORD)

    def decide(
        self,
        key: str,
        outcome: Callable[[], str] | str = COMMIT,
        *,
        watch: Callable[[], TransferError | None] | None = None,
        interrupted: Callable[[], TransferError | None] = lambda: None,
    ) -> Decision:
        """Say yes to `key`, wait until every rank has or one has settled it otherwise, and return the decision.

        Args:
            key: names what is decided; the same text on every rank, used once.
            outcome: what the last rank settles; called on that rank alone.
            watch: asked a few times a second while others are missing, in place of the record's timeout; what it
                returns aborts.
            interrupted: asked all the time; what it returns is why this rank does not go on, and aborts likewise.

        Raises:
            ControlPlaneError: the store is gone.
        """
        if self._say_yes(key):
            return self._conclude(key, outcome)
        if self._forgotten:
            self._forgotten.popleft()()
        began = watched = time.monotonic()
        while (decision := self._peek(key)) is None:
            now = time.monotonic()
            if (reason := interrupted()) is not None:
                return self.abort(key, reason)
            if now - watched > _WATCH_S:
                watched = now
                if not self.missing(key):
                    # Who was the last to say yes has died before it could settle it.
                    return self._conclude(key, outcome)
                error = None if watch is None else watch()
                if error is not None:
                    return self.abort(key, error)
            if watch is None and now - began > self._timeout_s + AFTER_TRANSFERS_S:
                return self.abort(key, late(key, self.missing(key), self._timeout_s))
            time.sleep(min(_LONGEST_NAP_S, max(_NAP_S, (now - began) / 10)))
        return decision

    def settle(self, key: str, decision: Decision) -> Decision:
        """Settle `key` unless it is settled, and return what stands."""
        value = self._control.settle(_decision(key), msgspec.msgpack.encode(decision))
        return _decode(value)

    def abort(self, key: str, error: BaseException) -> Decision:
        """Settle `key` as an abort because of `error`, unless it is settled, and return what stands."""
        return self.settle(key, decision_of(error, self._control.rank))

    def require_store(self) -> None:
        """Return unless the store is known to be gone, so that nothing is begun that cannot be decided.

        Raises:
            ControlPlaneError: it is.
        """
        self._control.require_store()

    def last_words(self, waited_s: float) -> AbstractContextManager[None]:
        """Ask inside the block what is left to ask after waiting `waited_s` for others in vain."""
        return self._control.last_words(waited_s, self._timeout_s)

    def missing(self, key: str) -> tuple[int, ...]:
        """Return the ranks that have not said yes to `key`."""
        said = [self._control.add(f"{key}/{word}", 0) for word in range(self._words)]
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

    def forget(self, key: str) -> None:
        """Remove a key whose decision every rank has read."""
        names = [_decision(key), *(f"{key}/{word}" for word in range(self._words))]
        self._control.forget(names if self._words == 1 else [*names, f"{key}/words"])

    def forget_flags(self, *names: str) -> None:
        """Remove flags, and the signs of life of all ranks."""
        self._control.forget([*names, *map(_beat, range(self._control.world_size))])

    def _say_yes(self, key: str) -> bool:
        """Return whether this rank was the last one."""
        word, bit = divmod(self._control.rank, _RANKS_PER_WORD)
        said = self._control.add(f"{key}/{word}", 1 << bit)
        ranks_here = min(_RANKS_PER_WORD, self._control.world_size - word * _RANKS_PER_WORD)
        if said != (1 << ranks_here) - 1:
            return False
        return self._words == 1 or self._control.add(f"{key}/words", 1) == self._words

    def _conclude(self, key: str, outcome: Callable[[], str] | str) -> Decision:
        text = outcome if isinstance(outcome, str) else outcome()
        return self.settle(key, Decision(text, self._control.rank))

    def _peek(self, key: str) -> Decision | None:
        value = self._control.settled(_decision(key))
        return None if value is None else _decode(value)


def _beat(rank: int) -> str:
    return f"beats of {rank}"


def _decision(key: str) -> str:
    return f"{key}/decision"


def decision_of(error: BaseException, rank: int) -> Decision:
    """Return how `rank` gives up because of `error`."""
    peers: tuple[int, ...] = ()
    phase, usable, text = "", False, f"{type(error).__name__}: {error}"
    if isinstance(error, TransferError):
        peers, phase, usable, text = error.peers, error.phase, error.usable, error.what
    return Decision(ABORT, rank, type(error).__name__, text[:_TEXT_LIMIT], peers, phase, usable)


def late(key: str, missing: tuple[int, ...], timeout_s: float) -> TransferTimeoutError:
    """Return the error of a rank that has waited for `missing` in vain."""
    return TransferTimeoutError(
        f"{ranks_text(missing)} did not end {key} within {timeout_s:g} s", peers=missing, phase="commit"
    )


def error_of(decision: Decision, rank: int, *, usable: bool) -> TransferError:
    """Return what `rank` raises because of an abort: an error of the class that the rank that settled it met.

    Args:
        decision: the abort.
        rank: this rank.
        usable: whether this rank's communicator can be used again.
    """
    kind = _CLASSES.get(decision.error, TransferError)
    peers = set(decision.peers) - {rank} or {decision.rank}
    what = decision.text if decision.rank == rank else f"rank {decision.rank} could not go on: {decision.text}"
    return kind(what, peers=peers, phase=decision.phase or "commit", usable=usable)


def who_is_to_blame(error: BaseException, decision: Decision, rank: int) -> BaseException:
    """Return what `rank` should raise for its own `error`, given how the ranks decided.

    A rank that waited in vain for one that had given up itself blames the wrong one; the decision says who it was.
    """
    misled = (
        decision.aborted
        and isinstance(error, TransferError)
        and decision.rank in error.peers
        and set(decision.peers) - {rank, decision.rank}
    )
    return error_of(decision, rank, usable=False) if misled else error


def _decode(value: bytes) -> Decision:
    try:
        return msgspec.msgpack.decode(value, type=Decision)
    except UNREADABLE as error:
        raise ControlPlaneError("what the ranks have decided cannot be read", why=str(error)) from error
