"""The queue of a communicator: checks each transfer when it is added, and all of them against the peers'.

A backend holds a `TransferQueue` rather than inheriting one, so that what the contract asks of every backend is
written once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import torch

from eplb_core.contract.payload import Payload, Payloads, Transfer
from eplb_core.errors import (
    CommunicatorClosedError,
    InvalidTransferError,
)

_Form = TypeVar("_Form")


class _Queue(ABC, Generic[_Form]):
    """What `add_send` and `add_recv` queued and `execute()` has not yet done; a subclass says in which form.

    Args:
        rank: this rank.
        world_size: the number of ranks.
        device: the only device that tensors may lie on; None takes any.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.sends, self.recvs = self._nothing(), self._nothing()
        self._closed_because: str | None = None

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        """Queue a send; raises as `EplbCommunicator.add_send` does."""
        self._check(tensor, dst_rank, "send", "to")
        self._put(self.sends, tensor, dst_rank)

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        """Queue a receive; raises as `EplbCommunicator.add_recv` does."""
        self._check(tensor, src_rank, "receive", "from")
        self._put(self.recvs, tensor, src_rank)

    def take(self) -> tuple[_Form, _Form]:
        """Empty the queue and return its sends and receives.

        Raises:
            CommunicatorClosedError: the queue was closed.
        """
        self.check_open()
        return self._emptied()

    def close(self, because: str) -> None:
        """Empty the queue and refuse everything from now on; the first reason stays."""
        self._emptied()
        self._closed_because = self._closed_because or because

    def check_open(self) -> None:
        """Raise `CommunicatorClosedError` if the queue was closed."""
        if self._closed_because is not None:
            raise CommunicatorClosedError(
                "this communicator cannot be used any more",
                why=self._closed_because,
                remedy="make a new one with create_eplb_communicator",
            )

    def _emptied(self) -> tuple[_Form, _Form]:
        sends, recvs = self.sends, self.recvs
        self.sends, self.recvs = self._nothing(), self._nothing()
        return sends, recvs

    @abstractmethod
    def _nothing(self) -> _Form:
        """Return what an empty queue holds."""

    @abstractmethod
    def _put(self, queued: _Form, tensor: torch.Tensor, peer: int) -> None:
        """Add a tensor that was checked."""

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
        """Return why a tensor cannot be moved as it lies, and the remedy."""
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            return (
                f"it is not contiguous (layout {tensor.layout})",
                "give a contiguous tensor; its memory is read and written as it lies",
            )
        if tensor.is_conj() or tensor.is_neg():
            return (
                "it is a lazily conjugated or negated view, whose memory holds other values than it shows",
                "give tensor.resolve_conj().resolve_neg()",
            )
        if self.device is not None and tensor.device != self.device:
            return f"it lies on {tensor.device}, and this communicator moves tensors on {self.device}", None
        return None


class TransferQueue(_Queue[list[Transfer]]):
    """What `add_send` and `add_recv` queued and `execute()` has not yet done, in the order queued."""

    def _nothing(self) -> list[Transfer]:
        return []

    def _put(self, queued: list[Transfer], tensor: torch.Tensor, peer: int) -> None:
        queued.append(Transfer(tensor, peer))


class PayloadQueue(_Queue[dict[int, list[Payload]]]):
    """The same by peer, for backends that take payloads as well (`EplbCommunicator.add_payloads`)."""

    def add_payloads(self, sends: Payloads, recvs: Payloads) -> None:
        """Queue many at once; whoever made them has checked them."""
        self.check_open()
        for queued, added in ((self.sends, sends), (self.recvs, recvs)):
            for peer, payloads in added.items():
                queued.setdefault(peer, []).extend(payloads)

    @staticmethod
    def transfers(payloads: Payloads) -> list[Transfer]:
        """Return payloads as transfers, for `check_match`."""
        return [Transfer(payload.tensor, peer) for peer, each in payloads.items() for payload in each]

    def _nothing(self) -> dict[int, list[Payload]]:
        return {}

    def _put(self, queued: dict[int, list[Payload]], tensor: torch.Tensor, peer: int) -> None:
        queued.setdefault(peer, []).append(Payload(tensor))

    def _emptied(self) -> tuple[dict[int, list[Payload]], dict[int, list[Payload]]]:
        sends, recvs = super()._emptied()
        return dict(sorted(sends.items())), dict(sorted(recvs.items()))
