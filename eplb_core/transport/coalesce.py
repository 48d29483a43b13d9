"""Joins the small tensors of each pair of ranks into one message, so that scales do not cost a message each.

Sender and receiver group independently; they agree because they have already compared sizes (`check_match`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eplb_core.contract.payload import Payloads

SMALL_BYTES = 64 << 10
"""Tensors below this many bytes are joined; copying one costs less than a separate message."""


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One message to or from a peer: a single tensor, or a buffer for several small ones.

    Attributes:
        payload: what is sent or received, contiguous.
        peer: the other rank.
        parts: pairs of a uint8 view of `payload` and the tensor that belongs there; empty for a single tensor.
    """

    payload: torch.Tensor
    peer: int
    parts: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    def pack(self) -> None:
        """Copy the parts into the payload."""
        if self.parts:
            torch._foreach_copy_([slot for slot, _ in self.parts], [tensor for _, tensor in self.parts])

    def unpack(self) -> None:
        """Copy the payload out to the parts."""
        if self.parts:
            torch._foreach_copy_([tensor for _, tensor in self.parts], [slot for slot, _ in self.parts])


def coalesce(payloads: Payloads, small_bytes: int = SMALL_BYTES) -> list[Message]:
    """Return the messages that carry `payloads`: for each peer first its small tensors, joined, then the others.

    Tensors without elements need no message. Buffers are allocated on the tensors' device.

    Args:
        payloads: peer -> what was queued, in order.
        small_bytes: tensors below this many bytes are joined. It must be the same on every rank.
    """
    messages = []
    for peer, queued in sorted(payloads.items()):
        tensors = [as_bytes(payload.tensor) for payload in queued if payload.nbytes]
        small = [tensor for tensor in tensors if len(tensor) < small_bytes]
        if len(small) > 1:
            messages.append(_join(small, peer))
        else:
            small = []
        joined = {id(tensor) for tensor in small}
        messages.extend(Message(tensor, peer) for tensor in tensors if id(tensor) not in joined)
    return messages


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor's memory as uint8 `[bytes]`, without a copy, and outside of autograd."""
    if tensor.dtype is torch.uint8 and tensor.dim() == 1:
        return tensor  # as queued by a rearrangement: another view for each of thousands would be slow
    if not tensor.numel():  # the strides of a tensor without elements may forbid a view
        return tensor.new_empty(0, dtype=torch.uint8)
    return tensor.detach().reshape(-1).view(torch.uint8)


def _join(tensors: Sequence[torch.Tensor], peer: int) -> Message:
    buffer = torch.empty(sum(map(len, tensors)), dtype=torch.uint8, device=tensors[0].device)
    slots = torch.split_with_sizes(buffer, [len(tensor) for tensor in tensors])
    return Message(buffer, peer, tuple(zip(slots, tensors, strict=True)))
