"""The device interface of this transport: show memory to other processes, map theirs, and copy.

`CudaMemory` (in `driver.py`) implements it on a GPU, and is the only part of the package that calls CUDA. The tests
implement it on host memory, so that everything else runs between real processes on a machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Numbers = npt.NDArray[np.int64]
"""Addresses, offsets or numbers of bytes, one for each of several pieces of memory."""

HANDLE_BYTES = 64
"""The size of the handle by which another process maps an allocation."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """An allocation that other processes can map, always as a whole.

    Attributes:
        address: its start in this process.
        nbytes: its size.
        handle: by which another process maps it.
    """

    address: int
    nbytes: int
    handle: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Copies that may run in any order: no target overlaps another, or a source.

    Attributes:
        target: `[N]`, addresses.
        source: `[N]`, addresses.
        nbytes: `[N]`.
    """

    target: Numbers
    source: Numbers
    nbytes: Numbers

    def where(self, chosen: npt.NDArray[np.bool_]) -> Copies:
        """Return the chosen copies; `chosen` is bool `[N]`."""
        return Copies(self.target[chosen], self.source[chosen], self.nbytes[chosen])

    def merged(self) -> Copies:
        """Return the same copies, merged where both source and target are adjacent."""
        kept = self.where(self.nbytes > 0)
        target, source, nbytes = kept.target, kept.source, kept.nbytes
        if len(nbytes) < 2:
            return kept
        follows = (target[:-1] + nbytes[:-1] == target[1:]) & (source[:-1] + nbytes[:-1] == source[1:])
        first = np.flatnonzero(np.append(True, ~follows))
        return Copies(target[first], source[first], np.add.reduceat(nbytes, first))


def together(parts: Sequence[Copies]) -> Copies:
    """Concatenate one or more."""
    return Copies(
        np.concatenate([part.target for part in parts]),
        np.concatenate([part.source for part in parts]),
        np.concatenate([part.nbytes for part in parts]),
    )


class Mark(Protocol):
    """A place in a stream. A `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Return whether everything before it is done."""
        ...


class Memory(Protocol):
    """The memory of one rank's device, for one communicator. Addresses are plain numbers.

    Copies run on a separate stream, in the order given. Nothing else is ever enqueued there, so a copy does not wait
    for the engine's work, and ends by itself regardless of the peers.

    Attributes:
        gpu: the device's name, the same in every process that uses it and on no other device.
    """

    gpu: str

    def unreachable(self, gpu: str) -> str:
        """Return why this device cannot read the memory of another one, or an empty text if it can."""
        ...

    def meet(self, gpus: Collection[str]) -> None:
        """Take the devices of the peers, which may determine the best way to copy."""
        ...

    def exported(self, address: int) -> Allocation | None:
        """Return the allocation that contains `address`, or None if other processes cannot map it."""
        ...

    def map(self, handle: bytes) -> int:
        """Map another process's allocation, and return its start here.

        Raises:
            MemoryMapError: it cannot be mapped.
        """
        ...

    def unmap(self, address: int) -> None:
        """Undo `map`; the address may no longer be used. Never raises."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Return memory that other processes can map."""
        ...

    def free(self, address: int) -> None:
        """Undo `allocate`. Never raises."""
        ...

    def write(self, address: int, content: bytes) -> None:
        """Write, and wait until it is done."""
        ...

    def read(self, address: int, nbytes: int) -> bytes:
        """Read, and wait until it is done.

        Raises:
            MemoryMapError: it cannot be read.
        """
        ...

    def end_of(self, stream: torch.cuda.Stream | None) -> Mark:
        """Return the current end of the engine's stream; None means the current stream."""
        ...

    def copy(self, copies: Copies) -> Mark:
        """Enqueue copies, and return a mark that is passed when they are done."""
        ...

    def close(self) -> None:
        """Release all resources other than allocations and mappings. May be called twice; never raises."""
        ...


class MemoryMapError(RuntimeError):
    """Another process's memory cannot be mapped. The text says why."""
