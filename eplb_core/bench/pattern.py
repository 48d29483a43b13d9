"""Bytes that say what they are: each depends on expert, layer, tensor, and its place inside the tensor.

They are computed again for the comparison, from the placement alone, so that a wrong expert, a shifted or truncated
copy, and bytes that were never written are all seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from eplb_core.arrays import IntArray
from eplb_core.planning.placement import EMPTY

_WORD = 8  # bytes of an int64
_STRIDE = 0x1E3779B97F4A7C15  # odd, so that all words of a tensor differ
_FACTOR = 0x2545F4914F6CDD1D

Progress = Callable[[int, int], None]
"""Called with the bytes that are done and those that there are."""


class Pattern:
    """Makes the bytes of any expert's tensors on one device.

    Args:
        most_bytes: of the largest tensor.
        device: where the bytes are made.
    """

    def __init__(self, most_bytes: int, device: torch.device) -> None:
        self._counter = torch.arange(-(-most_bytes // _WORD), dtype=torch.int64, device=device).mul_(_STRIDE)

    def row(self, expert: int, layer: int, tensor: int, nbytes: int) -> torch.Tensor:
        """Return the bytes of one tensor of one expert, uint8 `[nbytes]`."""
        name = f"{expert}/{layer}/{tensor}".encode()
        key = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)
        # A mixing function of the counter; it is int64 arithmetic that wraps around, so any device can do it.
        words = self._counter[: -(-nbytes // _WORD)] + key
        words ^= words >> 31
        words *= _FACTOR
        words ^= words >> 29
        return words.view(torch.uint8)[:nbytes]


def fill(weights: Sequence[Sequence[torch.Tensor]], held: IntArray, pattern: Pattern, progress: Progress) -> None:
    """Write the bytes of the expert that every slot holds; empty slots become zeros.

    Args:
        weights: `weights[layer][tensor]`, uint8 `[slots, bytes]`.
        held: int64 `[layers, slots]`, the logical expert of each slot or -1.
        pattern: makes the bytes.
        progress: told after every layer.
    """
    for layer, tensors in enumerate(weights):
        for number, tensor in enumerate(tensors):
            for slot, expert in enumerate(held[layer].tolist()):
                if expert == EMPTY:
                    tensor[slot].zero_()
                else:
                    tensor[slot].copy_(pattern.row(expert, layer, number, tensor.shape[1]))
        progress(layer + 1, len(weights))


def find_wrong(
    weights: Sequence[Sequence[torch.Tensor]], held: IntArray, pattern: Pattern, progress: Progress
) -> list[tuple[int, int, int]]:
    """Return `(layer, slot, tensor)` of every tensor of a slot with a byte that is not its expert's.

    Arguments are those of `fill`; what empty slots hold does not matter.
    """
    wrong = []
    for layer, tensors in enumerate(weights):
        for number, tensor in enumerate(tensors):
            for slot, expert in enumerate(held[layer].tolist()):
                if expert != EMPTY and not torch.equal(
                    tensor[slot], pattern.row(expert, layer, number, tensor.shape[1])
                ):
                    wrong.append((layer, slot, number))
        progress(layer + 1, len(weights))
    return wrong
