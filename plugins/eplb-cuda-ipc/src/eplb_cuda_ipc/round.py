"""One round: all sends and receives of one transfer. Pairwise; several rounds may be in flight.

source                                                    destination
Offer  once its stream has come to it: where all lies  ->  compares; copies once its own stream has come to it
may overwrite everything                              <-   Done

What cannot be mapped follows in chunks, packed into slots of the source's window:

Chunk  it lies in this slot                            ->  copies it out
frees the slot                                        <-   Taken

No copy is enqueued before this rank's stream has reached the transfer. So each copy ends by itself, and soon.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from eplb_core.errors import TransferError, TransferMismatchError
from eplb_cuda_ipc.layout import Cut, Pieces
from eplb_cuda_ipc.links import Link
from eplb_cuda_ipc.mapped import Mapped
from eplb_cuda_ipc.memory import Copies, Mark, Memory, MemoryMapError, Numbers, together
from eplb_cuda_ipc.messages import Chunk, Done, Offer, OfRound, Taken
from eplb_cuda_ipc.shown import Shown
from eplb_cuda_ipc.window import REGION, Window


@dataclass(frozen=True, slots=True)
class Shared:
    """State shared by all rounds of a communicator.

    Attributes:
        memory: of this rank.
        links: to all peers.
        mapped: their memory.
        shown: the memory that they may map.
        window: where this rank packs.
    """

    memory: Memory
    links: Mapping[int, Link]
    mapped: Mapping[int, Mapped]
    shown: Shown
    window: Window


@dataclass(slots=True, eq=False)
class _Outgoing:
    """The tensors sent to one peer.

    Attributes:
        offer: the announcement to it.
        cut: the packed part.
        packed: how many chunks of it have been packed.
    """

    offer: Offer
    cut: Cut
    packed: int = 0


@dataclass(slots=True, eq=False)
class _Incoming:
    """The tensors received from one peer.

    Attributes:
        pieces: their destinations.
        cut: the part that comes in chunks; None before the peer's offer.
        announced: how many chunks have been announced.
        waiting: copies that can be enqueued, and the slot that each frees, or None.
        left: how many copies, of a chunk or of all mapped memory, are not done.
    """

    pieces: Pieces
    cut: Cut | None = None
    announced: int = 0
    waiting: list[tuple[Copies, int | None]] = field(default_factory=list)
    left: int = 0


class Round:
    """The state of one round; `Exchange` drives it.

    Args:
        shared: what all rounds share.
        epoch: the number of this round.
        sends: peer -> tensors sent to it.
        recvs: peer -> destinations of the tensors from it.
        begins: the mark in the engine's stream after which the transfer comes.

    Attributes:
        waits_for: the peers without which this round cannot end.
        heard: peer -> when it last did something, in `time.monotonic()` seconds.
        arrived: whether the stream has reached the transfer.
        direct_copies: copies out of mapped memory, before and after merging neighbours.
    """

    def __init__(
        self, shared: Shared, epoch: int, sends: Mapping[int, Pieces], recvs: Mapping[int, Pieces], begins: Mark
    ) -> None:
        self.epoch = epoch
        self.arrived = False
        self.direct_copies = (0, 0)
        self.heard = dict.fromkeys((*sends, *recvs), time.monotonic())
        self.began = time.monotonic()
        self._shared = shared
        self._begins = begins
        self._outgoing = {peer: self._offered(pieces) for peer, pieces in sends.items()}
        self._incoming = {peer: _Incoming(pieces) for peer, pieces in recvs.items()}
        self._unread = set(recvs)
        self._unconfirmed = set(sends)
        self._under_way: deque[tuple[Mark, Callable[[], None]]] = deque()  # copies, and the action after each
        self._over: list[Callable[[], None]] = []  # the actions after completed copies

    @property
    def ended(self) -> bool:
        """Whether everything is copied, on both sides."""
        return not self.waits_for

    @property
    def waits_for(self) -> set[int]:
        """The peers that this round waits for."""
        return self._unread | self._unconfirmed

    @property
    def copying(self) -> bool:
        """Whether copies into this rank's tensors, or into its window, are in flight."""
        return bool(self._under_way)

    def undone(self, peer: int) -> str:
        """Return in words what a peer has not done."""
        if peer not in self._unread:
            return f"rank {peer} did not confirm that it has copied what it was sent"
        if self._incoming[peer].cut is None:
            return f"rank {peer} did not announce what it sends"
        return f"copies out of the memory of rank {peer} did not end"

    # --- what peers say ---------------------------------------------------------------------------------------------

    def handle(self, peer: int, message: OfRound) -> None:
        """Take a message of this round.

        Raises:
            TransferMismatchError: the peer sends something different from what is expected.
            TransferError: it violates the protocol, or its memory cannot be mapped.
        """
        self.heard[peer] = time.monotonic()
        try:
            match message:
                case Offer():
                    self._take_offer(peer, message)
                case Chunk():
                    self._take_chunk(peer, message)
                case Taken():
                    if peer not in self._unconfirmed or message.slot in self._shared.window.free:
                        raise ValueError("it was not sent that chunk")
                    self._shared.window.free.append(message.slot)
                case Done():
                    self._unconfirmed.remove(peer)
        except (ValueError, KeyError) as error:
            raise TransferError(
                f"rank {peer} violates the protocol", peers=[peer], phase="copy", why=str(error)
            ) from error
        except MemoryMapError as error:
            raise TransferError(
                f"memory of rank {peer} cannot be mapped", peers=[peer], phase="map", why=str(error)
            ) from error

    def _take_offer(self, peer: int, offer: Offer) -> None:
        incoming = self._incoming.get(peer)
        if incoming is None or (offer.count, offer.digest) != (len(incoming.pieces.nbytes), incoming.pieces.digest):
            expected = incoming.pieces.text if incoming is not None else "nothing"
            raise TransferMismatchError(
                f"rank {peer} sends something different from what is expected",
                peers=[peer],
                phase="agree",
                why=f"this rank expects {expected}; nothing of it was copied",
            )
        pieces = incoming.pieces
        regions = np.frombuffer(offer.regions, "<i4").astype(np.int64)
        offsets = np.frombuffer(offer.offsets, "<i8").astype(np.int64)
        if incoming.cut is not None or len(regions) != offer.count or len(offsets) != offer.count:
            raise ValueError("its offer is incomplete, or not the first one")
        direct = np.flatnonzero((regions >= 0) & (pieces.nbytes > 0))
        nbytes = pieces.nbytes[direct]
        sources = self._shared.mapped[peer].addresses(regions[direct], offsets[direct], nbytes)
        copies = Copies(pieces.address[direct], sources, nbytes).merged()
        incoming.cut = self._cut(pieces, regions)
        incoming.waiting = [(copies, None)] if len(direct) else []
        incoming.left = incoming.cut.chunks + len(incoming.waiting)
        before, after = self.direct_copies
        self.direct_copies = before + len(direct), after + len(copies.nbytes)

    def _take_chunk(self, peer: int, chunk: Chunk) -> None:
        incoming = self._incoming[peer]
        if incoming.cut is None or incoming.announced >= incoming.cut.chunks:
            raise ValueError("there is no such chunk")
        targets, within, nbytes = incoming.cut.chunk(incoming.announced)
        offsets = within + chunk.slot * self._shared.window.slot_bytes
        sources = self._shared.mapped[peer].addresses(np.full(len(offsets), REGION), offsets, nbytes)
        incoming.waiting.append((Copies(targets, sources, nbytes), chunk.slot))
        incoming.announced += 1

    # --- what can be done now ---------------------------------------------------------------------------------------

    def look(self) -> bool:
        """Check which copies are done; return whether any is.

        The actions after them follow in `act`, once all messages sent so far have been read: a source that gave up in
        the meantime may have overwritten the copied tensors, but has sent a message first.
        """
        seen = False
        while self._under_way and self._under_way[0][0].query():
            self._over.append(self._under_way.popleft()[1])
            seen = True
        return seen

    def act(self) -> bool:
        """Do what can be done now; return whether there was anything.

        Earlier rounds must come first: otherwise two ranks could each wait for a slot held by the other's later round.
        """
        if not self.arrived:
            if not self._begins.query():
                return False
            self.arrived = True
            self.heard.update(dict.fromkeys(self.heard, time.monotonic()))
            for peer, out in self._outgoing.items():
                self._shared.links[peer].send(out.offer)
        over, self._over = self._over, []
        for follow in over:
            follow()
        return bool(over) | self._finish_empty() | self._enqueue() | self._pack()

    def _finish_empty(self) -> bool:
        """Confirm transfers without bytes."""
        offered = [(peer, self._incoming[peer]) for peer in self._unread]
        ended = [peer for peer, incoming in offered if incoming.cut is not None and not incoming.left]
        for peer in ended:
            self._confirm(peer)
        return bool(ended)

    def _confirm(self, peer: int) -> None:
        self._unread.remove(peer)
        self._shared.links[peer].send(Done(self.epoch))

    def _enqueue(self) -> bool:
        """Enqueue all copies that can run, those of all peers together."""
        copies: list[Copies] = []
        what: list[tuple[int, int | None]] = []
        for peer in self._unread:
            incoming = self._incoming[peer]
            for each, slot in incoming.waiting:
                copies.append(each)
                what.append((peer, slot))
            incoming.waiting = []
        if copies:
            mark = self._shared.memory.copy(together(copies))
            self._under_way.append((mark, lambda: self._copied(what)))
        return bool(copies)

    def _copied(self, what: list[tuple[int, int | None]]) -> None:
        for peer, slot in what:
            self.heard[peer] = time.monotonic()
            self._incoming[peer].left -= 1
            if slot is not None:
                self._shared.links[peer].send(Taken(self.epoch, slot))
            if not self._incoming[peer].left:
                self._confirm(peer)

    def _pack(self) -> bool:
        """Pack the next chunk for each peer in turn, while there are free slots."""
        window = self._shared.window
        packed = False
        waiting = deque((peer, out) for peer, out in self._outgoing.items() if out.packed < out.cut.chunks)
        while waiting and window.free:
            peer, out = waiting.popleft()
            slot = window.free.pop()
            sources, within, nbytes = out.cut.chunk(out.packed)
            mark = self._shared.memory.copy(Copies(window.slot(slot) + within, sources, nbytes))
            self._under_way.append((mark, lambda peer=peer, slot=slot: self._announce(peer, slot)))  # type: ignore[misc]
            out.packed += 1
            packed = True
            if out.packed < out.cut.chunks:
                waiting.append((peer, out))
        return packed

    def _announce(self, peer: int, slot: int) -> None:
        self.heard[peer] = time.monotonic()
        self._shared.links[peer].send(Chunk(self.epoch, slot))

    # --- what is sent -----------------------------------------------------------------------------------------------

    def _offered(self, pieces: Pieces) -> _Outgoing:
        regions, offsets = self._shared.shown.find(pieces.address, pieces.nbytes)
        offer = Offer(
            self.epoch,
            len(pieces.nbytes),
            pieces.digest,
            regions.astype("<i4").tobytes(),
            offsets.astype("<i8").tobytes(),
        )
        return _Outgoing(offer, self._cut(pieces, regions))

    def _cut(self, pieces: Pieces, regions: Numbers) -> Cut:
        """Return the packed part, split into chunks: on both sides the tensors that are in no region."""
        packed = np.flatnonzero((regions < 0) & (pieces.nbytes > 0))
        return Cut(pieces.address[packed], pieces.nbytes[packed], self._shared.window.slot_bytes)
