"""Arithmetic on pieces of memory: joining neighbours, cutting to size, mapping a byte stream to messages."""

from __future__ import annotations

import numpy as np

from eplb_core.placement import IntArray


def merge(remote: IntArray, local: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Join neighbours: pieces that follow one another on both sides become one descriptor.

    Args:
        remote: int64 `[n]`, addresses at the source, n > 0.
        local: int64 `[n]`, addresses here.
        lengths: int64 `[n]`, bytes, all positive.

    Returns:
        The same three arrays with m <= n entries.
    """
    if len(lengths) == 1:
        return remote, local, lengths
    ends_here = (remote[1:] != remote[:-1] + lengths[:-1]) | (local[1:] != local[:-1] + lengths[:-1])
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
