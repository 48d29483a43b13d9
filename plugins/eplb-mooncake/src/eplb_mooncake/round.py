"""One transfer in flight: offer chunks, read those of the peers, and learn when the own chunks were read."""

from __future__ import annotations

import select
import time
from collections import Counter, deque
from dataclasses import dataclass

from eplb_core.errors import PeerLostError, TransferError, TransferTimeoutError
from eplb_core.words import ranks_text
from eplb_mooncake.chunks import Chunk
from eplb_mooncake.engine import Engine
from eplb_mooncake.links import Kind, Link
from eplb_mooncake.regions import Regions
from eplb_mooncake.window import Window

_MOST_OFFERED = 64
_MOST_READS = 16  # at once; more are not faster, and each must be polled
_NAP_S = 100e-6  # between two polls of READs, which send no wake-up
_RETRY_S = 0.05
_LONGEST_WAIT_S = 1.0


@dataclass(slots=True)
class _Read:
    """A chunk of a peer that is being read, or must be read again.

    Attributes:
        link: to the peer.
        ticket: the peer's number for it.
        address: its address at the peer.
        chunk: its destination here.
        slot: the slot that it is read into, or None if it is read in place.
        not_before: when to start it, in `time.monotonic()` seconds.
    """

    link: Link
    ticket: int
    address: int
    chunk: Chunk
    slot: int | None = None
    not_before: float = 0.0


