"""Cuts what one rank sends to another into chunks that fit a slot; both sides cut alike, and say nothing about it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from eplb_core import Transfer, as_bytes
from eplb_shm.window import Bytes

Chunk = list[Bytes]
"""The memory of pieces of tensors, which lie one after the other in a slot."""


def cut(transfers: Sequence[Transfer], slot_bytes: int) -> dict[int, deque[Chunk]]:
    """Return peer -> its chunks, in order. Every chunk but a peer's last one is `slot_bytes` long."""
    cut_up: dict[int, deque[Chunk]] = {}
    room: dict[int, int] = {}
    for transfer in transfers:
        rest = as_bytes(transfer.tensor.detach()).numpy()
        while len(rest):
            chunks = cut_up.setdefault(transfer.peer, deque())
            if not room.get(transfer.peer):
                chunks.append([])
                room[transfer.peer] = slot_bytes
            piece = rest[: room[transfer.peer]]
            chunks[-1].append(piece)
            room[transfer.peer] -= len(piece)
            rest = rest[len(piece) :]
    return cut_up


def pack(chunk: Chunk, slot: Bytes) -> None:
    """Copy the pieces into the slot."""
    offset = 0
    for piece in chunk:
        slot[offset : offset + len(piece)] = piece
        offset += len(piece)


def unpack(slot: Bytes, chunk: Chunk) -> None:
    """Copy the slot out to the pieces."""
    offset = 0
    for piece in chunk:
        piece[:] = slot[offset : offset + len(piece)]
        offset += len(piece)
