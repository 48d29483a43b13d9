"""The window for packing tensors that peers cannot map: small, mapped by all peers, divided into slots."""

from __future__ import annotations

from eplb_cuda_ipc.memory import Memory

REGION = 0
"""The window's region number: it is the first region that a rank shows."""

_SLOTS = 4  # enough to pack one while others are copied out
_ALIGNMENT = 256


class Window:
    """This rank's window.

    Args:
        memory: of this rank.
        nbytes: its size, the same on every rank.

    Attributes:
        slot_bytes: the size of a slot, the same on every rank.
        free: numbers of free slots.
    """

    def __init__(self, memory: Memory, nbytes: int) -> None:
        self._memory = memory
        self.slot_bytes = nbytes // _SLOTS // _ALIGNMENT * _ALIGNMENT
        self.nbytes = _SLOTS * self.slot_bytes
        self.free = list(range(_SLOTS))
        self.address = memory.allocate(self.nbytes)

    def slot(self, number: int) -> int:
        """Return the address of a slot."""
        return self.address + number * self.slot_bytes

    def close(self) -> None:
        """Free the memory; may be called twice."""
        if self.nbytes:
            self._memory.free(self.address)
            self.nbytes = 0
