"""The notifications between two ranks: fixed headers, checked lengths, no pickle.

offset  bytes  field
0       8      token of the communicator, the same on all its ranks
8       4      epoch: which execute() it belongs to
12      1      kind
13      1      0
14      2      part, of this kind in this epoch
16      ...    READY: int64 addresses of the messages, in order; FAILED: text; DONE: nothing
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

_HEADER = struct.Struct("<8sIBBH")
_ADDRESSES_PER_PART = 400  # a notification should stay under a few KB


class Kind(IntEnum):
    """What a notification says."""

    READY = 1  # the source's bytes lie at these addresses and may be read
    DONE = 2  # all of them were read
    FAILED = 3  # the sender gave up


@dataclass(frozen=True, slots=True)
class Message:
    """A notification that belongs to this communicator."""

    epoch: int
    kind: Kind
    part: int
    payload: bytes

    def addresses(self) -> np.ndarray:
        """Return READY's addresses, int64 `[n]`."""
        return np.frombuffer(self.payload, dtype="<i8")


def ready(token: bytes, epoch: int, addresses: np.ndarray) -> Iterator[bytes]:
    """Return the READY notifications that carry `addresses`, int64 `[n]`, n > 0, in parts."""
    for part, start in enumerate(range(0, len(addresses), _ADDRESSES_PER_PART)):
        chunk = addresses[start : start + _ADDRESSES_PER_PART].astype("<i8").tobytes()
        yield _HEADER.pack(token, epoch, Kind.READY, 0, part) + chunk


def done(token: bytes, epoch: int) -> bytes:
    """Return the notification that everything was read."""
    return _HEADER.pack(token, epoch, Kind.DONE, 0, 0)


def failed(token: bytes, epoch: int, why: str) -> bytes:
    """Return the notification that this rank gave up."""
    return _HEADER.pack(token, epoch, Kind.FAILED, 0, 0) + why.encode()[:1000]


def parse(token: bytes, raw: bytes) -> Message | None:
    """Return the message, or None if it is not one of this communicator's."""
    if len(raw) < _HEADER.size:
        return None
    theirs, epoch, kind, zero, part = _HEADER.unpack_from(raw)
    payload = raw[_HEADER.size :]
    if theirs != token or zero or kind not in Kind.__members__.values() or (kind == Kind.READY and len(payload) % 8):
        return None
    return Message(epoch, Kind(kind), part, payload)
