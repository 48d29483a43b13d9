"""Pieces of registered memory by number, so that a READ uses lists that NIXL has already checked.

A source numbers the rows of its registered tensors and publishes the table with its metadata; then it announces numbers
instead of addresses. A destination numbers the places that it reads into on first use. With the numbers of both sides,
a request costs 5 to 14 us; without them NIXL takes 18 to 61 us to look up 4 to 64 pieces. Looking up the numbers for
each READ would cost more than that, so they come from look-ups that are necessary anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from eplb_backends.nixl.agent import Agent
from eplb_core.arrays import IntArray

MOST_PIECES = 1 << 14
"""The most rows, and the most places, that have numbers; 100 to 200 bytes each. Others are read by address."""

Block = tuple[int, int, int, int]
"""Pieces at equal distances: address of the first, bytes of each, distance, count."""


class Rows:
    """The rows of this rank's registered tensors, numbered in the order in which they were added.

    Attributes:
        blocks: what peers must know.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._numbers: dict[tuple[int, int], int] = {}
        self._count = 0

    def add(self, block: Block) -> bool:
        """Number pieces; return False if they already have numbers, or there is no room."""
        address, nbytes, distance, count = block
        pieces = [(address + row * distance, nbytes) for row in range(min(count, MOST_PIECES + 1))]
        if self._count + count > MOST_PIECES or all(piece in self._numbers for piece in pieces):
            return False
        self.blocks.append(block)
        self._numbers.update(zip(pieces, range(self._count, self._count + count), strict=True))
        self._count += count
        return True

    def number(self, place: tuple[int, int]) -> int:
        """Return the number of the row at `(address, bytes)`, or -1 if there is none."""
        return self._numbers.get(place, -1)


def block_of(tensor: torch.Tensor) -> Block | None:
    """Return the rows of a tensor along its first dimension, or None if their bytes are not contiguous."""
    if not tensor.nbytes:
        return None
    if tensor.dim() < 2:
        return (tensor.data_ptr(), tensor.nbytes, tensor.nbytes, 1) if tensor.is_contiguous() else None
    row, distance = tensor[0], tensor.stride(0) * tensor.element_size()
    if not row.is_contiguous() or distance < row.nbytes:
        return None
    return tensor.data_ptr(), row.nbytes, distance, tensor.shape[0]


class PeerRows:
    """The rows that a peer has published.

    Args:
        peer: its agent's name.
        blocks: its table.

    Raises:
        ValueError: it is not a table of at most `MOST_PIECES` rows.
    """

    def __init__(self, peer: str, blocks: Sequence[Block]) -> None:
        self._peer = peer
        self._blocks = np.array(blocks, np.int64).reshape(-1, 4)
        address, nbytes, distance, count = self._blocks.T
        if (self._blocks <= 0).any() or (count > MOST_PIECES).any() or count.sum() > MOST_PIECES:
            raise ValueError(f"a table of {count.sum()} rows")
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        self._addresses: IntArray = np.repeat(address, count) + within * np.repeat(distance, count)
        self._lengths: IntArray = np.repeat(nbytes, count)
        self._list: Any = None

    def addresses(self, numbers: IntArray, nbytes: IntArray) -> IntArray:
        """Return the addresses of rows; all three arrays are int64 `[rows]`, the numbers from 0.

        Raises:
            ValueError: there is no such row, or it has other bytes.
        """
        wrong = numbers >= len(self._addresses)
        if not wrong.any():
            wrong = self._lengths[numbers] != nbytes
        if wrong.any():
            number, size = int(numbers[wrong][0]), int(nbytes[wrong][0])
            raise ValueError(f"row {number} of {size} bytes is not among the {len(self._addresses)} published rows")
        return self._addresses[numbers]

    def prepared(self, agent: Agent) -> Any:
        """Return the list of all rows."""
        if self._list is None:
            self._list = agent.prepare(self._peer, self._blocks)
        return self._list

    def drop(self, agent: Agent) -> None:
        """Release the list. READs made from it continue."""
        if self._list is not None:
            agent.drop(self._list)
            self._list = None


class LandingPieces:
    """Pieces of this rank's landing memory, numbered on first use.

    Attributes:
        numbers: (address, bytes) -> number.
    """

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, int], int] = {}
        self._list: Any = None
        self._prepared = 0
        self._missed = 0

    def add(self, address: int, nbytes: int) -> int:
        """Return the number of a piece in landing memory; -1 if there is no room for it."""
        if len(self.numbers) >= MOST_PIECES:
            return self.numbers.get((address, nbytes), -1)
        return self.numbers.setdefault((address, nbytes), len(self.numbers))

    def prepared(self, agent: Agent, numbers: Sequence[int] | IntArray) -> Any:
        """Return a prepared list with the pieces, or None while making one does not pay.

        A new list costs in proportion to all its pieces, so it is made once that many look-ups have missed.
        """
        if self._list is None or np.max(numbers) >= self._prepared:
            self._missed += len(numbers)
            if self._missed < len(self.numbers):
                return None
            if self._list is not None:
                agent.drop(self._list)
                self._list = None
            pieces = np.array(list(self.numbers), np.int64)
            ones = np.ones(len(pieces), np.int64)
            self._list = agent.prepare("", np.column_stack([pieces, pieces[:, 1], ones]))
            self._prepared, self._missed = len(pieces), 0
        return self._list
