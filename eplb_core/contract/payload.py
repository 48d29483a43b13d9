"""Tensors that are queued: what a communicator is handed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch


class Transfer:
    """One tensor that was queued, to or from `peer`.

    Attributes:
        tensor: as it was given.
        peer: the other rank.
        nbytes: bytes of payload.
    """

    __slots__ = ("nbytes", "peer", "tensor")

    def __init__(self, tensor: torch.Tensor, peer: int) -> None:
        self.tensor = tensor
        self.peer: int = peer
        self.nbytes: int = tensor.nbytes


class Payload:
    """A tensor that will be sent or received, perhaps many times, and what that takes, looked up once.

    Attributes:
        tensor: contiguous.
        nbytes: its bytes.
        place: its address and its bytes.
        kind: its bytes and dtype, for digests over what a pair of ranks exchanges.
    """

    __slots__ = ("kind", "nbytes", "place", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.nbytes: int = tensor.nbytes
        self.place: tuple[int, int] = tensor.data_ptr(), self.nbytes
        self.kind: bytes = b"%d %s;" % (self.nbytes, _name(tensor.dtype))


@functools.cache
def _name(dtype: torch.dtype) -> bytes:
    return str(dtype).removeprefix("torch.").encode()


Payloads = Mapping[int, Sequence[Payload]]
"""Peer rank -> what is sent to it, or received from it, in order."""
