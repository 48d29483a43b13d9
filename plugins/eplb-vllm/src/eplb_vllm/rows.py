"""The rows of vLLM's expert tensors in memory order, found again by address."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eplb_core.errors import InputError
from eplb_core.transport import Payload


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of `tensor`, `[slots, ...]`, whose rows are contiguous: dimensions sorted in memory order.

    vLLM keeps some weights and scales transposed, which makes no difference when a whole row is moved.

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
            "the rows of an expert tensor cannot be moved in place",
            where=f"shape {tuple(tensor.shape)}, strides {tuple(strides)}, {tensor.dtype}",
            why="a row has gaps, or elements that share memory",
            remedy="report this with the name of the model and its quantisation; vLLM's own communicators may work",
        )
    return view


def as_bytes(row: torch.Tensor) -> torch.Tensor:
    """Return the memory of a dense row as uint8 `[bytes]`, without a copy.

    Raises:
        InputError: it has gaps, or elements that share memory.
    """
    flat: torch.Tensor = in_memory_order(row.unsqueeze(0))[0]
    if not flat.numel():
        return flat.new_empty(0, dtype=torch.uint8)
    return flat.reshape(-1).view(torch.uint8)


class RowBook:
    """Payloads of the rows that vLLM sends and receives repeatedly, made once and found by the first address.

    Args:
        groups: `groups[g][tensor]`, each `[slots, ...]`: the tensors of every layer, and those of the receive buffer.
    """

    def __init__(self, groups: Sequence[Sequence[torch.Tensor]]) -> None:
        self._payloads: dict[int, tuple[Payload, ...]] = {}
        for tensors in groups:
            for rows in zip(*(tensor.detach().unbind(0) for tensor in tensors), strict=True):
                payloads = tuple(Payload(as_bytes(row)) for row in rows)
                if payloads[0].nbytes:
                    self._payloads[rows[0].data_ptr()] = payloads

    def find(self, rows: Sequence[torch.Tensor]) -> Sequence[Payload]:
        """Return the payloads of one expert's rows, known or new.

        Raises:
            InputError: a row has gaps, or elements that share memory.
        """
        known = self._payloads.get(rows[0].data_ptr()) if rows else None
        if known is not None and len(known) == len(rows):
            same = all(
                payload.nbytes == row.nbytes and payload.place[0] == row.data_ptr()
                for payload, row in zip(known, rows, strict=True)
            )
            if same:
                return known
        return [Payload(as_bytes(row.detach())) for row in rows]
