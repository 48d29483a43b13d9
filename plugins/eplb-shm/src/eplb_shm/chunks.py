"""Splits the tensors between two ranks into chunks that fit a slot; both sides split alike, without a message."""

from __future__ import annotations

from collections import deque

from eplb_core.transport import Payloads, as_bytes
from eplb_shm.window import Bytes

Chunk = list[Bytes]
"""The memory of pieces of tensors, which are laid end to end in a slot."""


def cut(payloads: Payloads, slot_bytes: int) -> dict[int, deque[Chunk]]:
    """Return peer -> its chunks, in order. Every chunk except a peer's last one is `slot_bytes` long."""
    cut_up: dict[int, deque[Chunk]] = {}
    for peer, queued in payloads.items():
        room = 0
        for payload in queued:
            rest = as_bytes(payload.tensor).numpy()
            while len(rest):
                if not room:
                    cut_up.setdefault(peer, deque()).append([])
                    room = slot_bytes
                piece = rest[:room]
                cut_up[peer][-1].append(piece)
                room -= len(piece)
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
