"""The memory of this rank that may be read, or written, in place."""

from __future__ import annotations

import bisect


class Regions:
    """Pieces of memory that do not overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, nbytes: int) -> None:
        """Add a piece that overlaps no other."""
        at = bisect.bisect_right(self._starts, start)
        self._starts.insert(at, start)
        self._ends.insert(at, start + nbytes)

    def cover(self, start: int | None, nbytes: int) -> bool:
        """Return whether one of them contains all of these bytes."""
        if start is None:
            return False
        at = bisect.bisect_right(self._starts, start) - 1
        return at >= 0 and start + nbytes <= self._ends[at]

    def touch(self, start: int, nbytes: int) -> bool:
        """Return whether one of them contains any of these bytes."""
        at = bisect.bisect_left(self._starts, start + nbytes) - 1
        return at >= 0 and self._ends[at] > start
