"""The notifications between two ranks: a fixed header, checked lengths, no pickle.

offset  bytes  field
0       8      token of the communicator, the same on all its ranks
8       4      epoch: which execute() it belongs to
12      1      kind
13      1      0
14      2      part, of this kind in this epoch
16      ...    payload, little-endian, by kind:

READY   uint32 version of the source's metadata, uint32 number of messages, 16 bytes digest of their sizes and
dtypes, then for each that has bytes an int64: its address, `~number` of a row that was published with the
        metadata, or 0 where the message comes in packed chunks
CHUNK   uint32 sequence number, uint64 address, uint64 bytes: the next piece of the packed messages
TAKEN   uint32 sequence number: that chunk was read, its slot is free
DONE    nothing: all was read
SUMS    int64 checksums of the messages that have bytes, in order
DIFFER  text: what the receiver expects instead of what READY says
FAILED  uint8 count, uint16 ranks that are to blame, text
PING    nothing: are you alive?
PONG    uint32 milliseconds since this rank's transfers last got on
BYE     nothing: this rank closes, and reads no more
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from eplb_core.arrays import IntArray

_HEADER = struct.Struct("<8sIBBH")
_READY = struct.Struct("<II16s")
_CHUNK = struct.Struct("<IQQ")
_TAKEN = struct.Struct("<I")
_RANK = struct.Struct("<H")
_IDLE = struct.Struct("<I")
_NUMBERS_PER_PART = 400  # a notification should stay under a few KB
_LONGEST_TEXT = 1500


class Kind(IntEnum):
    """The kind of a notification."""

    READY = 1
    CHUNK = 2
    TAKEN = 3
    DONE = 4
    SUMS = 5
    DIFFER = 6
    FAILED = 7
    PING = 8
    PONG = 9
    BYE = 10


@dataclass(frozen=True, slots=True)
class Message:
    """A notification of this communicator; its payload has the size that its kind requires."""

    epoch: int
    kind: Kind
    part: int
    payload: bytes

    def ready(self) -> tuple[int, int, bytes, IntArray]:
        """Return READY's version, number of messages, digest and addresses."""
        version, count, digest = _READY.unpack_from(self.payload)
        return version, count, digest, np.frombuffer(self.payload, "<i8", offset=_READY.size)

    def chunk(self) -> tuple[int, int, int]:
        """Return CHUNK's sequence number, address and bytes."""
        sequence, address, nbytes = _CHUNK.unpack(self.payload)
        return sequence, address, nbytes

    def taken(self) -> int:
        """Return TAKEN's sequence number."""
        return int(_TAKEN.unpack(self.payload)[0])

    def sums(self) -> IntArray:
        """Return SUMS' checksums."""
        return np.frombuffer(self.payload, "<i8")

    def idle_s(self) -> float:
        """Return PONG's seconds."""
        return float(_IDLE.unpack(self.payload)[0]) / 1000

    def text(self) -> str:
        """Return DIFFER's text."""
        return self.payload.decode(errors="replace")

    def failure(self) -> tuple[list[int], str]:
        """Return the ranks that FAILED blames, and its text."""
        end = 1 + self.payload[0] * _RANK.size
        ranks = [rank for (rank,) in _RANK.iter_unpack(self.payload[1:end])]
        return ranks, self.payload[end:].decode(errors="replace")


class Writer:
    """Writes the notifications of one communicator in one epoch."""

    def __init__(self, token: bytes, epoch: int) -> None:
        self._token = token
        self._epoch = epoch

    def ready(self, version: int, count: int, digest: bytes, addresses: IntArray) -> Iterator[bytes]:
        """Return READY in parts; at least one, even without addresses."""
        for part, chunk in _parts(addresses):
            yield self._write(Kind.READY, _READY.pack(version, count, digest) + chunk, part)

    def sums(self, sums: IntArray) -> Iterator[bytes]:
        """Return SUMS in parts."""
        for part, chunk in _parts(sums):
            yield self._write(Kind.SUMS, chunk, part)

    def chunk(self, sequence: int, address: int, nbytes: int) -> bytes:
        """Return CHUNK."""
        return self._write(Kind.CHUNK, _CHUNK.pack(sequence, address, nbytes))

    def taken(self, sequence: int) -> bytes:
        """Return TAKEN."""
        return self._write(Kind.TAKEN, _TAKEN.pack(sequence))

    def done(self) -> bytes:
        """Return DONE."""
        return self._write(Kind.DONE)

    def differ(self, text: str) -> bytes:
        """Return DIFFER."""
        return self._write(Kind.DIFFER, text.encode()[:_LONGEST_TEXT])

    def failed(self, blamed: Iterable[int], text: str) -> bytes:
        """Return FAILED; names 100 ranks at most."""
        ranks = sorted(blamed)[:100]
        payload = bytes([len(ranks)]) + b"".join(_RANK.pack(rank) for rank in ranks) + text.encode()[:_LONGEST_TEXT]
        return self._write(Kind.FAILED, payload)

    def ping(self) -> bytes:
        """Return PING."""
        return self._write(Kind.PING)

    def pong(self, idle_s: float) -> bytes:
        """Return PONG."""
        return self._write(Kind.PONG, _IDLE.pack(min(int(idle_s * 1000), 2**32 - 1)))

    def bye(self) -> bytes:
        """Return BYE."""
        return self._write(Kind.BYE)

    def _write(self, kind: Kind, payload: bytes = b"", part: int = 0) -> bytes:
        return _HEADER.pack(self._token, self._epoch, kind, 0, part) + payload


def parse(token: bytes, raw: bytes) -> Message | None:
    """Return the message, or None if it is not a well-formed message of this communicator."""
    if len(raw) < _HEADER.size:
        return None
    theirs, epoch, kind, zero, part = _HEADER.unpack_from(raw)
    payload = raw[_HEADER.size :]
    if theirs != token or zero or kind not in _FITS or not _FITS[kind](payload):
        return None
    return Message(epoch, Kind(kind), part, payload)


_FITS: dict[int, Callable[[bytes], bool]] = {
    Kind.READY: lambda payload: len(payload) >= _READY.size and (len(payload) - _READY.size) % 8 == 0,
    Kind.CHUNK: lambda payload: len(payload) == _CHUNK.size,
    Kind.TAKEN: lambda payload: len(payload) == _TAKEN.size,
    Kind.DONE: lambda payload: not payload,
    Kind.SUMS: lambda payload: len(payload) % 8 == 0,
    Kind.DIFFER: lambda payload: True,
    Kind.FAILED: lambda payload: bool(payload) and len(payload) >= 1 + payload[0] * _RANK.size,
    Kind.PING: lambda payload: not payload,
    Kind.PONG: lambda payload: len(payload) == _IDLE.size,
    Kind.BYE: lambda payload: not payload,
}


def _parts(numbers: IntArray) -> Iterator[tuple[int, bytes]]:
    for part, start in enumerate(range(0, max(len(numbers), 1), _NUMBERS_PER_PART)):
        yield part, numbers[start : start + _NUMBERS_PER_PART].astype("<i8").tobytes()
