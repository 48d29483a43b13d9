"""The edge to CUDA, as far as it can be seen without a GPU: what the binding is asked, and what becomes of answers."""

from __future__ import annotations

import contextlib
import ctypes
import time
from typing import Any

import numpy as np
import pytest
import torch
from eplb_cuda_ipc.batch import CopyBatch
from eplb_cuda_ipc.calls import CudaError, call, load_driver
from eplb_cuda_ipc.driver import CudaMemory
from eplb_cuda_ipc.kernel import compiled
from eplb_cuda_ipc.memory import Copies, MemoryMapError

BINDING = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")


def number(value: int) -> np.ndarray:
    return np.array([value], np.int64)


class Recorder:
    """A driver that says yes to everything, keeps count, and has the binding's own types."""

    def __init__(self, **answers: tuple[Any, ...]) -> None:
        self._answers = answers
        self.asked: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(BINDING, name)

        def function(*arguments: Any) -> tuple[Any, ...]:
            self.asked.append((name, *arguments))
            return self._answers.get(name, (BINDING.CUresult.CUDA_SUCCESS,))

        return function

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.asked]


def memory_on(driver: Any) -> CudaMemory:
    """Return a memory without what torch makes for it, which takes a GPU."""
    memory = CudaMemory.__new__(CudaMemory)
    memory._driver, memory._context, memory._stream, memory._number, memory._lazy = driver, 11, 12, 13, 1
    memory._kernel = memory._batch = None
    return memory


