"""Which memory peers can reach in place, and the windows that everything else is staged in."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch

from eplb_backends.nixl.agent import Agent

_ALIGNMENT = 16  # bytes; copies stay vectorised


class Regions:
    """Disjoint ranges of registered memory, `(address, bytes)`."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, address: int, nbytes: int) -> None:
        """Add a range that overlaps none of those here."""
        at = bisect.bisect(self._starts, address)
        self._starts.insert(at, address)
        self._ends.insert(at, address + nbytes)

    def contain(self, address: int, nbytes: int) -> bool:
        """Return whether one range holds all of these bytes."""
        at = bisect.bisect(self._starts, address) - 1
        return at >= 0 and address + nbytes <= self._ends[at]


def allocation_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return address and bytes of the allocation that `tensor` is a view of."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def aligned(nbytes: int) -> int:
    """Return what a message of `nbytes` takes up in a window."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class Window:
    """A bounded staging buffer that peers can reach, allocated when it is first needed.

    Args:
        agent: registers the memory.
        nbytes: its size.
        device: where it lies.
    """

    def __init__(self, agent: Agent, nbytes: int, device: torch.device) -> None:
        self.capacity = nbytes
        self._agent = agent
        self._device = device
        self._buffer: torch.Tensor | None = None

    @property
    def allocated_bytes(self) -> int:
        """Bytes allocated now: all or nothing."""
        return 0 if self._buffer is None else self.capacity

    def allocate(self) -> bool:
        """Allocate and register the buffer if it is not there yet; return whether it was not."""
        if self._buffer is not None:
            return False
        buffer = torch.empty(self.capacity, dtype=torch.uint8, device=self._device)
        self._agent.register([(buffer.data_ptr(), self.capacity)], [buffer])
        self._buffer = buffer
        return True

    def slots(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Return one uint8 view for each size, one after the other from the window's start."""
        if self._buffer is None:
            return []
        views, offset = [], 0
        for nbytes in sizes:
            views.append(self._buffer[offset : offset + nbytes])
            offset += aligned(nbytes)
        return views

    def close(self) -> None:
        """Let the buffer go; the agent keeps it until it is deregistered."""
        self._buffer = None
