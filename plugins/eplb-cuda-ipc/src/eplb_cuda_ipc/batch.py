"""Many large copies in one driver call, spread over several streams, which leaves the GPU's cores to inference.

Between two H200, 360 pieces of experts of 44 MB: one by one 272 GB/s and 6 to 8 ms of the caller's time, one batch
346 GB/s, spread over four streams 361 GB/s; the kernel 315. For experts of 4.7 MB: 67, 223, 304 and 294.

The driver is called directly, since NVIDIA's binding would first turn every address into a Python object.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from eplb_cuda_ipc.calls import CudaError, call
from eplb_cuda_ipc.memory import Copies

STREAMS = 4

_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING


class _Location(ctypes.Structure):
    """`CUmemLocation`; zero is none, for memory allocated by CUDA."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """`CUmemcpyAttributes`, of a batch's copies."""

    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source", _Location),
        ("target", _Location),
        ("flags", ctypes.c_uint),
    )


def batch_function(library: Any) -> tuple[Any, bool] | None:
    """Return the driver's `cuMemcpyBatchAsync`, and whether it is that of CUDA 13; None before CUDA 12.8.

    CUDA 13 dropped the argument that names the failed copy.

    Args:
        library: `libcuda`.
    """
    for name, newer in (("cuMemcpyBatchAsync_v2", True), ("cuMemcpyBatchAsync", False)):
        function = getattr(library, name, None)
        if function is not None:
            return function, newer
    return None


class CopyBatch:
    """Copies by the engines of one GPU, whose context is current in every call.

    Args:
        driver: the binding of the driver.
        library: `libcuda`; by default the loaded one.

    Raises:
        CudaError: the driver cannot copy in batches.
    """

    def __init__(self, driver: Any, library: Any = None) -> None:
        self._driver = driver
        try:
            found = batch_function(ctypes.CDLL("libcuda.so.1") if library is None else library)
        except OSError as error:
            raise CudaError(f"there is no driver: {error}") from error
        if found is None:
            raise CudaError("the driver has no cuMemcpyBatchAsync: it is older than CUDA 12.8")
        self._function, self._newer = found
        flags = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._streams = [int(call(driver, "cuStreamCreate", flags)) for _ in range(STREAMS)]
        self._begin, *self._ends = (call(driver, "cuEventCreate", _DISABLE_TIMING) for _ in range(STREAMS + 1))

    @contextlib.contextmanager
    def launched(self, copies: Copies, stream: int) -> Iterator[None]:
        """Enqueue copies after the work on `stream`; later work on it, after the block, waits for them.

        Work that the block itself enqueues on the stream runs beside them. None of the copies is empty.

        Raises:
            CudaError: the driver refuses. None of the copies has started then.
        """
        dealt = list(zip(_dealt(copies, STREAMS), self._streams, self._ends, strict=False))
        call(self._driver, "cuEventRecord", self._begin, stream)
        try:
            for part, side, end in dealt:
                call(self._driver, "cuStreamWaitEvent", side, self._begin, 0)
                self._enqueue(part, side)
                call(self._driver, "cuEventRecord", end, side)
            yield
            for _, _, end in dealt:
                call(self._driver, "cuStreamWaitEvent", stream, end, 0)
        except BaseException:
            for side in self._streams:
                call(self._driver, "cuStreamSynchronize", side)
            raise

    def close(self) -> None:
        """Release everything; nothing may be in flight."""
        for side in self._streams:
            call(self._driver, "cuStreamDestroy", side)
        for event in (self._begin, *self._ends):
            call(self._driver, "cuEventDestroy", event)

    def _enqueue(self, copies: Copies, stream: int) -> None:
        columns = [np.ascontiguousarray(each, np.uint64) for each in (copies.target, copies.source, copies.nbytes)]
        attributes, first, failed = _Attributes(_IN_STREAM_ORDER), ctypes.c_size_t(0), ctypes.c_size_t(0)
        code = self._function(
            *(ctypes.c_void_p(column.ctypes.data) for column in columns),
            ctypes.c_size_t(len(columns[0])),
            ctypes.byref(attributes),
            ctypes.byref(first),
            ctypes.c_size_t(1),
            *(() if self._newer else (ctypes.byref(failed),)),
            ctypes.c_void_p(stream),
        )
        if code:
            raise CudaError(f"cuMemcpyBatchAsync: {self._driver.CUresult(code).name}")


def _dealt(copies: Copies, count: int) -> list[Copies]:
    """Return the copies in at most `count` parts of about equal bytes, keeping neighbours together."""
    ends = np.cumsum(copies.nbytes)
    part = ((ends - copies.nbytes / 2) * count / ends[-1]).astype(np.int64)
    borders = np.searchsorted(part, np.arange(count + 1))
    return [
        Copies(copies.target[first:last], copies.source[first:last], copies.nbytes[first:last])
        for first, last in itertools.pairwise(borders.tolist())
        if first < last
    ]