class Round:
    """The chunks of one `execute()`.

    Args:
        engine: with every peer open.
        window: with all slots free.
        links: to all peers.
        readable: registered memory that peers may read in place.
        landing: registered memory that may be read into in place.
        outgoing: peer -> chunks for it.
        incoming: peer -> chunks from it.
        timeout_s: how long a peer that owes something may do nothing, in seconds.
    """

    def __init__(
        self,
        engine: Engine,
        window: Window,
        links: dict[int, Link],
        readable: Regions,
        landing: Regions,
        outgoing: dict[int, deque[Chunk]],
        incoming: dict[int, deque[Chunk]],
        timeout_s: float,
    ) -> None:
        self._engine = engine
        self._window = window
        self._links = links
        self._readable = readable
        self._landing = landing
        self._outgoing = outgoing
        self._incoming = incoming
        self._timeout_s = timeout_s
        self._turns = deque(outgoing)
        self._tickets = 0
        self._offered: dict[int, tuple[int, int | None]] = {}  # ticket -> peer, slot
        self._not_taken = {peer: len(chunks) for peer, chunks in outgoing.items()}
        self._not_read = {peer: len(chunks) for peer, chunks in incoming.items()}
        self._to_read: deque[_Read] = deque()
        self._reading: dict[int, _Read] = {}  # the engine's number of a READ -> what it reads
        self._failed_reads: Counter[int] = Counter()
        self._heard = dict.fromkeys({*outgoing, *incoming}, time.monotonic())
        self._poll = select.poll()
        self._by_handle = {links[peer].connection.fileno(): links[peer] for peer in self._heard}
        for handle in self._by_handle:
            self._poll.register(handle, select.POLLIN)
        self.pack_s = 0.0
        self.unpack_s = 0.0
        self.reads = 0

    def run(self) -> None:
        """Wait until every chunk is read, on both sides.

        Raises:
            TransferTimeoutError: a peer did nothing for too long.
            PeerLostError: a peer is gone, or gave up because of another one.
            TransferError: a peer violates the protocol.
        """
        while self._not_taken or self._not_read:
            offered = self._offer_next()
            started = self._start_next()
            ended = self._end_reads()
            if offered or started or ended:
                self._listen(0.0)
            elif self._reading or self._to_read:
                if not self._listen(0.0):
                    time.sleep(_NAP_S)
            else:
                self._listen(self._patience_s())
            self._check_overdue()

    def _offer_next(self) -> bool:
        """Offer the next chunk to the peer whose turn it is; return whether there was one, and room for it."""
        if not self._turns or len(self._offered) >= _MOST_OFFERED:
            return False
        peer = self._turns[0]
        chunk = self._outgoing[peer][0]
        address = chunk.address()
        slot: int | None = None
        if address is None or not self._readable.cover(address, chunk.nbytes):
            if not self._window.to_send:
                return False
            began = time.perf_counter()
            slot = self._window.to_send.pop()  # the last one freed is still in the cache
            chunk.pack(self._window.slot(slot))
            address = self._window.address(slot)
            self.pack_s += time.perf_counter() - began
        self._turns.popleft()
        self._outgoing[peer].popleft()
        if self._outgoing[peer]:
            self._turns.append(peer)
        if not any(other == peer for other, _ in self._offered.values()):
            self._heard[peer] = time.monotonic()  # up to now it had nothing to do
        self._offered[self._tickets] = (peer, slot)
        self._send(self._links[peer], Kind.READY, self._tickets, address)
        self._tickets += 1
        return True

    def _listen(self, patience_s: float) -> bool:
        """Process the peers' messages; return whether there were any."""
        ready = self._poll.poll(patience_s * 1000)
        for handle, _ in ready:
            self._hear(self._by_handle[handle])
        return bool(ready)

    def _hear(self, link: Link) -> None:
        self._heard[link.peer] = time.monotonic()
        try:
            for message in link.messages():
                if message.kind is Kind.READY:
                    self._accept(link, message.number, message.address)
                elif message.kind is Kind.TAKEN:
                    self._free(link, message.number)
                else:
                    raise PeerLostError(
                        f"rank {link.peer} gave up", peers={message.number, link.peer}, phase="move", why=message.text
                    )
        except PeerLostError:
            raise
        except OSError as error:
            if link.peer in self._not_taken or link.peer in self._not_read:
                raise _lost(link, error) from error
            self._poll.unregister(link.connection)  # it has finished this transfer, and may have closed since

    def _accept(self, link: Link, ticket: int, address: int) -> None:
        chunks = self._incoming.get(link.peer)
        if not chunks:
            raise _broken(link, "it offers more than it queued")
        self._to_read.append(_Read(link, ticket, address, chunks.popleft()))

    def _free(self, link: Link, ticket: int) -> None:
        peer, slot = self._offered.pop(ticket, (None, None))
        if peer != link.peer:
            raise _broken(link, f"it took a chunk that it was not offered, ticket {ticket}")
        if slot is not None:
            self._window.to_send.append(slot)
        self._not_taken[peer] -= 1
        if not self._not_taken[peer]:
            del self._not_taken[peer]

    def _start_next(self) -> bool:
        """Start the READ that has waited longest, if there is room; return whether one was started."""
        if not self._to_read or len(self._reading) >= _MOST_READS:
            return False
        read = self._to_read[0]
        if read.not_before > time.monotonic():
            self._to_read.rotate(-1)
            return False
        local = read.chunk.address()
        if local is None or not self._landing.cover(local, read.chunk.nbytes):
            if read.slot is None:
                if not self._window.to_receive:
                    return False
                read.slot = self._window.to_receive.pop()
            local = self._window.address(read.slot)
        self._to_read.popleft()
        self.reads += 1
        batch = self._engine.start_read(read.link.engine, local, read.address, read.chunk.nbytes)
        if batch is None:
            self._put_off(read)
        else:
            self._reading[batch] = read
        return True

    def _end_reads(self) -> bool:
        """Unpack completed READs; return whether there were any."""
        ended = False
        for batch, read in list(self._reading.items()):
            arrived = self._engine.finished(batch)
            if arrived is None:
                continue
            ended = True
            del self._reading[batch]
            if not arrived:
                self._put_off(read)
                continue
            if read.slot is not None:
                began = time.perf_counter()
                read.chunk.unpack(self._window.slot(read.slot))
                self._window.to_receive.append(read.slot)
                self.unpack_s += time.perf_counter() - began
            peer = read.link.peer
            self._heard[peer] = time.monotonic()
            self._not_read[peer] -= 1
            if not self._not_read[peer]:
                del self._not_read[peer]
            self._send(read.link, Kind.TAKEN, read.ticket, 0)
        return ended

    def _put_off(self, read: _Read) -> None:
        """Read it again a little later: by then a dead peer's connection is closed; other faults may pass."""
        self._failed_reads[read.link.peer] += 1
        read.not_before = time.monotonic() + _RETRY_S
        self._to_read.append(read)

    def _send(self, link: Link, kind: Kind, ticket: int, address: int) -> None:
        try:
            link.send(kind, ticket, address)
        except OSError as error:
            raise _lost(link, error) from error

    def _busy(self) -> set[int]:
        """Return the peers that owe something."""
        return {*self._not_read, *(peer for peer, _ in self._offered.values())}

    def _patience_s(self) -> float:
        first = min((self._heard[peer] for peer in self._busy()), default=0.0)
        return min(max(first + self._timeout_s - time.monotonic(), 0.001), _LONGEST_WAIT_S)

    def _check_overdue(self) -> None:
        late = time.monotonic() - self._timeout_s
        silent = sorted(peer for peer in self._busy() if self._heard[peer] < late)
        if silent:
            failed = sum(self._failed_reads[peer] for peer in silent)
            raise TransferTimeoutError(
                f"{ranks_text(silent)} did nothing for {self._timeout_s:g} s",
                peers=silent,
                phase="move",
                why=f"{failed} READs failed; Mooncake's reason is on stderr" if failed else None,
                remedy="check the log of that rank; if it was only slow, raise the timeout option",
            )


def _lost(link: Link, error: OSError) -> PeerLostError:
    return PeerLostError(f"rank {link.peer} is gone", peers=[link.peer], phase="move", why=str(error))


def _broken(link: Link, why: str) -> TransferError:
    return TransferError(f"rank {link.peer} violates the protocol", peers=[link.peer], phase="move", why=why)
