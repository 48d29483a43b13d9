"""Which dtypes NCCL has a number for.

A send and a receive calculate nothing, so on the wire everything is bytes. The list decides what is accepted, as the
original interface does: who later runs a collective on the same tensors meets NCCL's limits there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

NCCL_DTYPES = frozenset(
    {
        torch.bool,  # NCCL's uint8, as torch.distributed has it
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.uint32,
        torch.int64,
        torch.uint64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    }
)


def unsupported(dtypes: Iterable[torch.dtype]) -> list[str]:
    """Return the names of those that NCCL cannot carry, sorted, each once."""
    return sorted({name_of(dtype) for dtype in dtypes if dtype not in NCCL_DTYPES})


def name_of(dtype: torch.dtype) -> str:
    """Return the name without `torch.`."""
    return str(dtype).removeprefix("torch.")
