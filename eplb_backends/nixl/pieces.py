"""Arithmetic on pieces of memory: joining neighbours, cutting to size, mapping a byte stream to messages."""

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
    """Join neighbours: pieces that follow one another on both sides become one descriptor.

    Pieces of memory that was registered separately stay apart, also where one ends at the other's start, as tensors
    from torch's CUDA allocator do: NIXL finds no registration that holds a descriptor across the two.

    Args:
        remote: int64 `[n]`, addresses at the source, n > 0.
        local: int64 `[n]`, addresses here.
        lengths: int64 `[n]`, bytes, all positive.
        remote_starts: int64, sorted, where each registration at the source starts.
        local_starts: int64, sorted, the same here.

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
    """Messages laid end to end, and what lies in any range of it.

    Args:
        lengths: int64 `[n]`, bytes of the messages, all positive.
    """

    def __init__(self, lengths: IntArray) -> None:
        self.ends: IntArray = np.cumsum(lengths)
        self.starts: IntArray = self.ends - lengths

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return `(message, first byte, last byte + 1)` of each message that lies in bytes `start` to `stop`."""
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
