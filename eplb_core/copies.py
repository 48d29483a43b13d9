"""Many copies at once, the way the device likes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_LARGE_BYTES = 256 << 10
"""From here on a copy of its own runs at the memory's rate; smaller ones share a kernel, which copies bytes slowly."""


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source into its target, on the current stream, in any order.

    Args:
        targets: uint8 `[bytes]` tensors that do not overlap, nor overlap any source.
        sources: uint8 `[bytes]` tensors of the same sizes, on the same device.
    """
    small: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for target, source in zip(targets, sources, strict=True):
        if target.nbytes >= _LARGE_BYTES:
            target.copy_(source)
        else:
            small[0].append(target)
            small[1].append(source)
    if small[0]:
        torch._foreach_copy_(*small)
