"""The memory that peers can read in place, and the windows that stage everything else."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable

import torch

from eplb_backends.nixl.agent import Agent
from eplb_backends.nixl.selftest import PAGE_BYTES
from eplb_core.transport.streams import ordinal_of

_ALIGNMENT = 256  # bytes; best for CUDA's copies
_LEAST_SLOT, _LARGEST_SLOT = 1 << 10, 64 << 20
_SLOTS = 4  # of a window: enough to pack, read and unpack at the same time
_LEAST_WINDOW = 1 << 20
_WINDOW_SHARE = 8  # each window takes one in so many bytes of the staging memory; the rest is for a rearrangement


class Regions:
    """Ranges of memory, `(address, bytes)`. They may overlap, as storages made from slices of one array do."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._starts: list[int] = []
        self._reach: list[int] = []

    def add(self, address: int, nbytes: int) -> None:
        """Add a range."""
        bisect.insort(self._ranges, (address, address + nbytes))
        self._starts = [start for start, _ in self._ranges]
        self._reach = list(itertools.accumulate((end for _, end in self._ranges), max))

    def contain(self, address: int, nbytes: int) -> bool:
        """Return whether one range contains all of these bytes."""
        at = bisect.bisect(self._starts, address) - 1
        # The range with the highest end among those that start at or before the address.
        return at >= 0 and address + nbytes <= self._reach[at]

    def overlap(self, address: int, nbytes: int) -> bool:
        """Return whether a range contains any of these bytes."""
        at = bisect.bisect_left(self._starts, address + nbytes) - 1
        return at >= 0 and self._reach[at] > address


def allocation_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return address and bytes of the allocation that `tensor` is a view of."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def expandable_segments(device: torch.device) -> Regions:
    """Return the memory that torch's allocator maps in chunks (`expandable_segments`), if there is any.

    UCX reads such memory over tcp, if at all, and wrong bytes have been reported if it has several chunks. What counts
    is how the allocator got it: the setting can be changed while the process runs.
    """
    regions = Regions()
    if device.type != "cpu":
        for segment in torch.cuda.memory_snapshot():
            if segment.get("is_expandable") and segment["device"] == ordinal_of(device):
                regions.add(segment["address"], segment["total_size"])
    return regions


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return disjoint ranges `(address, bytes)` that cover the same bytes: overlapping ones are merged."""
    disjoint: list[tuple[int, int]] = []
    for address, nbytes in sorted(ranges):
        if disjoint and address < sum(disjoint[-1]):
            start, size = disjoint[-1]
            disjoint[-1] = (start, max(size, address + nbytes - start))
        else:
            disjoint.append((address, nbytes))
    return disjoint


def left_for_staging(staging_bytes: int) -> int:
    """Return the bytes of a rank's staging memory that the two windows and the first page leave."""
    return staging_bytes - 2 * (staging_bytes // _WINDOW_SHARE) - PAGE_BYTES


def staging_for(layer_bytes: int, allowed_bytes: int) -> int:
    """Return how much of a rank's staging memory to take shares of: less than is allowed where the experts are small.

    Either window then holds twice what a rank has of one layer, and 1 MiB at least: more would never be filled at once.

    Args:
        layer_bytes: what a rank has of one layer, the same on every rank.
        allowed_bytes: the `window` option.
    """
    return min(allowed_bytes, _WINDOW_SHARE * max(_LEAST_WINDOW, 2 * layer_bytes))


class Slot:
    """A piece of a window.

    Attributes:
        memory: uint8 `[slot bytes]`.
        copied: recorded after the last copies into or out of it on a GPU; None if none are pending.
    """

    __slots__ = ("copied", "memory")

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.copied: torch.cuda.Event | None = None

    def settled(self) -> bool:
        """Return whether the last copies into or out of it are done."""
        if self.copied is not None and self.copied.query():
            self.copied = None
        return self.copied is None


class SlotPool:
    """A window: a bounded staging buffer that peers can reach, in slots of one size.

    It is allocated at the start and kept to the end. A peer is never informed that memory is no longer registered, and
    NIXL fails if the same address is registered again for other memory.

    Args:
        agent: registers the memory.
        staging_bytes: the staging memory of the rank, of which this takes its share.
        device: its device.

    Attributes:
        buffer: all of it, uint8.
        slot_bytes: the size of a slot; the same on all ranks with the same staging memory.
    """

    def __init__(self, agent: Agent, staging_bytes: int, device: torch.device) -> None:
        share = staging_bytes // _WINDOW_SHARE
        self.slot_bytes = max(_LEAST_SLOT, min(_LARGEST_SLOT, share // _SLOTS // _ALIGNMENT * _ALIGNMENT))
        slots = max(1, share // self.slot_bytes)
        self.buffer = torch.empty(slots * self.slot_bytes, dtype=torch.uint8, device=device)
        agent.register([(self.buffer.data_ptr(), len(self.buffer))], [self.buffer])
        self._free = [Slot(memory) for memory in self.buffer.view(slots, self.slot_bytes)]
        self._unsettled: list[Slot] = []

    def acquire(self) -> Slot | None:
        """Return a free slot, or None if there is none now."""
        if self._unsettled:
            settled = [slot for slot in self._unsettled if slot.settled()]
            self._unsettled = [slot for slot in self._unsettled if slot.copied is not None]
            self._free.extend(settled)
        return self._free.pop() if self._free else None

    def release(self, slot: Slot) -> None:
        """Give a slot back; it is reused once copies into and out of it are done."""
        if slot.settled():
            self._free.append(slot)
        else:
            self._unsettled.append(slot)
