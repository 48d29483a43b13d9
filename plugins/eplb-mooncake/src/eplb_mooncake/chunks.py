"""Splits the tensors between two ranks into chunks that fit a slot; both sides split alike, without a message."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eplb_core.transport import Payload, Payloads, as_bytes

Bytes = npt.NDArray[np.uint8]
"""Memory, uint8 `[bytes]`. numpy lets other threads run while it copies."""

ALONE_BYTES = 64 << 10
"""A tensor of this size or more shares no chunk with others: its chunks are contiguous, and can be read in place."""


@dataclass(slots=True)
class Chunk:
    """The unit of transfer.

    Attributes:
        pieces: the memory of pieces of tensors, which are laid end to end in a slot.
        nbytes: their total length, at most a slot's.
    """

    pieces: list[Bytes]
    nbytes: int

    def address(self) -> int | None:
        """Return its address, if it is one piece."""
        return address_of(self.pieces[0]) if len(self.pieces) == 1 else None

    def pack(self, slot: Bytes) -> None:
        """Copy the pieces into the slot."""
        offset = 0
        for piece in self.pieces:
            slot[offset : offset + len(piece)] = piece
            offset += len(piece)

    def unpack(self, slot: Bytes) -> None:
        """Copy the slot out to the pieces."""
        offset = 0
        for piece in self.pieces:
            piece[:] = slot[offset : offset + len(piece)]
            offset += len(piece)


def cut(payloads: Payloads, slot_bytes: int) -> dict[int, deque[Chunk]]:
    """Return peer -> its chunks, in order. A peer with no bytes has no entry."""
    cut_up = {peer: deque(_cut_one(queued, slot_bytes)) for peer, queued in payloads.items()}
    return {peer: chunks for peer, chunks in cut_up.items() if chunks}


def _cut_one(payloads: Sequence[Payload], slot_bytes: int) -> list[Chunk]:
    """Return the chunks for one peer."""
    chunks: list[Chunk] = []
    open_: Chunk | None = None  # the last chunk, if there is room in it
    for payload in payloads:
        rest = as_bytes(payload.tensor).numpy()
        if alone := len(rest) >= ALONE_BYTES:
            open_ = None
        while len(rest):
            if open_ is None:
                open_ = Chunk([], 0)
                chunks.append(open_)
            piece = rest[: slot_bytes - open_.nbytes]
            open_.pieces.append(piece)
            open_.nbytes += len(piece)
            rest = rest[len(piece) :]
            if open_.nbytes == slot_bytes:
                open_ = None
        if alone:
            open_ = None
    return chunks


def address_of(memory: Bytes) -> int:
    """Return its address."""
    return int(memory.__array_interface__["data"][0])
