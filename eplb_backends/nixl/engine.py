"""Drives the rounds that are under way: polls, hands notifications out, and gives up when a peer does nothing."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Iterator

from eplb_backends.nixl.agent import NixlError
from eplb_backends.nixl.messages import Kind, Message
from eplb_backends.nixl.naming import ranks_text
from eplb_backends.nixl.peers import Peers
from eplb_backends.nixl.round import Round
from eplb_core.errors import TransferError, TransferTimeoutError

_SPINS = 20  # polls in a row before the first nap
_NAP_S = 20e-6
_LONGEST_NAP_S = 500e-6  # while nothing happens a rank leaves the core to those that have work
_ANSWER_S = 1.0  # how long a suspect may take to say that it is alive, and then half of it to say who is to blame


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
        self._alive: set[int] = set()

    def start(self, this: Round) -> None:
        """Put a round under way. Rounds are started in the order of their epochs."""
        self._rounds.append(this)
        early, self._early = self._early, []
        with self._telling():
            for rank, message in early:
                self._hand_out(rank, message)
            self._advance()

    def wait(self, this: Round) -> None:
        """Return when a round has ended; the others go on meanwhile.

        Raises:
            TransferMismatchError: a peer announced something else than is expected here, or the other way round.
            TransferTimeoutError: a peer did nothing for too long.
            PeerLostError: a peer is gone.
            TransferError: a peer gave up, or NIXL failed.
        """
        with self._telling():
            idle = 0
            while not this.ended:
                if self._advance():
                    idle = 0
                    continue
                idle += 1
                if idle > _SPINS:
                    late = self._late()
                    if late:
                        self._give_up(late)
                    if not this.begun and time.monotonic() > this.created_at + self._timeout_s:
                        raise TransferTimeoutError(
                            f"what was enqueued before the transfer did not end within {self._timeout_s:g} s",
                            phase="begin",
                            why="the stream of this rank is stuck, or very busy",
                        )
                    time.sleep(min(_NAP_S * (idle - _SPINS), _LONGEST_NAP_S))
        self._rounds.remove(this)

    def _advance(self) -> bool:
        """Look at every notification and every round once; return whether anything had happened."""
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
        if message.kind == Kind.PING:
            self._tell([rank], self._rounds[0].writer.pong() if self._rounds else b"")
        elif message.kind == Kind.PONG:
            self._alive.add(rank)
        else:
            this = next((r for r in self._rounds if r.epoch == message.epoch), None)
            if this is not None:
                this.handle(rank, message)
            elif not self._rounds or message.epoch > self._rounds[-1].epoch:
                self._early.append((rank, message))

    # --- giving up --------------------------------------------------------------------------------------------------

    def _late(self) -> dict[int, Round]:
        """Return the peers that have something to do and did nothing for too long, with the round they are late in."""
        oldest = time.monotonic() - self._timeout_s
        late: dict[int, Round] = {}
        for this in self._rounds:
            for rank in this.waits_for:
                if max(other.progress.get(rank, 0.0) for other in self._rounds) < oldest:
                    late.setdefault(rank, this)
        return late

    def _give_up(self, late: dict[int, Round]) -> None:
        """Raise an error that names those of the late peers that do not even answer, or else all of them."""
        undone = {rank: this.undone(rank) for rank, this in sorted(late.items())}
        self._alive.clear()
        self._tell(late, self._rounds[0].writer.ping())
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline and not self._alive.issuperset(late):
            self._advance()  # raises if a peer says FAILED, which names the rank that is really to blame
            time.sleep(_LONGEST_NAP_S)
        silent = [rank for rank in undone if rank not in self._alive]
        while not silent and time.monotonic() < deadline + _ANSWER_S / 2:
            self._advance()
            time.sleep(_LONGEST_NAP_S)
        named = silent or list(undone)
        raise TransferTimeoutError(
            f"{ranks_text(named)} did nothing for {self._timeout_s:g} s",
            peers=named,
            phase=undone[named[0]][0],
            why="; ".join(text for _, text in undone.values())
            + (" (dead, stopped, or not in this transfer)" if silent else " (alive, but waiting or slow)"),
            remedy="look at the log of that rank; if it was only slow, raise the timeout option",
        )

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """When this rank gives up, say so to all that may be waiting for it, also to those that it blames."""
        try:
            yield
        except TransferError as error:
            for this in self._rounds:
                self._tell(this.partners, this.writer.failed(error.peers, error.what))
            raise

    def _tell(self, ranks: Iterable[int], raw: bytes) -> None:
        """Send to each rank, as far as that is possible."""
        for rank in ranks:
            with contextlib.suppress(NixlError, TransferError):
                self._peers.send(rank, raw)
