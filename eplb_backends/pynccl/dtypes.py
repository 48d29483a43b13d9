"""The dtypes that NCCL supports.

A send and a receive compute nothing, so on the wire everything is bytes. The list only decides what is accepted, as in
the original interface: a later collective on the same tensors would be subject to NCCL's limits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from eplb_backends.pynccl import spec

NCCL_DTYPES = frozenset(getattr(torch, name) for name in spec.NCCL_DTYPES)


def unsupported(dtypes: Iterable[torch.dtype]) -> list[str]:
    """Return the names of the dtypes that NCCL cannot carry, sorted, each once."""
    return sorted({name_of(dtype) for dtype in dtypes if dtype not in NCCL_DTYPES})


def name_of(dtype: torch.dtype) -> str:
    """Return the name without `torch.`."""
    return str(dtype).removeprefix("torch.")
