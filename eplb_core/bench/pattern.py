"""Self-describing bytes: each depends on expert, layer, tensor, and its position inside the tensor.

They are recomputed for the comparison, from the placement alone, which detects a wrong expert, a shifted or truncated
copy, and bytes that were never written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from eplb_core.arrays import IntArray
from eplb_core.planning.placement import EMPTY
from eplb_core.transport.pattern import Pattern

Progress = Callable[[int, int], None]
"""Called with the bytes done and the total bytes."""


def fill(weights: Sequence[Sequence[torch.Tensor]], held: IntArray, pattern: Pattern, progress: Progress) -> None:
    """Write the bytes of the expert that every slot holds; empty slots become zeros.

    Args:
        weights: `weights[layer][tensor]`, uint8 `[slots, bytes]`.
        held: int64 `[layers, slots]`, the logical expert of each slot or -1.
        pattern: generates the bytes.
        progress: called after every layer.
    """
    for layer, tensors in enumerate(weights):
        for number, tensor in enumerate(tensors):
            for slot, expert in enumerate(held[layer].tolist()):
                if expert == EMPTY:
                    tensor[slot].zero_()
                else:
                    tensor[slot].copy_(pattern.row(tensor.shape[1], expert, layer, number))
        progress(layer + 1, len(weights))


def find_wrong(
    weights: Sequence[Sequence[torch.Tensor]], held: IntArray, pattern: Pattern, progress: Progress
) -> list[tuple[int, int, int]]:
    """Return `(layer, slot, tensor)` of every tensor of a slot with a wrong byte.

    Takes the arguments of `fill`; the content of empty slots does not matter.
    """
    wrong = []
    for layer, tensors in enumerate(weights):
        for number, tensor in enumerate(tensors):
            for slot, expert in enumerate(held[layer].tolist()):
                if expert != EMPTY and not torch.equal(
                    tensor[slot], pattern.row(tensor.shape[1], expert, layer, number)
                ):
                    wrong.append((layer, slot, number))
        progress(layer + 1, len(weights))
    return wrong
