"""The sending half of a round: announces addresses, and packs what cannot be read in place, slot by slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from eplb_backends.nixl.memory import Slot, SlotPool
from eplb_backends.nixl.messages import Writer
from eplb_backends.nixl.pieces import ByteStream
from eplb_core.arrays import IntArray
from eplb_core.transport.copies import copy_all
from eplb_core.transport.streams import on_stream


@dataclass(slots=True, eq=False)
class Outgoing:
    """The messages to one destination.

    Attributes:
        count: messages, including those without bytes.
        digest: 16 bytes over their sizes and dtypes.
        addresses: int64 `[messages with bytes]`, 0 if the message is packed, `~number` for a numbered row.
        packed: the packed ones as uint8 tensors, in order.
        sums: checksums of the messages with bytes, or None.
    """

    count: int
    digest: bytes
    addresses: IntArray
    packed: list[torch.Tensor]
    sums: IntArray | None = None
    stream: ByteStream = field(init=False)
    sent_bytes: int = 0
    next_sequence: int = 0
    in_use: dict[int, Slot] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Lay the packed messages end to end."""
        self.stream = ByteStream(np.array([tensor.nbytes for tensor in self.packed], np.int64))


class Outbox:
    """Sends to several destinations through one pool of slots.

    Args:
        peers: destination -> its messages.
        pool: the send window.
        writer: writes this round's notifications.
        send: sends one notification to a rank.
        device: the device of the tensors.
        stream: where packing is enqueued; None means the current stream.
    """

    def __init__(
        self,
        peers: Mapping[int, Outgoing],
        pool: SlotPool,
        writer: Writer,
        send: Callable[[int, bytes], None],
        device: torch.device,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._peers = peers
        self._pool = pool
        self._writer = writer
        self._send = send
        self._device = device
        self._stream = stream
        self._packing: list[tuple[int, int, Slot, int]] = []
        self.unconfirmed = set(peers)
        self._unpacked = {peer for peer, outgoing in peers.items() if outgoing.packed}

    def announce(self, version: int) -> None:
        """Announce the addresses of its messages to every destination. `version` is that of this rank's metadata."""
        for peer, outgoing in self._peers.items():
            if outgoing.sums is not None:  # first: a destination may be done as soon as it knows the addresses
                for raw in self._writer.sums(outgoing.sums):
                    self._send(peer, raw)
            for raw in self._writer.ready(version, outgoing.count, outgoing.digest, outgoing.addresses):
                self._send(peer, raw)

    @property
    def fully_packed(self) -> bool:
        """Whether no more slots are needed."""
        return not self._unpacked

    def advance(self, may_pack: bool) -> set[int]:
        """Announce packed slots, and fill free ones for the destinations in turn.

        Args:
            may_pack: whether slots may be taken.

        Returns:
            The destinations for which something was done.
        """
        touched: set[int] = set()
        for entry in list(self._packing):
            peer, sequence, slot, nbytes = entry
            if slot.settled():
                self._packing.remove(entry)
                self._send(peer, self._writer.chunk(sequence, slot.memory.data_ptr(), nbytes))
                touched.add(peer)
        while self._unpacked and may_pack:
            for peer in sorted(self._unpacked):
                free = self._pool.acquire()
                if free is None:
                    return touched
                self._fill(peer, free)
                touched.add(peer)
        return touched

    def taken(self, peer: int, sequence: int) -> None:
        """The destination has read a chunk: its slot is free."""
        slot = self._peers[peer].in_use.pop(sequence, None)
        if slot is not None:
            self._pool.release(slot)

    def _fill(self, peer: int, slot: Slot) -> None:
        outgoing = self._peers[peer]
        start = outgoing.sent_bytes
        stop = min(start + self._pool.slot_bytes, outgoing.stream.nbytes)
        targets, sources, offset = [], [], 0
        for message, first, last in outgoing.stream.pieces(start, stop):
            sources.append(outgoing.packed[message][first:last])
            targets.append(slot.memory[offset : offset + last - first])
            offset += last - first
        with on_stream(self._device, self._stream):
            copy_all(targets, sources)
            if self._device.type != "cpu":
                slot.copied = torch.cuda.Event()
                slot.copied.record()
        sequence = outgoing.next_sequence
        outgoing.next_sequence += 1
        outgoing.sent_bytes = stop
        outgoing.in_use[sequence] = slot
        if stop == outgoing.stream.nbytes:
            self._unpacked.discard(peer)
        if slot.settled():
            self._send(peer, self._writer.chunk(sequence, slot.memory.data_ptr(), stop - start))
        else:
            self._packing.append((peer, sequence, slot, stop - start))
