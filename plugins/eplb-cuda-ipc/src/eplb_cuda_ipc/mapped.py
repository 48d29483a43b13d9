"""The memory of one peer that this rank has mapped."""

from __future__ import annotations

import numpy as np

from eplb_cuda_ipc.memory import Memory, MemoryMapError, Numbers
from eplb_cuda_ipc.messages import Show, Tensor


class Mapped:
    """The memory that one peer shows.

    Args:
        memory: this rank's.

    Attributes:
        tensors: the peer's registered tensors.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._begins: list[int] = []  # 0 if it could not be mapped
        self._sizes: list[int] = []
        self._columns = np.empty((2, 0), np.int64)
        self._problem = "it was released"
        self.tensors: list[Tensor] = []

    def add(self, show: Show) -> None:
        """Map the memory that the peer shows; a failure is recorded, and raised when that memory is needed."""
        for region in show.regions:
            begin = 0
            try:
                begin = self._memory.map(region.handle)
            except MemoryMapError as error:  # it may have died since, but its other regions may still exist
                self._problem = str(error)
            self._begins.append(begin)
            self._sizes.append(region.nbytes)
        self.tensors += show.tensors
        self._columns = np.array([self._begins, self._sizes], np.int64)

    def addresses(self, regions: Numbers, offsets: Numbers, nbytes: Numbers) -> Numbers:
        """Return the local addresses of pieces of the peer's memory.

        Raises:
            ValueError: a piece is not within a region that the peer has shown.
            MemoryMapError: one could not be mapped.
        """
        begins, sizes = self._columns
        known = (regions >= 0) & (regions < len(begins))
        if not known.all() or (offsets < 0).any() or (offsets + nbytes > sizes[regions]).any():
            raise ValueError("it names memory that it has not shown")
        found: Numbers = begins[regions]
        if not found.all():
            raise MemoryMapError(self._problem)
        return found + offsets

    def let_go(self) -> None:
        """Unmap everything; no copy out of it may be in flight. May be called twice."""
        for begin in filter(None, self._begins):
            self._memory.unmap(begin)
        self._begins = [0] * len(self._begins)
        self._columns = np.array([self._begins, self._sizes], np.int64)
