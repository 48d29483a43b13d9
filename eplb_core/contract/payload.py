"""Queued tensors, as a communicator takes them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch


class Payload:
    """A tensor that will be sent or received, perhaps many times. Its address and size are looked up once.

    Attributes:
        tensor: contiguous.
        nbytes: its bytes.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.nbytes: int = tensor.nbytes

    @functools.cached_property
    def place(self) -> tuple[int, int]:
        """Its address and its bytes."""
        return self.tensor.data_ptr(), self.nbytes

    @functools.cached_property
    def kind(self) -> bytes:
        """Its size and dtype, for digests of what a pair of ranks exchanges."""
        return b"%d %s;" % (self.nbytes, _name(self.tensor.dtype))


@functools.cache
def _name(dtype: torch.dtype) -> bytes:
    return str(dtype).removeprefix("torch.").encode()


Payloads = Mapping[int, Sequence[Payload]]
"""Peer rank -> what is sent to it, or received from it, in order."""
