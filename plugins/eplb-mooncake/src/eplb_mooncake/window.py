"""A rank's staging memory: one allocation, half of it slots to send from, half slots to receive into."""

from __future__ import annotations

import numpy as np

from eplb_mooncake.chunks import Bytes, address_of

_MOST_SLOTS = 64
_LARGEST_SLOT = 1 << 20  # larger ones leave the cache before they are unpacked: 1 MiB took 0.4 ms, 4 MiB 2.3 ms


class Window:
    """Staging memory, divided into slots of equal size.

    Args:
        nbytes: the most that it may take, in bytes.

    Attributes:
        nbytes: its size.
        slot_bytes: the size of a slot, the same on ranks with the same `nbytes`.
        memory: all of it, uint8 `[nbytes]`.
        to_send: numbers of the slots that are free to send from.
        to_receive: numbers of the slots that are free to receive into.
    """

    def __init__(self, nbytes: int) -> None:
        half = nbytes // 2
        self.slot_bytes = min(_LARGEST_SLOT, half // 4)
        slots = min(half // self.slot_bytes, _MOST_SLOTS)
        self.nbytes = 2 * slots * self.slot_bytes
        self.memory = np.zeros(self.nbytes, np.uint8)
        self.to_send = list(range(slots))
        self.to_receive = list(range(slots, 2 * slots))

    def slot(self, number: int) -> Bytes:
        """Return a slot, uint8 `[slot_bytes]`."""
        return self.memory[number * self.slot_bytes :][: self.slot_bytes]

    def address(self, number: int) -> int:
        """Return the address of a slot."""
        return address_of(self.memory) + number * self.slot_bytes
