"""Calls that all ranks make together, however their earlier ones went.

Ranks that count their calls each for itself are out of step once one of them has skipped a call, or raised before it
came to it: it would take an old answer for a new one. So a number is given up where a rank has waited for it in vain,
and the next call of every rank is at the first number that is not: they meet again there, and a rank that still waits
at a number that others have given up comes along.

Every number ends the same way for all ranks: *met*, which takes that every rank has said something there and that it
stands, or *void*. Where ranks share memory (`eplb_core.control.board`), no message to the store is needed for that:

- A rank says something once at a number, and takes nothing back. It has met once it sees that all have, and after
  that no sign that somebody has withdrawn.
- Who gives up shows first that it withdraws, and looks after that what has been said. If everything is there, some
  rank may have met, and it proposes *met*; otherwise no rank has, nor will, and it proposes *void*. The first proposal
  that reaches the store stands (a compare-and-set). Whoever sees a sign of withdrawal does the same.

Without a board each rank settles each number at the store. Gathering within a call follows the same rules.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

from eplb_core.control.board import CAPACITY, Board
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import ControlPlaneError
from eplb_core.words import ranks_text

_MET, _VOID = b"met", b"void"
_ROUNDS = 1 << 16
"""How many rounds of gathering a call may have; the first is the call itself."""

_BOARD_AFTER = (3, 17, 129)
"""After how many rounds that were met ranks try to get a board, until they have one. Most have few."""

_BOARD_S = 1.0  # how long they wait for one another then
_NAP_S = 50e-6
_LONGEST_NAP_S = 20e-3
_WATCH_S = 0.1
_SEEN_S = 1e-3  # after which what a core has written is seen by all others, by far

Stands = Callable[[Sequence[bytes]], bool]


class Calls:
    """The calls of one object that every rank has.

    Args:
        control: a control plane that only this object uses.
        stands: whether what all ranks have said can be taken for their answers. If not, a rank that has said something
            outdated will take part in a later number. It must depend on nothing else.
    """

    def __init__(self, control: ControlPlane, stands: Stands = lambda said: True) -> None:
        self._control = control
        self._stands = stands
        self._number = 0
        self._open: int | None = None  # the round in which this rank has said something, and which is not ended
        self._met = 0
        self._board: Board | None = None
        self._left: list[str] = []  # at the store, until all ranks have met again
        self._alone = b""  # what a rank without others has said

    def meet(self, what: str, payload: bytes, timeout_s: float) -> tuple[Call, list[bytes]]:
        """Say `payload`, and return what every rank says in this call, in rank order, once all are here.

        Args:
            what: what the call is, for the error message.
            payload: what the call is for; the caller compares.
            timeout_s: how long to wait for the slowest rank, in seconds.

        Returns:
            The call, in which ranks gather and settle other things; and what they have said.

        Raises:
            ControlPlaneError: a rank did not come in time (`missing` says which), or the store is gone.
        """
        deadline = time.monotonic() + timeout_s
        blamed: list[int] = []
        while True:
            self.say(payload)
            number = self._number
            said, others = self._end(number * _ROUNDS, deadline)
            if said is not None:
                return Call(self, self._control, number), said
            # One that came to an earlier number, and gave up there, is not who was waited for.
            blamed = [rank for rank in others if rank in blamed] or others or blamed
            if time.monotonic() > deadline:
                raise _late(what, timeout_s, blamed)

    def say(self, payload: bytes) -> None:
        """Say `payload` in the next call, without waiting for anybody.

        Raises:
            ControlPlaneError: the store is gone.
        """
        self.unsay()
        if self._board is not None:
            written, withdrawn = self._board.furthest()
            self._number = max(self._number, written // _ROUNDS, withdrawn // _ROUNDS + 1)
        elif self._control.world_size > 1:
            while self._control.settled(_name(self._number * _ROUNDS)) is not None:
                self._number += 1
        self._say(self._number * _ROUNDS, payload)

    def unsay(self) -> None:
        """Take back what this rank has said without waiting, unless all others have come since.

        Raises:
            ControlPlaneError: the store is gone.
        """
        if self._open is not None:
            self._settle(self._open)

    def gather(self, round_: int, what: str, payload: bytes, timeout_s: float) -> list[bytes]:
        """Return what every rank says in a round of a call that was met. Either all ranks get it, or none.

        Raises:
            ControlPlaneError: a rank did not come in time, or has given up; or the store is gone.
        """
        self._say(round_, payload)
        said, blamed = self._end(round_, time.monotonic() + timeout_s)
        if said is None:
            raise _late(what, timeout_s, blamed)
        return said

    # --- one round --------------------------------------------------------------------------------------------------

    def _say(self, round_: int, payload: bytes) -> None:
        fits = len(payload) <= CAPACITY
        self._open = round_
        if self._control.world_size == 1:
            self._alone = payload
            return
        if self._board is None or not fits:
            name = _name(round_)
            self._left.append(f"{name}@{self._control.rank}")
            self._control.publish(name, payload)
        if self._board is not None:
            self._board.write(round_, payload if fits else None)

    def _end(self, round_: int, deadline: float) -> tuple[list[bytes] | None, list[int]]:
        """Wait for the end of a round: return what all ranks have said, or None and the ranks that are missing."""
        try:
            if self._control.world_size == 1:
                said: list[bytes] | None = [self._alone]
            elif self._board is not None:
                said = self._wait_at_board(self._board, round_, deadline)
            else:
                said = self._wait_at_store(round_, deadline)
            if said is None:
                return self._settle(round_)
        except BaseException:
            with contextlib.suppress(ControlPlaneError):  # so that nobody waits for a rank that was interrupted
                self.unsay()
            raise
        self._has_met(round_)
        return said, []

    def _wait_at_board(self, board: Board, round_: int, deadline: float) -> list[bytes] | None:
        """Return what all ranks have said, if they have met; None if that is to be settled."""
        while True:
            found, missing = board.wait(round_, deadline, until_contested=True)
            if missing:
                return None
            said = self._fetched(round_, found)
            if self._stands(said):
                return None if board.contested(round_) else said
            if board.contested(round_) or time.monotonic() > deadline:
                return None
            time.sleep(_NAP_S)

    def _wait_at_store(self, round_: int, deadline: float) -> list[bytes] | None:
        name = _name(round_)
        began = watched = time.monotonic()
        while True:
            said = self._control.collected(name)
            if said is not None and self._stands(said):
                return said if self._propose(round_, _MET) == _MET else None
            now = time.monotonic()
            if now - watched > _WATCH_S:
                watched = now
                if self._control.settled(name) is not None:
                    return None
            if now > deadline:
                return None
            time.sleep(min(_LONGEST_NAP_S, max(_NAP_S, (now - began) / 10)))

    def _settle(self, round_: int) -> tuple[list[bytes] | None, list[int]]:
        """End a round that this rank does not wait for any longer, as `_end` does."""
        with self._control.last_words(0.0, 0.0):
            return self._settle_now(round_)

    def _settle_now(self, round_: int) -> tuple[list[bytes] | None, list[int]]:
        if self._board is not None:
            self._board.withdraw(round_)
            time.sleep(_SEEN_S)
        said, missing = self._said(round_)
        proposal = _VOID + b" " + ",".join(map(str, missing)).encode()
        if said is not None and self._stands(said):
            proposal = _MET
        verdict = self._propose(round_, proposal)
        if verdict == _MET:
            said = said or self._said(round_)[0]  # one that came last has seen them all
            self._has_met(round_)
            return said, []
        self._open = None
        self._number = round_ // _ROUNDS + 1
        blamed = verdict.decode().partition(" ")[2].split(",")
        return None, [int(rank) for rank in blamed if rank.isdigit()]

    def _propose(self, round_: int, how: bytes) -> bytes:
        """Return how a round has ended: as proposed, unless it had before."""
        if self._control.world_size == 1:
            return how
        name = _name(round_)
        if name not in self._left:
            self._left.append(name)
        return self._control.settle(name, how)

    def _said(self, round_: int) -> tuple[list[bytes] | None, list[int]]:
        """Return what all ranks have said by now; or None, and who has not, or has said what does not stand."""
        if self._control.world_size == 1:
            return [self._alone], []
        if self._board is not None:
            found, missing = self._board.wait(round_, 0.0)
            return (None, missing) if missing else (self._fetched(round_, found), [])
        said = self._control.collected(_name(round_))
        return (None, self._control.unpublished(_name(round_))) if said is None else (said, [])

    def _fetched(self, round_: int, found: Sequence[bytes | None]) -> list[bytes]:
        """Return the messages, those that did not fit on the board from the store."""
        name = _name(round_)
        return [
            self._control.fetch(rank, name, _BOARD_S) if message is None else message
            for rank, message in enumerate(found)
        ]

    def _has_met(self, round_: int) -> None:
        """Go on behind a round that all ranks were here for; they have done with all before."""
        self._open = None
        if not round_ % _ROUNDS:
            self._number = round_ // _ROUNDS + 1
        self._met += 1
        if self._board is not None:
            self._board.keep()
        if self._left:
            name = _name(round_)
            mine = name, f"{name}@{self._control.rank}"
            self._control.forget([each for each in self._left if each not in mine])
            self._left = [each for each in self._left if each in mine]
        if self._board is None and self._met in _BOARD_AFTER and self._control.world_size > 1:
            self._board, left = self._control.meet_at_board(f"board {self._met}", time.monotonic() + _BOARD_S)
            self._left += left


class Call(ControlPlane):
    """What the ranks say and settle in one call that all of them make.

    Attributes:
        number: which call it is: 1 for the first, the same on every rank, and more for each later one.
        name: for `ControlPlane.scoped`, of another control plane of the same ranks.
    """

    def __init__(self, calls: Calls, control: ControlPlane, number: int) -> None:
        self.name = f"call {number}"
        self.number = number + 1
        scoped = control.scoped(self.name)
        super().__init__(scoped._store, scoped.rank, scoped.world_size, connection=scoped._connection)
        self._calls = calls
        self._next = number * _ROUNDS + 1

    def all_gather(self, what: str, payload: bytes, timeout_s: float) -> list[bytes]:
        """Return the payload of every rank, in rank order, as `ControlPlane.all_gather`: on all ranks or on none."""
        self._next += 1
        return self._calls.gather(self._next - 1, what, payload, timeout_s)


def _name(round_: int) -> str:
    number, within = divmod(round_, _ROUNDS)
    return f"met {number}" if not within else f"met {number}.{within}"


def _late(what: str, timeout_s: float, missing: list[int]) -> ControlPlaneError:
    return ControlPlaneError(
        f"{ranks_text(missing) if missing else 'a rank'} did not answer within {timeout_s:g} s, while gathering {what}",
        missing=missing,
        why="dead, stopped, still busy, or not taking part in this call",
        remedy="look at the log of that rank; every rank must make the same calls in the same order",
    )
