"""The queue of a communicator: checks each tensor when it is added.

A backend that derives from `QueuedCommunicator` already has one.
"""

from __future__ import annotations

import torch

from eplb_core.contract.payload import Payload, Payloads
from eplb_core.errors import (
    CommunicatorClosedError,
    InvalidTransferError,
)


class TransferQueue:
    """What `add_send` and `add_recv` queued and `execute()` has not yet done, by peer.

    Args:
        rank: this rank.
        world_size: the number of ranks.
        device: the only device that tensors may be on; None accepts any.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.sends: dict[int, list[Payload]] = {}
        self.recvs: dict[int, list[Payload]] = {}
        self._closed_because: str | None = None

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        """Queue a send; raises as `EplbCommunicator.add_send` does."""
        self._check(tensor, dst_rank, "send", "to")
        self.sends.setdefault(dst_rank, []).append(Payload(tensor))

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        """Queue a receive; raises as `EplbCommunicator.add_recv` does."""
        self._check(tensor, src_rank, "receive", "from")
        self.recvs.setdefault(src_rank, []).append(Payload(tensor))

    def add_payloads(self, sends: Payloads, recvs: Payloads) -> None:
        """Queue many at once, unchecked; raises as `EplbCommunicator.add_payloads` does."""
        self.check_open()
        for queued, added in ((self.sends, sends), (self.recvs, recvs)):
            for peer, payloads in added.items():
                queued.setdefault(peer, []).extend(payloads)

    def take(self) -> tuple[dict[int, list[Payload]], dict[int, list[Payload]]]:
        """Empty the queue and return its sends and receives: peers in ascending order, each peer's as queued.

        Raises:
            CommunicatorClosedError: the queue was closed.
        """
        self.check_open()
        sends, recvs = self._emptied()
        return dict(sorted(sends.items())), dict(sorted(recvs.items()))

    def close(self, because: str) -> None:
        """Empty the queue and refuse everything from now on; the first reason stays."""
        self._emptied()
        self._closed_because = self._closed_because or because

    def check_open(self) -> None:
        """Raise `CommunicatorClosedError` if the queue was closed."""
        if self._closed_because is not None:
            raise CommunicatorClosedError(
                "this communicator can no longer be used",
                why=self._closed_because,
                remedy="make a new one with create_eplb_communicator",
            )

    def _emptied(self) -> tuple[dict[int, list[Payload]], dict[int, list[Payload]]]:
        sends, recvs = self.sends, self.recvs
        self.sends, self.recvs = {}, {}
        return sends, recvs

    def _check(self, tensor: torch.Tensor, peer: int, verb: str, preposition: str) -> None:
        self.check_open()
        if isinstance(peer, bool) or not isinstance(peer, int) or not 0 <= peer < self.world_size:
            raise InvalidTransferError(
                f"cannot {verb} {preposition} rank {peer!r}", why=f"the group's ranks are 0 to {self.world_size - 1}"
            )
        if peer == self.rank:
            raise InvalidTransferError(
                f"cannot {verb} {preposition} rank {peer}",
                why="it is this rank itself",
                remedy="copy the tensor instead",
            )
        if not isinstance(tensor, torch.Tensor):
            raise InvalidTransferError(f"cannot {verb} a {type(tensor).__name__}", why="it is not a torch.Tensor")
        fault = self._fault(tensor)
        if fault is not None:
            why, remedy = fault
            raise InvalidTransferError(
                f"cannot {verb} a tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype}",
                where=f"{preposition} rank {peer}",
                why=why,
                remedy=remedy,
            )

    def _fault(self, tensor: torch.Tensor) -> tuple[str, str | None] | None:
        """Return why a tensor cannot be moved as it is, and the remedy."""
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            return (
                f"it is not contiguous (layout {tensor.layout})",
                "give a contiguous tensor; its memory is read and written directly",
            )
        if tensor.is_conj() or tensor.is_neg():
            return (
                "it is a lazily conjugated or negated view, whose memory holds other values than it shows",
                "give tensor.resolve_conj().resolve_neg()",
            )
        if self.device is not None and tensor.device != self.device:
            return f"it is on {tensor.device}, but this communicator moves tensors on {self.device}", None
        return None
