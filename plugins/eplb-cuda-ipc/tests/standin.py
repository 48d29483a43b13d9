"""Host memory in the place of a GPU's: everything of the package but its calls of CUDA, between real processes.

What it keeps of a GPU's ways:

- Only memory that it has allocated itself (`allocate`, `shared`) can be exported; all other is like that of
  expandable_segments.
- Another process maps an allocation as a whole, at another address, and by a handle that is of use only while the owner
  lives. What it has mapped stays readable when the owner is killed.
- Copies run later, in order, on a stream of their own (a thread), in two halves with a pause between them; whoever does
  not wait for them sees old bytes, or half of the new ones.
- The engine has a stream as well (`ENGINE`), which may be behind.

What it cannot show: whether CUDA does what the interface says, peer access, and how fast anything is.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from eplb_cuda_ipc.communicator import CudaIpcCommunicator
from eplb_cuda_ipc.memory import HANDLE_BYTES, Allocation, Copies, MemoryMapError
from eplb_cuda_ipc.options import CudaIpcOptions

from eplb_core import BackendContext

GPU = "host"
"""The name of the device; a test may say another one, which then cannot be reached."""

PAUSE_S = 30e-6
_HANDLE = struct.Struct("<qqq")  # process, file descriptor, bytes


class Stream:
    """Does what is enqueued, in order, some time later."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._enqueued = 0
        self._done = 0

    def enqueue(self, job: Callable[[], None]) -> StreamMark:
        """Have `job` done behind everything else."""
        self._jobs.put(job)
        self._enqueued += 1
        return self.end()

    def end(self) -> StreamMark:
        """Return the present end."""
        return StreamMark(self, self._enqueued)

    def passed(self, number: int) -> bool:
        return self._done >= number

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(10)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            self._done += 1


class StreamMark:
    """A place in a stream."""

    def __init__(self, stream: Stream, number: int) -> None:
        self._stream = stream
        self._number = number

    def query(self) -> bool:
        return self._stream.passed(self._number)


class Engine:
    """What the engine has on its device: allocations, and one stream. One for each process."""

    def __init__(self) -> None:
        self.allocations: dict[int, tuple[int, int, mmap.mmap]] = {}  # address -> bytes, file descriptor, memory
        self._stream: Stream | None = None

    @property
    def stream(self) -> Stream:
        """The engine's stream; it is made when it is first used."""
        if self._stream is None:
            self._stream = Stream()
        return self._stream

    def end(self) -> StreamMark | Passed:
        return Passed() if self._stream is None else self._stream.end()

    def allocate(self, nbytes: int) -> int:
        handle = os.memfd_create("standin")
        os.ftruncate(handle, nbytes)
        memory = mmap.mmap(handle, nbytes)
        address = _address(memory)
        self.allocations[address] = (nbytes, handle, memory)
        return address

    def free(self, address: int) -> None:
        os.close(self.allocations.pop(address)[1])

    def shared(self, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """Return a tensor of zeros in an allocation of its own, which can be exported."""
        elements = int(np.prod(shape, dtype=np.int64))
        memory = self.allocations[self.allocate(elements * dtype.itemsize)][2]
        return torch.frombuffer(memory, dtype=dtype).view(shape)


class Passed:
    """The end of a stream that nothing was ever enqueued on."""

    def query(self) -> bool:
        return True


ENGINE = Engine()


class HostMemory:
    """A `Memory` of host memory; every communicator has one."""

    def __init__(self) -> None:
        self.gpu = GPU
        self._stream: Stream | None = Stream()
        self._mapped: dict[int, mmap.mmap] = {}

    def unreachable(self, gpu: str) -> str:
        return f"there is no peer-to-peer access from {self.gpu} to {gpu}"

    def exported(self, address: int) -> Allocation | None:
        for begin, (nbytes, handle, _) in ENGINE.allocations.items():
            if begin <= address < begin + nbytes:
                packed = _HANDLE.pack(os.getpid(), handle, nbytes).ljust(HANDLE_BYTES, b"\0")
                return Allocation(begin, nbytes, packed)
        return None

    def map(self, handle: bytes) -> int:
        process, number, nbytes = _HANDLE.unpack_from(handle)
        try:
            opened = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
        except OSError as error:
            raise MemoryMapError(f"{type(error).__name__}: {error}") from error
        memory = mmap.mmap(opened, nbytes)
        os.close(opened)
        address = _address(memory)
        self._mapped[address] = memory
        return address

    def unmap(self, address: int) -> None:
        self._mapped.pop(address)

    def allocate(self, nbytes: int) -> int:
        return ENGINE.allocate(nbytes)

    def free(self, address: int) -> None:
        ENGINE.free(address)

    def write(self, address: int, content: bytes) -> None:
        ctypes.memmove(address, content, len(content))

    def read(self, address: int, nbytes: int) -> bytes:
        return ctypes.string_at(address, nbytes)

    def meet(self, gpus: Collection[str]) -> None:
        assert set(gpus) <= {self.gpu}

    def end_of(self, stream: torch.cuda.Stream | None) -> StreamMark | Passed:
        return ENGINE.end()

    def copy(self, copies: Copies) -> StreamMark:
        assert self._stream is not None
        assert len(copies.nbytes), "nothing to copy"
        rows = list(zip(copies.target.tolist(), copies.source.tolist(), copies.nbytes.tolist(), strict=True))

        def run() -> None:
            time.sleep(PAUSE_S)
            for target, source, nbytes in rows:
                ctypes.memmove(target, source, nbytes // 2)
            time.sleep(PAUSE_S)
            for target, source, nbytes in rows:
                half = nbytes // 2
                ctypes.memmove(target + half, source + half, nbytes - half)

        return self._stream.enqueue(run)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def create(
    context: BackendContext, options: CudaIpcOptions, expert_weights: Sequence[torch.Tensor]
) -> CudaIpcCommunicator:
    """The factory of the backend `cuda_ipc_standin`."""
    return CudaIpcCommunicator(context, options, HostMemory())


def _address(memory: mmap.mmap) -> int:
    # The array keeps the memory exported, so that nobody closes it; unmapped when both are gone.
    return int(np.frombuffer(memory, np.uint8).ctypes.data)
