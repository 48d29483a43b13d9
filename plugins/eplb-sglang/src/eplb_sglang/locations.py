"""SGLang's own account of where experts are, corrected after a rearrangement that stopped half-way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from eplb_sglang.survivors import EMPTY, Placement


def logical_to_physical(placement: Placement, num_logical: int, width: int | None = None) -> torch.Tensor:
    """Return int64 `[layers, num_logical, width]`: the slots that hold each expert, in order, then -1.

    Args:
        placement: `[layers, slots]`, -1 for empty slots.
        num_logical: the number of experts.
        width: the third dimension; None for as many as are needed.
    """
    holders: list[list[list[int]]] = [[[] for _ in range(num_logical)] for _ in placement]
    for layer, row in enumerate(placement.tolist()):
        for slot, expert in enumerate(row):
            if expert != EMPTY:
                holders[layer][expert].append(slot)
    needed = max((len(slots) for layer in holders for slots in layer), default=0)
    width = needed if width is None else width
    padded = [[slots + [EMPTY] * (width - len(slots)) for slots in layer] for layer in holders]
    return torch.tensor(padded, dtype=torch.int64)


def hold(
    metadata: Any, layers: Sequence[int], placement: Placement, dispatch: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Write what the slots of some layers really hold into the metadata that SGLang is about to take over.

    The router then sends tokens to slots that hold their expert, and to no empty one. SGLang has no mark for an empty
    slot; it gets expert 0, to which nothing is sent there.

    Args:
        metadata: SGLang's `ExpertLocationMetadata`, changed in place.
        layers: which layers.
        placement: int64 `[layers of the model, slots of all ranks]`, -1 for empty slots.
        dispatch: SGLang's function from int64 `[layers, experts, slots]` to the slot that this rank sends to,
            `[layers, experts]`; it is called only where SGLang keeps such a table.
    """
    chosen = list(layers)
    rows = placement[chosen]
    slots = torch.from_numpy(rows.clip(min=0))
    where = logical_to_physical(rows, metadata.num_logical_experts, metadata.logical_to_all_physical_map.shape[-1])
    parts = {
        "physical_to_logical_map": slots,
        "physical_to_logical_map_cpu": slots,
        "logical_to_all_physical_map": where,
        "logical_to_all_physical_map_cpu": where,
        "logical_to_all_physical_map_num_valid": (where != EMPTY).sum(-1),
    }
    if metadata.logical_to_rank_dispatch_physical_map is not None:
        parts["logical_to_rank_dispatch_physical_map"] = dispatch(where)
    for name, part in parts.items():
        target = getattr(metadata, name)
        target[chosen] = part.to(device=target.device, dtype=target.dtype)
