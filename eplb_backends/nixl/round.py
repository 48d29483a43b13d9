"""One round: everything that one `execute()` sends and receives. No collective; every wait has a deadline.

    source                                   destination
    READY  where the messages lie    ---->   compares sizes and dtypes
                                             READs what can be read in place
    packs a slot, CHUNK              ---->   READs the slot
    frees the slot                   <----   TAKEN
    may overwrite everything         <----   DONE

A rank that gives up says FAILED, and which ranks are to blame, to all that wait for it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from eplb_backends.nixl.agent import NixlError
from eplb_backends.nixl.inbox import Inbox, Incoming
from eplb_backends.nixl.memory import SlotPool
from eplb_backends.nixl.messages import Kind, Message, Writer
from eplb_backends.nixl.naming import naming, ranks_text
from eplb_backends.nixl.outbox import Outbox, Outgoing
from eplb_backends.nixl.peers import Peers
from eplb_core.errors import PeerLostError, TransferError, TransferMismatchError, TransferTimeoutError

_SPINS = 20  # polls in a row before the first nap
_NAP_S = 20e-6
_LONGEST_NAP_S = 500e-6  # while nothing happens a rank leaves the core to those that have work
_ANSWER_S = 1.0  # how long a suspect may take to say that it is alive, and then to say who is to blame


class Round:
    """The state of one round.

    Args:
        peers: the other ranks.
        epoch: the number of this round.
        outgoing: destination -> what it is sent.
        incoming: source -> what it sends.
        pools: the send and the receive window.
        device: where the tensors lie.
        stream: where copies are enqueued; None means the current stream.
        expects: describes what is expected from a rank, for the error when something else is announced.
        on_read: told source, bytes and seconds of every READ that ended.
    """

    def __init__(
        self,
        peers: Peers,
        epoch: int,
        outgoing: Mapping[int, Outgoing],
        incoming: Mapping[int, Incoming],
        pools: tuple[SlotPool, SlotPool],
        device: torch.device,
        stream: torch.cuda.Stream | None,
        expects: Callable[[int], str],
        on_read: Callable[[int, int, float], None],
    ) -> None:
        self._peers = peers
        self._epoch = epoch
        self._incoming = incoming
        self._expects = expects
        self._writer = Writer(peers.token, epoch)
        self._outbox = Outbox(outgoing, pools[0], self._writer, self._send, device, stream)
        self._inbox = Inbox(
            incoming, pools[1], peers.agent, peers.name, self._writer, self._send, device, stream, on_read
        )
        self._partners = {*outgoing, *incoming}
        self._progress: dict[int, float] = {}
        self._alive: set[int] = set()

    @property
    def descriptors(self) -> tuple[int, int]:
        """Pieces that were read, before and after neighbours were joined."""
        return self._inbox.descriptors, self._inbox.merged_descriptors

    def run(self, timeout_s: float) -> None:
        """Return when everything is read on both sides.

        Args:
            timeout_s: the longest time in which a peer that has something to do may do nothing, in seconds.

        Raises:
            TransferMismatchError: a peer announced something else than is expected here, or the other way round.
            TransferTimeoutError: a peer did nothing for `timeout_s`.
            PeerLostError: a peer is gone.
            TransferError: a peer gave up, or NIXL failed.
        """
        try:
            self._run(timeout_s)
        except TransferError as error:
            self._tell(self._partners.difference(error.peers), self._writer.failed(error.peers, error.what))
            raise

    def _run(self, timeout_s: float) -> None:
        now = time.monotonic()
        self._progress = dict.fromkeys(self._partners, now)
        self._outbox.announce(self._peers.version)
        idle = 0
        while self._inbox.unread or self._outbox.unconfirmed:
            if self._advance():
                idle = 0
                continue
            idle += 1
            if idle > _SPINS:
                late = self._late(timeout_s)
                if late:
                    self._give_up(late, timeout_s)
                time.sleep(min(_NAP_S * (idle - _SPINS), _LONGEST_NAP_S))

    def _advance(self) -> bool:
        """Look at every READ and every notification once; return whether anything had happened."""
        touched: set[int] = set()
        for rank, message in self._peers.receive(self._epoch):
            touched.add(rank)
            self._handle(rank, message)
        touched |= self._inbox.advance()
        touched |= self._outbox.advance()
        if touched:
            now = time.monotonic()
            self._progress.update(dict.fromkeys(touched & self._partners, now))
        return bool(touched)

    def _handle(self, rank: int, message: Message) -> None:
        match message.kind:
            case Kind.PING:
                self._send(rank, self._writer.pong())
            case Kind.PONG:
                self._alive.add(rank)
            case Kind.FAILED:
                blamed, text = message.failure()
                raise _gave_up(rank, blamed, text)
            case Kind.DIFFER:
                raise TransferMismatchError(
                    f"rank {rank} expects something else than it is sent",
                    peers=[rank],
                    phase="agree",
                    why=message.text(),
                )
            case Kind.DONE:
                self._outbox.unconfirmed.discard(rank)
            case Kind.TAKEN:
                self._outbox.taken(rank, message.taken())
            case _:
                self._receive(rank, message)

    def _receive(self, rank: int, message: Message) -> None:
        """Handle what a source says."""
        incoming = self._incoming.get(rank)
        if incoming is None:
            self._refuse(rank, "nothing")
            return
        if message.kind == Kind.SUMS:
            incoming.sums.append(message.sums())
        elif message.kind == Kind.CHUNK:
            try:
                self._inbox.chunk(rank, *message.chunk())
            except ValueError as error:
                raise TransferError(
                    f"rank {rank} broke the protocol", peers=[rank], phase="read", why=str(error)
                ) from error
        else:
            version, count, digest, addresses = message.ready()
            if (count, digest) != (incoming.count, incoming.digest):
                self._refuse(rank, self._expects(rank))
            self._peers.know(rank, version)
            self._inbox.announce(rank, addresses)

    def _refuse(self, rank: int, expected: str) -> None:
        self._tell([rank], self._writer.differ(f"it expects {expected}"))
        raise TransferMismatchError(
            f"rank {rank} sends something else than is expected from it",
            peers=[rank],
            phase="agree",
            why=f"this rank expects {expected}; none of it was read",
        )

    # --- waiting and giving up --------------------------------------------------------------------------------------

    def _late(self, timeout_s: float) -> list[int]:
        """Return the peers that have something to do and did nothing for too long."""
        oldest = time.monotonic() - timeout_s
        waited_for = self._inbox.unread | self._outbox.unconfirmed
        return sorted(rank for rank in waited_for if self._progress[rank] < oldest)

    def _give_up(self, late: Sequence[int], timeout_s: float) -> None:
        """Raise an error that names those of the late peers that do not even answer, or else all of them."""
        doing = "; ".join(filter(None, map(self._undone, late)))
        phase = self._phase(late)
        self._alive.clear()
        self._tell(late, self._writer.ping())
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline and not self._alive.issuperset(late):
            self._advance()  # raises if a peer says FAILED, which names the rank that is really to blame
            time.sleep(_LONGEST_NAP_S)
        dead = [rank for rank in late if rank not in self._alive]
        while not dead and time.monotonic() < deadline + _ANSWER_S / 2:
            self._advance()
            time.sleep(_LONGEST_NAP_S)
        raise TransferTimeoutError(
            f"{ranks_text(dead or late)} did nothing for {timeout_s:g} s",
            peers=dead or late,
            phase=phase,
            why=doing + (" (dead, stopped, or not in this transfer)" if dead else " (alive, but waiting or slow)"),
            remedy="look at the log of that rank; if it was only slow, raise the timeout option",
        )

    def _phase(self, late: Sequence[int]) -> str:
        if any(rank in self._incoming and not self._incoming[rank].announced for rank in late):
            return "ready"
        return "read" if self._inbox.unread.intersection(late) else "done"

    def _undone(self, rank: int) -> str:
        incoming = self._incoming.get(rank)
        if incoming is not None and not incoming.announced:
            return f"rank {rank} did not announce what it sends"
        if rank in self._inbox.reading_from():
            return f"a READ from rank {rank} did not end"
        if rank in self._inbox.unread:
            return f"rank {rank} did not send the rest of its chunks"
        return f"rank {rank} did not confirm that it has read"

    # --- talking to peers -------------------------------------------------------------------------------------------

    def _send(self, rank: int, raw: bytes) -> None:
        with naming(rank, "notify"):
            self._peers.send(rank, raw)

    def _tell(self, ranks: Sequence[int] | set[int], raw: bytes) -> None:
        """Send to each rank, as far as that is possible."""
        for rank in ranks:
            with contextlib.suppress(NixlError, TransferError):
                self._peers.send(rank, raw)


def _gave_up(rank: int, blamed: Sequence[int], text: str) -> TransferError:
    if not blamed:
        return TransferError(f"rank {rank} gave up", peers=[rank], phase="read", why=text)
    return PeerLostError(f"{ranks_text(blamed)} failed, as rank {rank} found out", peers=blamed, phase="read", why=text)
