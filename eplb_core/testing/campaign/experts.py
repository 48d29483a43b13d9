"""The experts of a campaign's model: bytes that every process can compute by itself, and placements of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from eplb_core.arrays import IntArray
from eplb_core.planning.placement import EMPTY

SLOTS, EXPERTS, LAYERS = 8, 7, 5
_ROW, _SCALES = 150_001, 37  # bytes, and numbers of float32
POISON = 0xEE


def random_placement(rng: np.random.Generator, ranks: int) -> IntArray:
    """Return a placement int64 `[layers, slots]` that has every expert, a few twice, and empty slots."""
    spare = ranks * SLOTS - EXPERTS
    rows = [
        rng.permutation(np.concatenate([np.arange(EXPERTS), rng.integers(-1, EXPERTS, spare)])) for _ in range(LAYERS)
    ]
    return np.array(rows, np.int64)


@functools.cache
def expert(layer: int, logical: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an expert's tensors: uint8 `[bytes]`, and float32 `[numbers]`."""
    rng = np.random.default_rng([layer, logical])
    return (
        torch.from_numpy(rng.integers(0, 256, _ROW, dtype=np.uint8)),
        torch.from_numpy(rng.standard_normal(_SCALES, dtype=np.float32)),
    )


def room_for(experts: int) -> int:
    """Return the bytes of a window that so many experts fit in."""
    return experts * (_ROW + 4 * _SCALES + 512)


def poisoned_weights() -> list[list[torch.Tensor]]:
    """Return `[layer][tensor]` of one rank, with nothing that belongs there."""
    return [
        [torch.full((SLOTS, _ROW), POISON, dtype=torch.uint8), torch.full((SLOTS, _SCALES), -1e30)]
        for _ in range(LAYERS)
    ]


def fill(weights: Sequence[Sequence[torch.Tensor]], placement: IntArray, rank: int) -> None:
    """Write into the slots of `rank` what `placement` says."""
    for layer, slot, logical in _held(placement, rank):
        for tensor, content in zip(weights[layer], expert(layer, logical), strict=True):
            tensor[slot] = content


def wrong_slots(weights: Sequence[Sequence[torch.Tensor]], placement: IntArray, rank: int) -> list[tuple[int, int]]:
    """Return `(layer, slot)` of the slots of `rank` that do not hold what `placement` says, byte for byte."""
    return [
        (layer, slot)
        for layer, slot, logical in _held(placement, rank)
        if not all(
            torch.equal(tensor[slot].view(torch.uint8), content.view(torch.uint8))
            for tensor, content in zip(weights[layer], expert(layer, logical), strict=True)
        )
    ]


def _held(placement: IntArray, rank: int) -> list[tuple[int, int, int]]:
    mine = placement[:, rank * SLOTS : (rank + 1) * SLOTS]
    return [(layer, slot, int(mine[layer, slot])) for layer, slot in np.argwhere(mine != EMPTY).tolist()]