NO_DRIVER = ".*(libcuda|NVIDIA driver)"  # as versions of the binding say it
SUCCESS = BINDING.CUresult.CUDA_SUCCESS
FAILURE = BINDING.CUresult.CUDA_ERROR_INVALID_VALUE


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("way", ["small ones share a kernel", "all share a kernel", "one by one", "all in a batch"])
@pytest.mark.parametrize("alignment", [1, 2, 4, 8, 16, 256])
def test_pieces_of_any_size_and_place_are_copied_and_nothing_beside_them(alignment: int, way: str) -> None:
    """Some begin at odd addresses, some are larger than what is left to the driver where GPUs differ."""
    rng = np.random.default_rng(alignment)
    nbytes = np.concatenate(
        [rng.integers(1, 70_000, 5_000), [1, 15, 16, 17, 65_536, 65_537, 3 << 20, 8 << 20, 9 << 20]]
    )
    room = -(-nbytes // alignment) * alignment + alignment * rng.integers(0, 5, len(nbytes))
    begins = np.cumsum(room) - room
    source = torch.from_numpy(rng.integers(0, 256, int(room.sum()) + 512, dtype=np.uint8)).cuda()
    target = torch.full_like(source, 0xEE)
    expected = np.full(len(target), 0xEE, np.uint8)
    content = source.cpu().numpy()
    order = rng.permutation(len(begins))
    at = np.empty_like(begins)  # where each piece goes: in another order than it came
    at[order] = np.cumsum(room[order]) - room[order]
    for begin, to, count in zip(begins.tolist(), at.tolist(), nbytes.tolist(), strict=True):
        expected[to : to + count] = content[begin : begin + count]
    memory = CudaMemory(torch.device("cuda", 0))
    assert memory._kernel is not None
    memory.meet([memory.gpu if way == "all share a kernel" else "another one"])
    if way in ("one by one", "all in a batch"):
        memory._kernel = None
    if way == "one by one":
        memory._batch = None
    else:
        assert memory._batch is not None, "the driver has no batches: this test shows nothing of them"
    torch.cuda.synchronize()
    mark = memory.copy(Copies(target.data_ptr() + at, source.data_ptr() + begins, nbytes.astype(np.int64)))
    deadline = time.monotonic() + 10
    while not mark.query():
        assert time.monotonic() < deadline
    assert np.array_equal(target.cpu().numpy(), expected)
    memory.close()


def test_the_kernel_compiles_for_this_and_for_other_gpus() -> None:
    pytest.importorskip("nvidia.cu13", reason="NVRTC is not installed")
    assert compiled((9, 0))[:4] == compiled((8, 0))[:4] == b"\x7fELF"


# --- what the binding is given ---------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which these calls would reach")
def test_the_binding_takes_every_call_and_finds_no_driver_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong arguments would be a TypeError, which nothing here catches."""
    memory = memory_on(load_driver())
    with pytest.raises(CudaError, match=f"cuCtxPushCurrent: {NO_DRIVER}"):
        memory.allocate(1)
    monkeypatch.setattr(CudaMemory, "_current", lambda self: contextlib.nullcontext())
    for function, *arguments in [
        ("cuDeviceGet", 0),
        ("cuDevicePrimaryCtxRetain", 0),
        ("cuStreamCreate", int(BINDING.CUstream_flags.CU_STREAM_NON_BLOCKING)),
        ("cuMemGetAddressRange", 1),
        ("cuIpcGetMemHandle", BINDING.CUdeviceptr(1)),
        ("cuCtxPopCurrent",),
        ("cuStreamSynchronize", 12),
        ("cuStreamDestroy", 12),
        ("cuDevicePrimaryCtxRelease", 13),
    ]:
        with pytest.raises(CudaError, match=f"{function}: {NO_DRIVER}"):
            call(memory._driver, function, *arguments)
    assert memory.exported(1) is None
    with pytest.raises(MemoryMapError, match=f"cuIpcOpenMemHandle: {NO_DRIVER}"):
        memory.map(bytes(64))
    memory.unmap(1)
    with pytest.raises(CudaError, match="cuMemAlloc"):
        memory.allocate(1)
    memory.free(1)
    with pytest.raises(CudaError, match="cuMemcpyHtoDAsync"):
        memory.write(1, b"bytes")
    with pytest.raises(MemoryMapError, match="cuMemcpyDtoHAsync"):
        memory.read(1, 5)
    with pytest.raises(CudaError, match="cuMemcpyDtoDAsync"):
        memory.copy(Copies(number(1), number(2), number(3)))
    memory.close()


# --- what becomes of the answers -------------------------------------------------------------------------------------


def test_an_allocation_is_described_by_its_base_and_handle() -> None:
    handle = BINDING.CUipcMemHandle()
    ctypes.memmove(handle.getPtr(), bytes(range(64)), 64)
    driver = Recorder(
        cuPointerGetAttribute=(SUCCESS, True),
        cuMemGetAddressRange=(SUCCESS, BINDING.CUdeviceptr(4096), 1 << 21),
        cuIpcGetMemHandle=(SUCCESS, handle),
    )
    allocation = memory_on(driver).exported(5000)
    assert allocation is not None
    assert (allocation.address, allocation.nbytes, allocation.handle) == (4096, 1 << 21, bytes(range(64)))


@pytest.mark.parametrize(
    "answers",
    [
        {"cuPointerGetAttribute": (SUCCESS, False)},
        {"cuPointerGetAttribute": (FAILURE, None)},
        {
            "cuPointerGetAttribute": (SUCCESS, True),
            "cuMemGetAddressRange": (SUCCESS, BINDING.CUdeviceptr(0), 1),
            "cuIpcGetMemHandle": (FAILURE, None),
        },
    ],
)
def test_memory_that_the_driver_does_not_export_is_not_an_error(answers: dict[str, tuple[Any, ...]]) -> None:
    assert memory_on(Recorder(**answers)).exported(5000) is None


def test_a_handle_is_given_to_the_driver_byte_by_byte() -> None:
    driver = Recorder(cuIpcOpenMemHandle=(SUCCESS, BINDING.CUdeviceptr(7)))
    assert memory_on(driver).map(bytes(range(64))) == 7
    name, native, flags = driver.asked[1]
    assert (name, ctypes.string_at(native.getPtr(), 64), flags) == ("cuIpcOpenMemHandle", bytes(range(64)), 1)


@pytest.mark.parametrize("length", [0, 63, 65])
def test_a_handle_of_another_length_never_reaches_the_driver(length: int) -> None:
    driver = Recorder()
    with pytest.raises(MemoryMapError, match="64 bytes"):
        memory_on(driver).map(bytes(length))
    assert not driver.asked


def test_the_context_is_taken_away_again_also_after_a_failure() -> None:
    driver = Recorder(cuMemAlloc=(FAILURE, None))
    with pytest.raises(CudaError, match="cuMemAlloc: CUDA_ERROR_INVALID_VALUE"):
        memory_on(driver).allocate(100)
    assert driver.names == ["cuCtxPushCurrent", "cuMemAlloc", "cuCtxPopCurrent"]


def test_whole_pages_are_allocated() -> None:
    driver = Recorder(cuMemAlloc=(SUCCESS, BINDING.CUdeviceptr(7)))
    memory_on(driver).allocate((2 << 20) + 1)
    assert driver.asked[1] == ("cuMemAlloc", 4 << 20)


def test_copies_go_to_the_own_stream_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Recorder()
    memory = memory_on(driver)
    memory._as_torch = None  # type: ignore[assignment]
    monkeypatch.setattr(CudaMemory, "_event", lambda self, stream: "mark")
    assert memory.copy(Copies(np.array([1, 2]), np.array([3, 4]), np.array([5, 6]))) == "mark"
    assert driver.asked[1:-1] == [("cuMemcpyDtoDAsync", 1, 3, 5, 12), ("cuMemcpyDtoDAsync", 2, 4, 6, 12)]


def test_closing_twice_lets_go_once() -> None:
    driver = Recorder()
    memory = memory_on(driver)
    memory.close()
    memory.close()
    assert driver.names.count("cuStreamDestroy") == driver.names.count("cuDevicePrimaryCtxRelease") == 1


# --- copies in batches -----------------------------------------------------------------------------------------------


class Library:
    """A `libcuda` whose batches copy at once, and tell what they were given."""

    def __init__(self, newer: bool, code: int = 0) -> None:
        self.batches: list[tuple[int, int]] = []  # stream, copies

        def copy(*arguments: Any) -> int:
            target, source, nbytes, count, attributes, first, attribute_count, *rest = arguments
            assert len(rest) == (1 if newer else 2)
            assert (attributes._obj.source_order, first._obj.value, attribute_count.value) == (1, 0, 1)
            columns = [(ctypes.c_uint64 * count.value).from_address(each.value) for each in (target, source, nbytes)]
            for to, origin, size in zip(*columns, strict=True):
                ctypes.memmove(to, origin, size)
            self.batches.append((rest[-1].value, count.value))
            return code

        setattr(self, "cuMemcpyBatchAsync_v2" if newer else "cuMemcpyBatchAsync", copy)


def batch_on(library: Any) -> tuple[CopyBatch, Recorder]:
    streams = iter(range(100, 200))
    driver = Recorder()

    def create(*_: object) -> tuple[Any, int]:
        return SUCCESS, next(streams)

    driver.cuStreamCreate = driver.cuEventCreate = create  # type: ignore[attr-defined]
    return CopyBatch(driver, library), driver


@pytest.mark.parametrize("newer", [True, False], ids=["CUDA 13", "CUDA 12.8"])
@pytest.mark.parametrize("sizes", [[5], [1, 1], [7, 1, 1, 1, 900, 3], [10] * 50, [1 << 20, 1]])
def test_a_batch_copies_every_piece_and_deals_them_to_the_streams(newer: bool, sizes: list[int]) -> None:
    rng = np.random.default_rng(len(sizes))
    source = rng.integers(0, 256, sum(sizes), dtype=np.uint8)
    target = np.full_like(source, 0xEE)
    offsets = np.cumsum(sizes) - sizes
    library = Library(newer)
    batch, driver = batch_on(library)
    copies = Copies(target.ctypes.data + offsets, source.ctypes.data + offsets, np.array(sizes, np.int64))
    with batch.launched(copies, 12):
        assert np.array_equal(target, source)
    streams = [stream for stream, _ in library.batches]
    assert len(set(streams)) == len(streams) <= 4
    assert sum(count for _, count in library.batches) == len(sizes)
    waits = [tuple(asked[:2]) for name, *asked in driver.asked if name == "cuStreamWaitEvent"]
    records = [tuple(asked) for name, *asked in driver.asked if name == "cuEventRecord"]
    begin = records[0][0]
    assert records[0] == (begin, 12)
    assert [wait for wait in waits if wait[1] == begin] == [(stream, begin) for stream in streams]
    assert [(event, 12) for event, stream in records[1:]] == [
        (event, stream) for stream, event in waits if stream == 12
    ]
    assert [stream for _, stream in records[1:]] == streams


def test_equal_copies_are_dealt_evenly() -> None:
    library = Library(newer=True)
    memory = np.zeros(2000, np.uint8)
    offsets = np.arange(0, 1000, 10)
    batch, _ = batch_on(library)
    with batch.launched(
        Copies(memory.ctypes.data + offsets, memory.ctypes.data + 1000 + offsets, 0 * offsets + 10), 12
    ):
        pass
    assert [count for _, count in library.batches] == [25] * 4


def test_a_batch_that_is_refused_leaves_nothing_under_way() -> None:
    memory = np.zeros(10, np.uint8)
    batch, driver = batch_on(Library(newer=True, code=1))
    one = Copies(number(memory.ctypes.data), number(memory.ctypes.data + 5), number(5))
    with pytest.raises(CudaError, match="cuMemcpyBatchAsync: CUDA_ERROR_INVALID_VALUE"), batch.launched(one, 12):
        pytest.fail("it was not refused")
    assert driver.names.count("cuStreamSynchronize") == 4


def test_an_older_driver_has_no_batches() -> None:
    with pytest.raises(CudaError, match=r"older than CUDA 12\.8"):
        CopyBatch(Recorder(), object())
