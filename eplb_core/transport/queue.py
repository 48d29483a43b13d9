"""The queue of a communicator: checks each transfer when it is added, and all of them against the peers'.

A backend holds a `TransferQueue` rather than inheriting one, so that what the contract asks of every backend is
written once.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import msgspec
import torch

from eplb_core.control.plane import ControlPlane
from eplb_core.errors import (
    CommunicatorClosedError,
    ControlPlaneError,
    InvalidTransferError,
    TransferError,
    TransferMismatchError,
    TransferTimeoutError,
)

_Form = TypeVar("_Form")

_SUM_BYTES = 16
_REFUSED = b"!"


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
        self.peer = peer
        self.nbytes = tensor.nbytes


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
        self.nbytes = tensor.nbytes
        self.place = tensor.data_ptr(), self.nbytes
        self.kind = b"%d %s;" % (self.nbytes, _name(tensor.dtype))


@functools.cache
def _name(dtype: torch.dtype) -> bytes:
    return str(dtype).removeprefix("torch.").encode()


Payloads = Mapping[int, Sequence[Payload]]
"""Peer rank -> what is sent to it, or received from it, in order."""


class _Queued(msgspec.Struct, array_like=True):
    """What a rank queued, as told to its peers: peer rank -> `(bytes, dtype)` of each tensor in order."""

    sends: dict[int, list[tuple[int, str]]]
    recvs: dict[int, list[tuple[int, str]]]


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


def check_match(
    control: ControlPlane,
    sends: Sequence[Transfer],
    recvs: Sequence[Transfer],
    timeout_s: float,
    problem: TransferError | None = None,
    note: bytes = b"",
) -> list[bytes]:
    """Compare what this rank queued with what every peer queued, before a byte moves.

    Each send adds a hash of (source, destination, index, bytes, dtype) to its rank's sum and each receive takes the
    hash of the send that it expects away, so the sums of all ranks add up to zero exactly if (but for a chance of
    2^-128) everything matches. Only when they do not, the ranks tell each other what they queued.

    Args:
        control: the group's control plane.
        sends: this rank's sends, in order.
        recvs: this rank's receives, in order.
        timeout_s: the longest wait for the slowest rank, in seconds.
        problem: an error of this rank's own. It is raised here, and makes every other rank raise a
            `TransferMismatchError` that carries its text, so that none of them waits for this one.
        note: a few bytes of the backend's own for every other rank, carried along.

    Returns:
        The note of every rank, in rank order.

    Raises:
        TransferMismatchError: on every rank, naming the ranks, the index and the sizes.
        TransferTimeoutError: a rank did not call `execute()` in time.
    """
    rank = control.rank
    total = 0
    if problem is None:
        total += sum(_hashes((rank, send.peer, send) for send in sends))
        total -= sum(_hashes((recv.peer, rank, recv) for recv in recvs))
    try:
        said = _REFUSED if problem else (total % 2**128).to_bytes(_SUM_BYTES, "big") + note
        sums = control.all_gather("what each rank queued", said, timeout_s)
        refused = [r for r, value in enumerate(sums) if value == _REFUSED]
        if not refused and sum(int.from_bytes(value[:_SUM_BYTES], "big") for value in sums) % 2**128 == 0:
            return [value[_SUM_BYTES:] for value in sums]
        detail = str(problem).encode() if problem else msgspec.msgpack.encode(_Queued(_by_peer(sends), _by_peer(recvs)))
        details = control.all_gather("the details of transfers that do not match", detail, timeout_s)
    except ControlPlaneError as error:
        raise TransferTimeoutError(
            error.what, peers=error.missing, phase="agree", usable=False, why=error.why, remedy=error.remedy
        ) from error
    if problem is not None:
        raise problem
    if refused:
        raise TransferMismatchError(
            f"rank {refused[0]} refused its transfers: {details[refused[0]].decode(errors='replace')}",
            peers=refused,
            phase="agree",
            usable=True,
        )
    queued = [msgspec.msgpack.decode(value, type=_Queued) for value in details]
    raise _first_difference(queued)


def _hashes(transfers: Iterable[tuple[int, int, Transfer]]) -> Iterable[int]:
    index: dict[tuple[int, int], int] = {}
    for source, destination, transfer in transfers:
        pair = (source, destination)
        index[pair] = index.get(pair, -1) + 1
        text = f"{source} {destination} {index[pair]} {transfer.nbytes} {transfer.tensor.dtype}"
        yield int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big")


def _by_peer(transfers: Sequence[Transfer]) -> dict[int, list[tuple[int, str]]]:
    peers: dict[int, list[tuple[int, str]]] = {}
    for transfer in transfers:
        peers.setdefault(transfer.peer, []).append((transfer.nbytes, str(transfer.tensor.dtype)))
    return peers


def _first_difference(queued: Sequence[_Queued]) -> TransferMismatchError:
    for source in range(len(queued)):
        for destination in range(len(queued)):
            sent = queued[source].sends.get(destination, [])
            expected = queued[destination].recvs.get(source, [])
            if sent == expected:
                continue
            pair = f"rank {source} to rank {destination}"
            what = f"{pair}: {len(sent)} tensors are sent, {len(expected)} are expected"
            if len(sent) == len(expected):
                at = next(i for i, (ours, theirs) in enumerate(zip(sent, expected, strict=True)) if ours != theirs)
                what = f"{pair}, transfer {at}: {_describe(sent[at])} is sent, {_describe(expected[at])} is expected"
            return TransferMismatchError(
                what, peers=(source, destination), phase="agree", usable=True, why="no byte was moved"
            )
    return TransferMismatchError("the ranks queued transfers that do not match", phase="agree", usable=True)


def _describe(entry: tuple[int, str]) -> str:
    return f"{entry[0]} bytes of {entry[1]}"
