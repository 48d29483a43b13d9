"""The receiving half of a round: reads the announced messages, in place or through the receive window."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from eplb_backends.nixl.agent import Read
from eplb_backends.nixl.memory import Slot, SlotPool
from eplb_backends.nixl.messages import Writer
from eplb_backends.nixl.naming import naming
from eplb_backends.nixl.peers import Peers
from eplb_backends.nixl.pieces import ByteStream, merge
from eplb_backends.nixl.selftest import PAGE_BYTES, check_page
from eplb_core.arrays import IntArray
from eplb_core.contract.payload import Payload
from eplb_core.errors import EplbError
from eplb_core.transport.coalesce import as_bytes
from eplb_core.transport.copies import copy_all
from eplb_core.transport.streams import on_stream

SCATTER_BYTES = 64 << 10
"""Pieces below this many bytes are read together into a slot and copied out: a descriptor costs about 10 us."""

_HIGHEST_ADDRESS = 1 << 63

Piece = tuple[int, torch.Tensor]
"""An address at the source, and the uint8 tensor here that its bytes belong in."""


@dataclass(slots=True, eq=False)
class Incoming:
    """The messages from one source.

    Attributes:
        count: messages, including those without bytes.
        digest: 16 bytes over their sizes and dtypes.
        messages: those with bytes, in order.
        in_place: whether each of them may be read into directly.
        places: their numbers, -1 for none; if omitted, none has one.
    """

    count: int
    digest: bytes
    messages: Sequence[Payload]
    in_place: list[bool]
    places: list[int] = field(default_factory=list)
    lengths: IntArray = field(init=False)
    addresses: list[IntArray] = field(default_factory=list)
    sums: list[IntArray] = field(default_factory=list)
    announced: bool = False
    packed: list[int] = field(default_factory=list)
    stream: ByteStream | None = None
    chunks: set[int] = field(default_factory=set)
    left_bytes: int = 0

    def __post_init__(self) -> None:
        """Record the sizes."""
        self.places = self.places or [-1] * len(self.messages)
        self.lengths = np.array([message.nbytes for message in self.messages], np.int64)
        self.left_bytes = int(self.lengths.sum())

    def target(self, message: int) -> torch.Tensor:
        """Return the destination of a message, as uint8 `[bytes]`."""
        return as_bytes(self.messages[message].tensor)


@dataclass(slots=True, eq=False)
class _PendingRead:
    """One READ: posted as soon as there is a slot, if it needs one."""

    source: int
    remote: IntArray  # addresses of the pieces
    lengths: IntArray  # and their bytes
    local: IntArray | None  # their destinations; None if they are read through a slot
    targets: list[torch.Tensor] = field(default_factory=list)  # their destinations in that case
    sequence: int | None = None  # of the chunk that it reads, if any
    proves: bool = False  # it reads the page that every rank offers
    numbers: tuple[IntArray, IntArray] | None = None  # of the pieces, at the source and here
    slot: Slot | None = None
    posted_at: float = 0.0
    nbytes: int = 0  # known once it is posted

    @property
    def through_slot(self) -> bool:
        return self.local is None


class Inbox:
    """Receives from several sources through one pool of slots.

    Args:
        peers: source -> its messages.
        pool: the receive window.
        others: the agents of the other ranks, and of this rank, which posts the READs.
        writer: writes this round's notifications.
        send: sends one notification to a rank.
        device: the device of the tensors.
        stream: where unpacking is enqueued; None means the current stream.
        on_read: called with source, bytes and seconds of every finished READ.
    """

    def __init__(
        self,
        peers: Mapping[int, Incoming],
        pool: SlotPool,
        others: Peers,
        writer: Writer,
        send: Callable[[int, bytes], None],
        device: torch.device,
        stream: torch.cuda.Stream | None,
        on_read: Callable[[int, int, float], None],
    ) -> None:
        self._peers = peers
        self._on_read = on_read
        self._pool = pool
        self._others = others
        self._writer = writer
        self._send = send
        self._device = device
        self._stream = stream
        self._waiting: deque[_PendingRead] = deque()
        self._reading: list[tuple[_PendingRead, Read]] = []
        self._unproven: set[int] = set()
        self.unread = set(peers)
        self.descriptors = 0
        self.merged_descriptors = 0

    def reading_from(self) -> set[int]:
        """Return the sources of the READs that are in flight."""
        return {job.source for job, _ in self._reading}

    def announce(self, source: int, addresses: IntArray) -> bool:
        """Take a part of READY, addresses or `~number` of rows; return whether it was the last.

        On first contact with a source, its page is read first and compared.

        Raises:
            ValueError: there are more addresses than messages, or rows that the source has not published.
        """
        incoming = self._peers[source]
        incoming.addresses.append(addresses)
        announced = sum(map(len, incoming.addresses))
        if incoming.announced or announced > len(incoming.messages):
            raise ValueError(f"{announced} addresses were announced for {len(incoming.messages)} messages")
        if announced < len(incoming.messages):
            return False
        incoming.announced = True
        page = self._others.page_to_read(source)
        if page is not None:
            scratch = torch.empty(PAGE_BYTES, dtype=torch.uint8, device=self._device)
            self._unproven.add(source)
            self._waiting.append(_job(source, [(page, scratch)], through_slot=True, proves=True))
        said = np.concatenate(incoming.addresses)
        by_row = said < 0
        remote = said.copy()
        if by_row.any():
            remote[by_row] = self._others.rows(source).addresses(~said[by_row], incoming.lengths[by_row])
        in_place = np.array(incoming.in_place, np.bool_)
        incoming.packed = np.flatnonzero(said == 0).tolist()
        incoming.stream = ByteStream(incoming.lengths[incoming.packed])
        direct = np.flatnonzero((said != 0) & in_place)
        through = np.flatnonzero((said != 0) & ~in_place).tolist()
        if len(direct):
            here = np.array([incoming.messages[message].place[0] for message in direct.tolist()], np.int64)
            job = _PendingRead(source, remote[direct], incoming.lengths[direct], here)
            places = np.array(incoming.places, np.int64)[direct]
            if by_row[direct].all() and not through and places.min() >= 0:
                job.numbers = ~said[direct], places
            self._waiting.append(job)
        self._cut(source, [(int(remote[message]), incoming.target(message)) for message in through])
        self._finish_if_all_arrived(source)
        return True

    def chunk(self, source: int, sequence: int, address: int, nbytes: int) -> None:
        """Take a CHUNK: a slot's worth of the packed messages, or the rest of them, is at `address`.

        Chunks may come out of order: the copies into the source's slots do not end in the order of their numbers.

        Raises:
            ValueError: it differs from the announcement.
        """
        incoming = self._peers[source]
        if incoming.stream is None or sequence in incoming.chunks:
            raise ValueError(f"chunk {sequence} came before the messages were announced, or twice")
        start = sequence * self._pool.slot_bytes
        fits = 0 < nbytes == min(self._pool.slot_bytes, incoming.stream.nbytes - start)
        if not fits or address + nbytes >= _HIGHEST_ADDRESS:
            raise ValueError(f"chunk {sequence} of {nbytes} bytes is not what was announced")
        incoming.chunks.add(sequence)
        pieces, in_place = [], True
        for message, first, last in incoming.stream.pieces(start, start + nbytes):
            number = incoming.packed[message]
            in_place &= incoming.in_place[number]
            pieces.append((address, incoming.target(number)[first:last]))
            address += last - first
        scattered = nbytes < SCATTER_BYTES * len(pieces) and len(pieces) > 1
        self._waiting.append(_job(source, pieces, through_slot=scattered or not in_place, sequence=sequence))

    def advance(self) -> set[int]:
        """Finish completed READs and post possible ones; return the sources for which something happened."""
        touched: set[int] = set()
        for entry in list(self._reading):
            job, read = entry
            with naming(job.source, "read"):
                finished = self._others.agent.finished(read)
            if finished:
                self._reading.remove(entry)
                self._arrived(job)
                touched.add(job.source)
        while self._waiting and (not self._waiting[0].through_slot or self._needs_slot(self._waiting[0])):
            job = self._waiting.popleft()
            self._post(job)
            touched.add(job.source)
        return touched

    def _needs_slot(self, job: _PendingRead) -> bool:
        job.slot = self._pool.acquire()
        return job.slot is not None

    def _cut(self, source: int, pieces: list[Piece]) -> None:
        """Split the messages that must go through the window into READs of one slot each."""
        part: list[Piece] = []
        room = self._pool.slot_bytes
        for address, target in pieces:
            offset = 0
            while offset < target.nbytes:
                take = min(room, target.nbytes - offset)
                part.append((address + offset, target[offset : offset + take]))
                offset, room = offset + take, room - take
                if room == 0:
                    self._waiting.append(_job(source, part, through_slot=True))
                    part, room = [], self._pool.slot_bytes
        if part:
            self._waiting.append(_job(source, part, through_slot=True))

    def _post(self, job: _PendingRead) -> None:
        local = job.local
        if local is None:
            if job.slot is None:
                raise EplbError("a READ that needs a slot has none")
            local = job.slot.memory.data_ptr() + np.cumsum(job.lengths) - job.lengths
        job.nbytes = int(job.lengths.sum())
        pieces = merge(job.remote, local, job.lengths, *self._others.starts(job.source))
        if not job.proves:
            self.descriptors += len(job.lengths)
            self.merged_descriptors += len(pieces[2])
        job.posted_at = time.perf_counter()
        with naming(job.source, "read"):
            numbered = None if job.numbers is None else self._others.prepared(job.source, *job.numbers)
            read = self._others.agent.read(self._others.name(job.source), *pieces, numbered)
            self._reading.append((job, read))

    def _arrived(self, job: _PendingRead) -> None:
        self._on_read(job.source, job.nbytes, time.perf_counter() - job.posted_at)
        if job.slot is not None:
            self._unpack(job, job.slot)
            self._pool.release(job.slot)
        if job.sequence is not None:
            self._send(job.source, self._writer.taken(job.sequence))
        if job.proves:
            self._prove(job)
        else:
            self._peers[job.source].left_bytes -= job.nbytes
        self._finish_if_all_arrived(job.source)

    def _unpack(self, job: _PendingRead, slot: Slot) -> None:
        sources, offset = [], 0
        for target in job.targets:
            sources.append(slot.memory[offset : offset + target.nbytes])
            offset += target.nbytes
        with on_stream(self._device, self._stream):
            copy_all(job.targets, sources)
            if self._device.type != "cpu":
                slot.copied = torch.cuda.Event()
                slot.copied.record()

    def _prove(self, job: _PendingRead) -> None:
        [page] = job.targets
        with on_stream(self._device, self._stream):
            check_page(page, job.source)
        self._others.proven.add(job.source)
        self._unproven.discard(job.source)

    def _finish_if_all_arrived(self, source: int) -> None:
        done = self._peers[source].left_bytes == 0 and source not in self._unproven
        if done and source in self.unread:
            self.unread.discard(source)
            self._send(source, self._writer.done())


def _job(
    source: int, pieces: Sequence[Piece], *, through_slot: bool, sequence: int | None = None, proves: bool = False
) -> _PendingRead:
    """Return a READ of pieces, in place or through a slot."""
    targets = [target for _, target in pieces]
    return _PendingRead(
        source,
        np.array([address for address, _ in pieces], np.int64),
        np.array([target.nbytes for target in targets], np.int64),
        None if through_slot else np.array([target.data_ptr() for target in targets], np.int64),
        targets if through_slot else [],
        sequence,
        proves,
    )
