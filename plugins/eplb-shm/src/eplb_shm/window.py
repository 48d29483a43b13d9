"""A rank's window: memory that it fills and its peers read, with no name that could be left behind.

The memory belongs to file descriptors only. When the last process that holds one ends, for any reason, the kernel frees
the memory; and no limit on /dev/shm applies, such as the 64 MiB of a container.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref

import numpy as np
import numpy.typing as npt

from eplb_core import ProbeResult
from eplb_core.errors import BackendUnavailableError

Bytes = npt.NDArray[np.uint8]
"""Memory, uint8 `[bytes]`. numpy copies it faster than torch, and also lets other threads run meanwhile."""

MAX_SLOTS = 64
"""Few enough that the messages about all of them fit into a socket's buffer, so that sending one never blocks."""

_LARGEST_SLOT = 1 << 20  # the message about a smaller one costs more than packing it
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Window:
    """This rank's window, divided into slots.

    Args:
        nbytes: its size.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.handle = os.memfd_create("eplb-shm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.handle, nbytes)
            # Mapping memory that another process can shrink risks a SIGBUS.
            fcntl.fcntl(self.handle, fcntl.F_ADD_SEALS, _SEALS)
            self.memory: Bytes | None = map_window(self.handle, nbytes, writable=True)
        except BaseException:
            os.close(self.handle)
            raise
        # Engines drop a communicator without closing it, and nothing else closes the descriptor.
        self._let_go = weakref.finalize(self, os.close, self.handle)
        self.slot_bytes = slot_bytes(nbytes)
        self.free = list(range(min(nbytes // self.slot_bytes, MAX_SLOTS)))

    def slot(self, number: int) -> Bytes:
        """Return a slot, uint8 `[slot_bytes]`."""
        if self.memory is None:
            raise RuntimeError("the window is closed")
        return self.memory[number * self.slot_bytes :][: self.slot_bytes]

    def close(self) -> None:
        """Release the memory; may be called twice."""
        if self.memory is not None:
            self.memory = None
            self._let_go()


def slot_bytes(window_bytes: int) -> int:
    """Return the size of the slots of a window, the same on both sides; at least four fit."""
    return min(_LARGEST_SLOT, window_bytes // 4)


def map_window(handle: int, nbytes: int, *, writable: bool) -> Bytes:
    """Return shared memory as uint8 `[nbytes]`; it is unmapped when the array is freed.

    Raises:
        BackendUnavailableError: it is smaller than expected, or can still be shrunk.
    """
    if os.fstat(handle).st_size != nbytes or fcntl.fcntl(handle, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise BackendUnavailableError(f"the shared memory is not a window of {nbytes} bytes", name="shm")
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return np.frombuffer(mmap.mmap(handle, nbytes, mmap.MAP_SHARED, access), np.uint8)


def probe(device_type: str) -> ProbeResult:
    """Write into a window and read it through a second mapping; a `BackendProbe`."""
    window = Window(1 << 16)
    seen = map_window(window.handle, window.nbytes, writable=False)
    window.slot(1)[:] = 7
    works = bool((seen[window.slot_bytes :][: window.slot_bytes] == 7).all())
    window.close()
    return ProbeResult(works, "shared memory was written and read" if works else "a second mapping showed other bytes")
