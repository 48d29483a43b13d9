"""Records decisions as `CommitRecord` does, for ranks of one host: in a journal instead of at the store.

The journal has one order, the same for every reader. A step is committed once every rank has said yes to it, unless one
has given it up before: whoever has the entries knows, so nobody writes the decision, and no rank's end can keep it from
being known. Who gives up writes that behind what is there, and then reads which of the two came first.
"""

from __future__ import annotations

import contextlib
import time

import msgspec

from eplb_core.control.board import rest
from eplb_core.control.commit_record import AFTER_TRANSFERS_S, COMMIT, Decision, decision_of, late
from eplb_core.control.journal import CAPACITY, JournalFile
from eplb_core.errors import ControlPlaneError


class _Entry(msgspec.Struct, array_like=True, frozen=True):
    """What a rank says.

    Attributes:
        call: which rearrangement.
        key: what is decided.
        rank: who says it.
        gives_up: why it does not go on; None says yes.
    """

    call: str
    key: str
    rank: int
    gives_up: Decision | None = None


class JournalRecord:
    """What the ranks of one rearrangement decide.

    Args:
        journal: of these ranks; nothing but this rearrangement writes to it.
        call: names the rearrangement; entries of others are passed over.
        rank: this rank.
        world_size: the number of ranks.
        timeout_s: how long to wait for the slowest rank, in seconds.
    """

    def __init__(self, journal: JournalFile, call: str, rank: int, world_size: int, timeout_s: float) -> None:
        self._journal = journal
        self._call = call
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._read = 0
        self._said: dict[str, set[int]] = {}
        self._decided: dict[str, Decision] = {}

    def decide(self, key: str) -> Decision:
        """Say yes to `key`, wait until every rank has or one has given it up, and return the decision.

        Raises:
            ControlPlaneError: the journal cannot be written or read.
        """
        self._append(_Entry(self._call, key, self._rank))
        began = time.monotonic()
        while (decision := self._look(key)) is None:
            waited = time.monotonic() - began
            left = self._timeout_s + AFTER_TRANSFERS_S - waited
            if left < 0:
                return self.abort(key, late(key, self.missing(key), self._timeout_s))
            rest(waited, left)
        return decision

    def abort(self, key: str, error: BaseException) -> Decision:
        """Give up `key` because of `error`, unless it is decided, and return what stands.

        Raises:
            ControlPlaneError: the journal cannot be written or read.
        """
        if (decision := self._look(key)) is None:
            self._append(_Entry(self._call, key, self._rank, decision_of(error, self._rank)))
            decision = self._look(key)
        if decision is None:
            raise ControlPlaneError("what was appended to the journal is not there", why=key)
        return decision

    def missing(self, key: str) -> tuple[int, ...]:
        """Return the ranks that have not said yes to `key`."""
        self._look(key)
        return tuple(rank for rank in range(self._world_size) if rank not in self._said.get(key, ()))

    def forget(self, key: str) -> None:
        """Do nothing: a journal is cleared as a whole."""

    def require_store(self) -> None:
        """Do nothing: no store is asked."""

    def last_words(self, waited_s: float) -> contextlib.AbstractContextManager[None]:
        """Change nothing: reading the journal never takes long."""
        return contextlib.nullcontext()

    def _append(self, entry: _Entry) -> None:
        encoded = msgspec.msgpack.encode(entry)
        while len(encoded) > CAPACITY and (gives_up := entry.gives_up) is not None:
            shorter = msgspec.structs.replace(gives_up, text=gives_up.text[: len(gives_up.text) // 2])
            if not gives_up.text:
                shorter = msgspec.structs.replace(gives_up, peers=gives_up.peers[:1])
            entry = msgspec.structs.replace(entry, gives_up=shorter)
            encoded = msgspec.msgpack.encode(entry)
        try:
            self._journal.append(encoded)
        except OSError as error:
            raise ControlPlaneError("the memory that decisions are written to is gone", why=str(error)) from error

    def _look(self, key: str) -> Decision | None:
        """Read what is new, and return how `key` was decided; None if it was not yet."""
        if key in self._decided:
            return self._decided[key]
        try:
            entries = [msgspec.msgpack.decode(each, type=_Entry) for each in self._journal.read(self._read)]
        except (OSError, msgspec.MsgspecError) as error:
            raise ControlPlaneError("what the ranks have decided cannot be read", why=str(error)) from error
        self._read += len(entries)
        for entry in entries:
            if entry.call == self._call and entry.key not in self._decided:
                self._take(entry)
        return self._decided.get(key)

    def _take(self, entry: _Entry) -> None:
        if entry.gives_up is not None:
            self._decided[entry.key] = entry.gives_up
            return
        said = self._said.setdefault(entry.key, set())
        said.add(entry.rank)
        if len(said) == self._world_size:
            self._decided[entry.key] = Decision(COMMIT, entry.rank)
