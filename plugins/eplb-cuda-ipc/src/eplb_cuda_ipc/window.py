"""The window that tensors are packed in which peers cannot map: small, mapped by all of them, cut into slots."""

from __future__ import annotations

from eplb_cuda_ipc.memory import Memory

REGION = 0
"""The number under which the window is shown: it is the first that a rank shows."""

_SLOTS = 4  # enough to pack one while others are copied out
_ALIGNMENT = 256


class Window:
    """This rank's window.

    Args:
        memory: where it lies.
        nbytes: its size, the same on every rank.

    Attributes:
        slot_bytes: the size of a slot, the same on every rank.
        free: numbers of slots that nobody uses.
    """

    def __init__(self, memory: Memory, nbytes: int) -> None:
        self._memory = memory
        self.slot_bytes = nbytes // _SLOTS // _ALIGNMENT * _ALIGNMENT
        self.nbytes = _SLOTS * self.slot_bytes
        self.free = list(range(_SLOTS))
        self.address = memory.allocate(self.nbytes)

    def slot(self, number: int) -> int:
        """Return where a slot begins."""
        return self.address + number * self.slot_bytes

    def close(self) -> None:
        """Let go of the memory; may be called twice."""
        if self.nbytes:
            self._memory.free(self.address)
            self.nbytes = 0
