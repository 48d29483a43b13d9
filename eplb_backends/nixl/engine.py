"""Drives the rounds in flight: polls, dispatches notifications, and gives up if a peer does nothing."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from eplb_backends.nixl.agent import NixlError
from eplb_backends.nixl.messages import Kind, Message
from eplb_backends.nixl.peers import Peers
from eplb_backends.nixl.round import Round
from eplb_core.errors import EplbError, PeerLostError, TransferError, TransferTimeoutError
from eplb_core.words import ranks_text

_POLLS = 4  # polls in a row without a notification, before other work is done meanwhile
_SPINS = 20  # polls in a row before the first nap
_NAP_S = 20e-6
_LONGEST_NAP_S = 500e-6  # while nothing happens, an idle rank leaves the core to others
_NO_MORE = object()
_LOOK_S = 0.05  # between two checks for late peers
_ANSWER_S = 1.0  # how long a suspect may take to answer, and then half of it to name the rank to blame
_LAST_WORDS_S = 0.02  # how long to look for messages that a rank sent before it was gone


class Engine:
    """The rounds of one communicator, oldest first.

    Args:
        peers: the other ranks.
        timeout_s: the longest time in which a peer that has something to do may do nothing, in seconds.
    """

    def __init__(self, peers: Peers, timeout_s: float) -> None:
        self._peers = peers
        self._timeout_s = timeout_s
        self._rounds: deque[Round] = deque()
        self._early: list[tuple[int, Message]] = []
        self._gone: dict[int, Message] = {}
        self._answers: dict[int, float] = {}
        self._ask_again: dict[int, float] = {}

    def start(self, this: Round) -> None:
        """Start a round. Rounds are started in the order of their epochs."""
        self._rounds.append(this)
        early, self._early = self._early, []
        with self._telling():
            self._refuse_gone()
            for rank, message in early:
                self._hand_out(rank, message)
            self._advance()

    def wait(self, this: Round, work: Iterator[object] | None = None) -> None:
        """Wait until a round has ended; the others advance meanwhile, and `work` does while nothing happens.

        Raises:
            TransferMismatchError: a peer announced something else than is expected here, or the other way round.
            TransferTimeoutError: a peer did nothing for too long.
            PeerLostError: a peer is gone.
            TransferError: a peer gave up, or NIXL failed.
        """
        with self._telling():
            left = iter(()) if work is None else work
            idle = 0
            look_at = time.monotonic() + _LOOK_S
            while not this.ended:
                idle = 0 if self._advance() else idle + 1
                # By the clock, since other peers may keep this rank busy indefinitely.
                if time.monotonic() > look_at:
                    self._look(this)
                    look_at = time.monotonic() + _LOOK_S
                if idle > _POLLS and next(left, _NO_MORE) is not _NO_MORE:
                    continue
                if idle > _SPINS:
                    time.sleep(min(_NAP_S * (idle - _SPINS), _LONGEST_NAP_S))
        self._rounds.remove(this)

    def _advance(self) -> bool:
        """Process every notification and every round once; return whether anything happened."""
        happened = False
        for rank, message in self._peers.receive():
            happened = True
            self._hand_out(rank, message)
        may_pack = True
        for this in self._rounds:
            happened |= this.advance(may_pack)
            may_pack &= this.fully_packed
        return happened

    def _hand_out(self, rank: int, message: Message) -> None:
        match message.kind:
            case Kind.PING:
                self._tell([rank], self._rounds[0].writer.pong(self._idle_s()))
            case Kind.PONG:
                self._answers[rank] = message.idle_s()
            case Kind.BYE:
                pass  # `Peers` remembers the ranks that left
            case Kind.FAILED:
                self._gone[rank] = message
                self._refuse_gone()
            case _:
                this = next((r for r in self._rounds if r.epoch == message.epoch), None)
                if this is not None:
                    this.handle(rank, message)
                elif message.epoch > self._rounds[-1].epoch:
                    self._early.append((rank, message))

    # --- giving up --------------------------------------------------------------------------------------------------

    def _refuse_gone(self) -> None:
        """Raise if a rank that takes part in a round has given up, in this round or another one."""
        for rank, message in self._gone.items():
            if any(rank in this.partners for this in self._rounds):
                raise self._gave_up(rank, message)

    def _gave_up(self, rank: int, message: Message) -> TransferError:
        blamed, text = message.failure()
        others = [other for other in blamed if other != self._peers.rank]
        if others:
            what = f"{ranks_text(others)} failed, as rank {rank} reports"
            return PeerLostError(what, peers=others, phase="read", why=text)
        on_whom = " on this rank" if blamed else ""
        return TransferError(f"rank {rank} gave up{on_whom}", peers=[rank], phase="read", why=text)

    def _idle_s(self) -> float:
        """Return the seconds since the last activity of any rank in any round."""
        return time.monotonic() - max(max(this.progress.values(), default=this.created_at) for this in self._rounds)

    def _look(self, this: Round) -> None:
        """Give up on peers that owe something and did nothing for too long, or on this rank's stream."""
        now = time.monotonic()
        late = {rank: r for rank, r in self._late().items() if now > self._ask_again.get(rank, 0.0)}
        if late:
            self._ask(late)
        if not this.begun and now > this.created_at + self._timeout_s:
            raise TransferTimeoutError(
                f"the work enqueued before the transfer did not end within {self._timeout_s:g} s",
                phase="begin",
                why="the stream of this rank is stuck or very busy",
            )

    def _late(self) -> dict[int, Round]:
        """Return the peers that owe something and did nothing for too long, with the round they are late in."""
        oldest = time.monotonic() - self._timeout_s
        late: dict[int, Round] = {}
        for this in self._rounds:
            for rank in this.waits_for:
                if max(other.progress.get(rank, 0.0) for other in self._rounds) < oldest:
                    late.setdefault(rank, this)
        return late

    def _ask(self, late: dict[int, Round]) -> None:
        """Ping the late peers.

        A peer that does not answer is to blame. A peer whose own transfers make progress, or did less than the timeout
        ago, is itself waiting: it learns earlier than this rank which one is to blame, and reports it (FAILED), so it
        is asked again later. A peer that has been stuck as long as this rank must report at once.

        Raises:
            TransferTimeoutError: it names the peers that do not answer, or else those that are stuck.
        """
        asked = time.monotonic()
        self._answers.clear()
        self._tell(late, self._rounds[0].writer.ping())
        self._advance_until(asked + _ANSWER_S, lambda: self._answers.keys() >= late.keys())
        late = {rank: this for rank, this in self._late().items() if rank in late}
        silent = late.keys() - self._answers.keys()
        if silent:
            raise self._timed_out(late, silent, "dead, stopped, or not in this transfer")
        for rank, idle_s in self._answers.items():
            self._ask_again[rank] = asked + max(self._timeout_s - idle_s, _LOOK_S)
        still = {rank for rank in late if self._answers[rank] >= self._timeout_s}
        if still:
            self._advance_until(asked + _ANSWER_S * 1.5, lambda: not still & self._late().keys())
            still &= self._late().keys()
            if still:
                raise self._timed_out(late, still, "alive, but waiting or slow")

    def _advance_until(self, deadline: float, done: Callable[[], bool]) -> None:
        while time.monotonic() < deadline and not done():
            self._advance()  # raises if a peer sends FAILED, which names the rank to blame
            time.sleep(_LONGEST_NAP_S)

    def _timed_out(self, late: Mapping[int, Round], named: Iterable[int], state: str) -> TransferTimeoutError:
        undone = [late[rank].undone(rank) for rank in sorted(named)]
        return TransferTimeoutError(
            f"{ranks_text(named)} did nothing for {self._timeout_s:g} s",
            peers=named,
            phase=undone[0][0],
            why="; ".join(text for _, text in undone) + f" ({state})",
            remedy="look at the log of that rank; if it was only slow, raise the timeout option",
        )

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """When this rank gives up, inform all known peers: they may be waiting for it, now or in a later round."""
        try:
            yield
        except PeerLostError as error:
            explained = self._last_words(error)
            self._leave(explained)
            if explained is error:
                raise
            raise explained from error
        except BaseException as error:
            self._leave(error)
            raise

    def _last_words(self, lost: PeerLostError) -> TransferError:
        """Return which ranks a lost peer blamed before it left, if any; its message may still be unread."""
        deadline = time.monotonic() + _LAST_WORDS_S
        while time.monotonic() < deadline:
            with contextlib.suppress(TransferError):
                for rank, message in self._peers.receive():
                    if message.kind == Kind.FAILED and rank in lost.peers:
                        return self._gave_up(rank, message)
            time.sleep(_LONGEST_NAP_S)
        return lost

    def _leave(self, error: BaseException) -> None:
        """Send the reason to all others, and release the rounds."""
        blamed = error.peers if isinstance(error, TransferError) else ()
        self._peers.lost.update(blamed)
        text = error.what if isinstance(error, EplbError) else f"{type(error).__name__}: {error}"
        others = self._peers.known.union(*(this.partners for this in self._rounds))
        self._tell(others, self._rounds[0].writer.failed(blamed, text))
        self._rounds.clear()

    def _tell(self, ranks: Iterable[int], raw: bytes) -> None:
        """Send to each rank that can be reached."""
        for rank in ranks:
            with contextlib.suppress(NixlError, TransferError):
                self._peers.send(rank, raw)
