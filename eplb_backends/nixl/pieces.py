"""Arithmetic on pieces of memory: merging neighbours, splitting, mapping a byte stream to messages."""

from __future__ import annotations

import numpy as np

from eplb_core.arrays import IntArray

_NOWHERE: IntArray = np.empty(0, np.int64)


def merge(
    remote: IntArray,
    local: IntArray,
    lengths: IntArray,
    remote_starts: IntArray = _NOWHERE,
    local_starts: IntArray = _NOWHERE,
) -> tuple[IntArray, IntArray, IntArray]:
    """Merge neighbours: pieces that are adjacent on both sides become one descriptor.

    Pieces of separate registrations are not merged, even if they are adjacent, as tensors from torch's CUDA allocator
    may be: NIXL finds no registration that contains a descriptor across the two.

    Args:
        remote: int64 `[n]`, addresses at the source, n > 0.
        local: int64 `[n]`, addresses here.
        lengths: int64 `[n]`, bytes, all positive.
        remote_starts: int64, sorted, the start of each registration at the source.
        local_starts: int64, sorted, the same for this rank.

    Returns:
        The same three arrays with m <= n entries.
    """
    if len(lengths) == 1:
        return remote, local, lengths
    ends_here = (remote[1:] != remote[:-1] + lengths[:-1]) | (local[1:] != local[:-1] + lengths[:-1])
    for addresses, registered in ((remote, remote_starts), (local, local_starts)):
        ends_here |= np.diff(np.searchsorted(registered, addresses, side="right")) != 0
    starts = np.flatnonzero(np.r_[True, ends_here])
    return remote[starts], local[starts], np.add.reduceat(lengths, starts)


class ByteStream:
    """A byte stream of messages laid end to end.

    Args:
        lengths: int64 `[n]`, bytes of the messages, all positive.
    """

    def __init__(self, lengths: IntArray) -> None:
        self.ends: IntArray = np.cumsum(lengths)
        self.starts: IntArray = self.ends - lengths

    @property
    def nbytes(self) -> int:
        """Total bytes."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return `(message, first byte, last byte + 1)` of each message in bytes `start` to `stop`."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.starts, stop, side="left"))
        return [
            (
                message,
                max(start, int(self.starts[message])) - int(self.starts[message]),
                min(stop, int(self.ends[message])) - int(self.starts[message]),
            )
            for message in range(first, last)
        ]
