"""One kernel for many copies: the driver takes 4 to 5 us to launch each copy, longer than copying a small expert.

232 copies of 1.5 MB took an H200 1,020 us one by one, with or without the binding, and 800 us as one batch
(`cuMemcpyBatchAsync`), nearly all of it inside the driver; one kernel with a table of all copies takes 250 us.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from eplb_cuda_ipc.calls import CudaError, call
from eplb_cuda_ipc.memory import Copies

_CHUNK_BYTES = 64 << 10  # copied by one block
_THREADS = 256
_PIECES = 4096  # per launch
_ROW_BYTES = 32

SOURCE = """
template <typename Word>
__device__ unsigned long long copy_words(char* target, const char* source, unsigned long long bytes)
{
    const unsigned words = bytes / sizeof(Word), step = blockDim.x;
    Word* to = reinterpret_cast<Word*>(target);
    const Word* from = reinterpret_cast<const Word*>(source);
    unsigned at = threadIdx.x;
    for (; at + 3 * step < words; at += 4 * step) {  // four loads under way at a time
        const Word a = from[at], b = from[at + step], c = from[at + 2 * step], d = from[at + 3 * step];
        to[at] = a;
        to[at + step] = b;
        to[at + 2 * step] = c;
        to[at + 3 * step] = d;
    }
    for (; at < words; at += step)
        to[at] = from[at];
    return words * sizeof(Word);
}

struct Piece {
    unsigned long long target, source, bytes, first_block;
};

extern "C" __global__ void __launch_bounds__(THREADS) copy_pieces(const Piece* pieces, int count)
{
    int low = 0, high = count - 1;  // the last piece that does not begin behind this block
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (pieces[middle].first_block <= blockIdx.x)
            low = middle;
        else
            high = middle - 1;
    }
    const Piece piece = pieces[low];
    const unsigned long long begin = (blockIdx.x - piece.first_block) * CHUNK_BYTES;
    const unsigned long long bytes = piece.bytes - begin < CHUNK_BYTES ? piece.bytes - begin : CHUNK_BYTES;
    char* target = reinterpret_cast<char*>(piece.target + begin);
    const char* source = reinterpret_cast<const char*>(piece.source + begin);
    const unsigned long long places = piece.target | piece.source;
    unsigned long long done = 0;
    if (places % 16 == 0)
        done = copy_words<uint4>(target, source, bytes);
    else if (places % 8 == 0)
        done = copy_words<unsigned long long>(target, source, bytes);
    else if (places % 4 == 0)
        done = copy_words<unsigned>(target, source, bytes);
    copy_words<char>(target + done, source + done, bytes - done);
}
"""


def compiled(capability: tuple[int, int]) -> bytes:
    """Return the kernel for GPUs of this compute capability, as a CUBIN.

    Raises:
        CudaError: NVRTC is missing, or refuses it.
    """
    try:
        from cuda.bindings import nvrtc

        program = call(nvrtc, "nvrtcCreateProgram", SOURCE.encode(), b"copy_pieces.cu", 0, [], [])
    except (ImportError, RuntimeError) as error:
        raise CudaError(f"there is no NVRTC: {error}") from error
    try:
        architecture = "--gpu-architecture=sm_{}{}".format(*capability)
        options = [architecture, f"-DTHREADS={_THREADS}", f"-DCHUNK_BYTES={_CHUNK_BYTES}ull"]
        call(nvrtc, "nvrtcCompileProgram", program, len(options), [option.encode() for option in options])
        binary = bytes(call(nvrtc, "nvrtcGetCUBINSize", program))
        call(nvrtc, "nvrtcGetCUBIN", program, binary)
        return binary
    finally:
        call(nvrtc, "nvrtcDestroyProgram", program)


class CopyKernel:
    """The kernel on one GPU, whose context is current in every call.

    Args:
        driver: the binding of the driver.
        capability: the GPU's compute capability.

    Raises:
        CudaError: the kernel cannot be made, or loaded.
    """

    def __init__(self, driver: Any, capability: tuple[int, int]) -> None:
        self._driver = driver
        binary = np.frombuffer(compiled(capability), np.uint8)
        self._module = call(driver, "cuModuleLoadData", binary.ctypes.data)
        self._function = call(driver, "cuModuleGetFunction", self._module, b"copy_pieces")
        self._table = int(call(driver, "cuMemAlloc", _PIECES * _ROW_BYTES))

    def launch(self, copies: Copies, stream: int) -> None:
        """Enqueue copies; none of them is empty."""
        for begin in range(0, len(copies.nbytes), _PIECES):
            part = slice(begin, begin + _PIECES)
            blocks = -(-copies.nbytes[part] // _CHUNK_BYTES)
            first = np.cumsum(blocks) - blocks
            table = np.stack([copies.target[part], copies.source[part], copies.nbytes[part], first], axis=1)
            # Stream order keeps the table unchanged until the previous launch has ended, and a copy from pageable
            # memory has read its source when the call returns.
            call(self._driver, "cuMemcpyHtoDAsync", self._table, table.ctypes.data, table.nbytes, stream)
            address, count = ctypes.c_void_p(self._table), ctypes.c_int(len(table))
            arguments = (ctypes.c_void_p * 2)(ctypes.addressof(address), ctypes.addressof(count))
            grid = (int(blocks.sum()), 1, 1)
            block = (_THREADS, 1, 1)
            where = (0, stream, ctypes.addressof(arguments), 0)
            call(self._driver, "cuLaunchKernel", self._function, *grid, *block, *where)

    def close(self) -> None:
        """Release everything; nothing may be in flight."""
        call(self._driver, "cuMemFree", self._table)
        call(self._driver, "cuModuleUnload", self._module)
