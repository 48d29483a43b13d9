"""The rows of SGLang's expert tensors as their bytes lie in memory."""

from __future__ import annotations

import torch

from eplb_core.errors import InputError


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of `tensor`, `[slots, ...]`, whose rows are contiguous: dimensions sorted as they lie in memory.

    SGLang keeps some weights and scales transposed, which changes nothing for whoever moves a whole row.

    Raises:
        InputError: a row has gaps, or elements that share memory.
    """
    if tensor.dim() < 2 or not tensor.shape[0] or tensor[0].is_contiguous():
        return tensor.detach()
    strides = tensor.stride()
    inner = sorted(range(1, tensor.dim()), key=lambda dim: (-strides[dim], dim))
    view = tensor.detach().permute(0, *inner)
    if not view[0].is_contiguous():
        raise InputError(
            "the rows of an expert tensor cannot be moved as they lie in memory",
            where=f"shape {tuple(tensor.shape)}, strides {tuple(strides)}, {tensor.dtype}",
            why="a row has gaps, or elements that share memory",
            remedy="report this with the name of the model and its quantisation; unset EPLB_BACKEND until then",
        )
    return view
