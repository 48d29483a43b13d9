"""The slots of one rank: filled from a source of experts, and compared with it byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eplb_core.errors import InputError
from eplb_core.inputs.experts import ExpertSource

if TYPE_CHECKING:
    import torch

Advance = Callable[[int, int], None]
"""Called with the bytes done and the total bytes."""


@dataclass(frozen=True, slots=True)
class SlotCheck:
    """The result of comparing slots with their source.

    Attributes:
        num_slots: slots that were compared, without empty ones.
        num_bytes: bytes that were compared.
        wrong: the slots whose bytes differ, `(row of the placement, local slot, name of the first wrong tensor)`.
    """

    num_slots: int
    num_bytes: int
    wrong: tuple[tuple[int, int, str], ...]


def allocate_slots(
    source: ExpertSource, layers: Sequence[int], num_slots: int, device: torch.device
) -> list[list[torch.Tensor]]:
    """Allocate the tensors of one rank, all zero.

    Args:
        source: the source of the experts.
        layers: which of the source's layers to hold.
        num_slots: slots of this rank in each of them.
        device: where to allocate.

    Returns:
        For each layer, tensors `[num_slots, *shape]` in the order of `source.tensor_specs(layer)`.
    """
    import torch

    return [
        [
            torch.zeros(num_slots, spec.nbytes, dtype=torch.uint8, device=device)
            .view(spec.torch_dtype)
            .reshape(num_slots, *spec.shape)
            for spec in source.tensor_specs(layer)
        ]
        for layer in layers
    ]


def fill_slots(
    weights: Sequence[Sequence[torch.Tensor]],
    source: ExpertSource,
    layers: Sequence[int],
    placement: NDArray[np.int64],
    advance: Advance | None = None,
) -> None:
    """Copy into each slot the expert that the placement names; empty slots stay as they are.

    Args:
        weights: as returned by `allocate_slots`.
        source: the source of the experts.
        layers: which of the source's layers the rows are.
        placement: int64 `[len(layers), local slots]`, of this rank alone.
        advance: called with the bytes after each slot.
    """
    total, done = _bytes_to_hold(source, layers, placement), 0
    for row, layer in enumerate(layers):
        for slot, expert in enumerate(placement[row].tolist()):
            if expert < 0:
                continue
            for target, tensor in zip(weights[row], source.expert_tensors(layer, expert), strict=True):
                _bytes_of(target[slot]).copy_(_bytes_of(tensor))
                done += tensor.nbytes
            if advance is not None:
                advance(done, total)


def check_slots(
    weights: Sequence[Sequence[torch.Tensor]],
    truth: ExpertSource,
    layers: Sequence[int],
    placement: NDArray[np.int64],
    advance: Advance | None = None,
) -> SlotCheck:
    """Compare every byte of every slot with the expert that the placement names, read again from its source.

    Args:
        weights: the tensors of one rank.
        truth: the source of the correct bytes.
        layers: which of its layers the rows are.
        placement: int64 `[len(layers), local slots]`, of this rank alone.
        advance: called with the bytes after each slot.
    """
    import torch

    total, done, num_slots = _bytes_to_hold(truth, layers, placement), 0, 0
    wrong = []
    for row, layer in enumerate(layers):
        names = [spec.name for spec in truth.tensor_specs(layer)]
        for slot, expert in enumerate(placement[row].tolist()):
            if expert < 0:
                continue
            num_slots += 1
            differing = None
            for name, held, right in zip(names, weights[row], truth.expert_tensors(layer, expert), strict=True):
                # Bytes, not values: a NaN differs from itself, and 0.0 equals -0.0.
                if differing is None and not torch.equal(_bytes_of(held[slot]).cpu(), _bytes_of(right)):
                    differing = name
                done += right.nbytes
            if differing is not None:
                wrong.append((row, slot, differing))
            if advance is not None:
                advance(done, total)
    return SlotCheck(num_slots, done, tuple(wrong))


def check_same_experts(source: ExpertSource, truth: ExpertSource, layers: Sequence[int]) -> None:
    """Raise `InputError` unless the experts of both sources agree in number, tensors, shapes and dtypes."""
    ours, theirs = (source.num_layers, source.num_experts), (truth.num_layers, truth.num_experts)
    if ours != theirs:
        raise InputError(
            f"the checkpoint to verify against has {theirs[0]} layers of {theirs[1]} experts, "
            f"the other has {ours[0]} of {ours[1]}"
        )
    for layer in layers:
        if source.tensor_specs(layer) != truth.tensor_specs(layer):
            raise InputError(f"the checkpoint to verify against has different tensors in MoE layer {layer}")


def _bytes_to_hold(source: ExpertSource, layers: Sequence[int], placement: NDArray[np.int64]) -> int:
    held = np.count_nonzero(placement >= 0, axis=1).tolist()
    return sum(
        count * sum(spec.nbytes for spec in source.tensor_specs(layer))
        for count, layer in zip(held, layers, strict=True)
    )


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.reshape(-1).view(torch.uint8)
