"""The memory that a rank shows its peers: the allocations behind registered tensors, and the window."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence

import numpy as np
import torch

from eplb_cuda_ipc.memory import Memory, Numbers
from eplb_cuda_ipc.messages import Region, Show, Tensor

logger = logging.getLogger(__name__)


class Shown:
    """The allocations that peers may map, numbered from 0, and the registered tensors.

    Args:
        memory: this rank's.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._spans: list[tuple[int, int, int]] = []  # address, end, number; sorted
        self._columns = np.empty((0, 3), np.int64)
        self._kept: list[torch.Tensor] = []
        self._warned = False

    def add_allocation(self, address: int) -> list[Region]:
        """Show the allocation that contains `address`; return it, or nothing if it is known or cannot be mapped."""
        at = bisect.bisect(self._spans, (address, 1 << 63, 0)) - 1
        if at >= 0 and address < self._spans[at][1]:
            return []
        allocation = self._memory.exported(address)
        if allocation is None:
            return []
        span = (allocation.address, allocation.address + allocation.nbytes, len(self._spans))
        bisect.insort(self._spans, span)
        self._columns = np.array(self._spans, np.int64)
        return [Region(allocation.nbytes, allocation.handle)]

    def add(self, tensors: Sequence[torch.Tensor]) -> Show:
        """Register tensors, and return the message for the peers. The tensors are kept alive."""
        fresh = [region for tensor in tensors if tensor.nbytes for region in self.add_allocation(tensor.data_ptr())]
        cards = [self._card(tensor) for tensor in tensors]
        self._kept += tensors
        unmappable = sum(card.region < 0 and tensor.nbytes > 0 for card, tensor in zip(cards, tensors, strict=True))
        if unmappable and not self._warned:
            self._warned = True
            logger.warning(
                "%d of %d registered tensors are in memory that other processes cannot map, such as that of "
                "expandable_segments: they are packed, through a small window; "
                "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False before the weights are allocated",
                unmappable,
                len(tensors),
            )
        return Show(fresh, cards)

    def find(self, addresses: Numbers, nbytes: Numbers) -> tuple[Numbers, Numbers]:
        """Return region and offset of pieces of memory; region -1 if no region contains all of a piece."""
        offset = np.zeros(len(addresses), np.int64)
        if not len(self._columns):
            return np.full(len(addresses), -1, np.int64), offset
        begins, ends, numbers = self._columns.T
        at = np.searchsorted(begins, addresses, side="right") - 1
        inside = (at >= 0) & (addresses + nbytes <= ends[at])
        return np.where(inside, numbers[at], -1), np.where(inside, addresses - begins[at], offset)

    def clear(self) -> None:
        """Release the tensors."""
        self._spans, self._kept = [], []
        self._columns = np.empty((0, 3), np.int64)

    def _card(self, tensor: torch.Tensor) -> Tensor:
        region, offset = self.find(np.array([tensor.data_ptr()]), np.array([_extent(tensor)]))
        rows = tensor.stride(0) * tensor.element_size() if tensor.dim() else 0
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Tensor(int(region[0]) if tensor.nbytes else -1, int(offset[0]), dtype, tuple(tensor.shape), rows)


def _extent(tensor: torch.Tensor) -> int:
    """Return the bytes from a tensor's first element to the end of its last one."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(last + 1) * tensor.element_size()
