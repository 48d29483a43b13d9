"""A GPU's memory, through NVIDIA's binding of the CUDA driver: every CUDA call that the package makes.

torch can share tensors between processes too, but keeps reference counts in /dev/shm, where they stay after a SIGKILL,
and never frees memory that a dead process had mapped. The driver's functions have neither problem.

Copies take addresses, not tensors: torch would copy from another GPU's tensor on that GPU's stream, and create a
context there, of some hundred MiB, in every process.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch

from eplb_core.errors import BackendUnavailableError
from eplb_cuda_ipc.batch import CopyBatch
from eplb_cuda_ipc.calls import CudaError, call, load_driver
from eplb_cuda_ipc.kernel import CopyKernel
from eplb_cuda_ipc.memory import HANDLE_BYTES, Allocation, Copies, Mark, MemoryMapError

_PAGE_BYTES = 2 << 20
_LARGE_BYTES = 1 << 20  # from this size on batched copies are as fast as the kernel, and leave the cores to inference
_LARGE_BYTES_ALONE = 8 << 20  # the same for copies one by one
_NEVER = 1 << 62

logger = logging.getLogger(__name__)


class CudaMemory:
    """The memory of one GPU; a `Memory`.

    Args:
        device: the GPU.

    Raises:
        BackendUnavailableError: the binding is not installed, or the driver does not work.
    """

    _large_from = _LARGE_BYTES

    def __init__(self, device: torch.device) -> None:
        self._driver = load_driver()
        self._ordinal = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", self._ordinal)
        self.gpu = _name(self._ordinal)
        self._lazy = int(self._driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
        # torch hands out the same 32 streams repeatedly; in one of those, other kernels could be queued before a
        # copy.
        flags = int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        try:
            self._number = self._call("cuDeviceGet", self._ordinal)
            self._context = self._call("cuDevicePrimaryCtxRetain", self._number)
            with self._current():
                self._stream = int(self._call("cuStreamCreate", flags))
        except CudaError as error:
            raise BackendUnavailableError(
                f"the CUDA driver does not work on {self._device}", name="cuda_ipc", why=str(error)
            ) from error
        self._as_torch = torch.cuda.ExternalStream(self._stream, device=self._device)
        self._kernel = self._make_kernel()
        self._batch = self._make_batch()
        self._large_from = _LARGE_BYTES_ALONE if self._batch is None else _LARGE_BYTES

    # --- showing and mapping ----------------------------------------------------------------------------------------

    def unreachable(self, gpu: str) -> str:
        """Return why this GPU cannot read the memory of another one, or an empty text."""
        for ordinal in range(torch.cuda.device_count()):
            if _name(ordinal) == gpu:
                if ordinal == self._ordinal or torch.cuda.can_device_access_peer(self._ordinal, ordinal):
                    return ""
                return f"there is no peer-to-peer access from cuda:{self._ordinal} to cuda:{ordinal}"
        return f"its GPU {gpu} is not visible to this process; let every rank see all GPUs (CUDA_VISIBLE_DEVICES)"

    def meet(self, gpus: Collection[str]) -> None:
        """Copy everything with the kernel if all peers share this GPU, whose copy engines are not faster then."""
        if set(gpus) <= {self.gpu}:
            self._large_from = _NEVER

    def exported(self, address: int) -> Allocation | None:
        """Return the allocation around `address`; None if it is not a plain one, such as of expandable_segments."""
        capable = self._driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE
        try:
            with self._current():
                if not self._call("cuPointerGetAttribute", capable, address):
                    return None
                base, nbytes = self._call("cuMemGetAddressRange", address)
                handle = self._call("cuIpcGetMemHandle", base)
        except CudaError:
            return None
        return Allocation(int(base), int(nbytes), ctypes.string_at(handle.getPtr(), HANDLE_BYTES))

    def map(self, handle: bytes) -> int:
        """Map another process's allocation. The driver counts how often a process maps the same one."""
        if len(handle) != HANDLE_BYTES:
            raise MemoryMapError(f"a handle has {HANDLE_BYTES} bytes, not {len(handle)}")
        native = self._driver.CUipcMemHandle()
        ctypes.memmove(native.getPtr(), handle, HANDLE_BYTES)  # some versions of the binding do not name its field
        try:
            with self._current():
                return int(self._call("cuIpcOpenMemHandle", native, self._lazy))
        except CudaError as error:
            raise MemoryMapError(str(error)) from error

    def unmap(self, address: int) -> None:
        """Undo `map`."""
        with contextlib.suppress(CudaError), self._current():
            self._call("cuIpcCloseMemHandle", address)

    # --- its own memory ---------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> int:
        """Allocate from the driver: torch's allocator may give memory that cannot be mapped.

        Whole pages of the device, since IPC exposes everything on a page (CUDA's documentation of IPC).
        """
        with self._current():
            return int(self._call("cuMemAlloc", -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES))

    def free(self, address: int) -> None:
        """Undo `allocate`."""
        with contextlib.suppress(CudaError), self._current():
            self._call("cuMemFree", address)

    def write(self, address: int, content: bytes) -> None:
        """Write, and wait until it is done."""
        source = np.frombuffer(content, np.uint8)
        with self._current():
            self._call("cuMemcpyHtoDAsync", address, source.ctypes.data, len(source), self._stream)
            self._call("cuStreamSynchronize", self._stream)

    def read(self, address: int, nbytes: int) -> bytes:
        """Read, and wait until it is done."""
        target = np.empty(nbytes, np.uint8)
        try:
            with self._current():
                self._call("cuMemcpyDtoHAsync", target.ctypes.data, address, nbytes, self._stream)
                self._call("cuStreamSynchronize", self._stream)
        except CudaError as error:
            raise MemoryMapError(str(error)) from error
        return target.tobytes()

    # --- streams ----------------------------------------------------------------------------------------------------

    def end_of(self, stream: torch.cuda.Stream | None) -> Mark:
        """Return an event at the end of the engine's stream."""
        return self._event(torch.cuda.current_stream(self._device) if stream is None else stream)

    def copy(self, copies: Copies) -> Mark:
        """Enqueue the copies; with unified addresses the driver finds the GPU of each end itself."""
        large = copies.nbytes >= (self._large_from if self._kernel is not None else 1)
        small = ~large & (copies.nbytes > 0)
        with self._current(), self._launched(copies.where(large)):
            if self._kernel is not None and small.any():
                self._kernel.launch(copies.where(small), self._stream)
        return self._event(self._as_torch)

    @contextlib.contextmanager
    def _launched(self, copies: Copies) -> Iterator[None]:
        """Enqueue large copies beside the copies of the block."""
        if self._batch is not None and len(copies.nbytes) > 1:
            with self._batch.launched(copies, self._stream):
                yield
            return
        columns = (copies.target.tolist(), copies.source.tolist(), copies.nbytes.tolist())
        for target, source, nbytes in zip(*columns, strict=True):
            self._call("cuMemcpyDtoDAsync", target, source, nbytes, self._stream)
        yield

    def _event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()
        with torch.cuda.device(self._device):
            event.record(stream)
        return event

    def close(self) -> None:
        """Release the stream, and the context, which torch also holds."""
        if self._context is None:
            return
        with contextlib.suppress(CudaError):
            with self._current():
                for held in (self._batch, self._kernel):
                    if held is not None:
                        held.close()
                self._call("cuStreamDestroy", self._stream)
            self._call("cuDevicePrimaryCtxRelease", self._number)
        self._context = None

    def _make_kernel(self) -> CopyKernel | None:
        """Return the kernel for many pieces; None, and single copies replace it, if it cannot be made."""
        try:
            with self._current():
                return CopyKernel(self._driver, torch.cuda.get_device_capability(self._ordinal))
        except CudaError as error:
            logger.warning("small tensors are copied one by one, which is slower: %s", error)
            return None

    def _make_batch(self) -> CopyBatch | None:
        """Return the batch for large copies; None, and single copies replace it, if the driver has none."""
        try:
            with self._current():
                return CopyBatch(self._driver)
        except CudaError as error:
            logger.info("large tensors are copied one by one, which is slower: %s", error)
            return None

    # --- the driver -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Make this GPU's context current in the thread: a thread that has not used torch yet has none."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def _call(self, function: str, *arguments: Any) -> Any:
        return call(self._driver, function, *arguments)


def _name(ordinal: int) -> str:
    """Return a device's UUID: ordinals differ between processes that see different devices."""
    return str(torch.cuda.get_device_properties(ordinal).uuid)
