"""The communicator contract: what an engine may rely on, and what a backend has to keep.

Every promise is in these docstrings, and is checked for every backend by the same tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from eplb_core.contract.context import Binding
from eplb_core.contract.stats import TransferStats
from eplb_core.errors import EplbError, InvalidTransferError

if TYPE_CHECKING:
    import torch

    from eplb_core.contract.payload import Payloads

DEFAULT_STAGING_BYTES = 256 << 20
"""The staging memory that a rank uses where nothing else is configured, in bytes."""


class PendingTransfer:
    """A transfer that was started. This one has ended already; backends that overlap transfers return their own.

    Args:
        stats: what it did.
    """

    def __init__(self, stats: TransferStats | None) -> None:
        self._stats = stats

    def wait(self) -> TransferStats | None:
        """Return when everything is sent and received, with what was done; raises as `execute()` does."""
        return self._stats

    def use_idle_time(self, work: Iterator[object]) -> None:
        """Let `wait()` advance `work`, by one item at a time, while this rank has nothing else to do.

        An item takes a few hundred microseconds at most, and queues nothing. What is left of it is the caller's to do;
        the default leaves all of it.
        """
        return


class EplbCommunicator(ABC):
    """Moves tensors between the ranks of one expert-parallel group.

    A backend overrides `add_send`, `add_recv` and `execute`; everything else has a default that is right for a
    transport without buffers, registrations or resources of its own.

    SPMD: every rank of the group calls `execute()` equally often, also with nothing queued.

    Matching: the i-th send from rank s to rank d pairs with the i-th receive on d from s. Nothing else orders them.

    Ranks are group ranks: 0 .. world_size - 1 of the group that the communicator was made for.

    One thread at a time uses a communicator. Different communicators are independent of one another.
    """

    _stream: torch.cuda.Stream | None = None
    _binding: Binding | None = None

    @abstractmethod
    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        """Queue `tensor` to be sent to `dst_rank` by the next `execute()`.

        The tensor is kept by reference and read during `execute()`: its content may still change until then. Any
        shape, also with no elements at all.

        Raises:
            InvalidTransferError: the rank is this rank or is not in the group, or the tensor is not contiguous or
                lies on another device. Nothing is queued.
            CommunicatorClosedError: after `close()`, or after a failure that left the communicator unusable.
        """

    @abstractmethod
    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        """Queue a receive from `src_rank` into `tensor`, which must not be touched until `execute()` returns.

        Raises:
            InvalidTransferError: as in `add_send`.
            CommunicatorClosedError: as in `add_send`.
        """

    def add_payloads(self, sends: Payloads, recvs: Payloads) -> None:
        """Queue many sends and receives at once, as `add_send` and `add_recv` would one by one.

        The caller answers for the payloads: their tensors are such as `add_send` accepts, and nobody gave them other
        memory since they were made. The default adds one after the other; a backend for which hundreds of small
        tensors matter holds a `TransferQueue`, which takes them as they are.

        Args:
            sends: destination -> what it is sent, in order.
            recvs: source -> what is received from it, in order.

        Raises:
            InvalidTransferError, CommunicatorClosedError: as in `add_send`.
        """
        for rank, payloads in sends.items():
            for payload in payloads:
                self.add_send(payload.tensor, rank)
        for rank, payloads in recvs.items():
            for payload in payloads:
                self.add_recv(payload.tensor, rank)

    @abstractmethod
    def execute(self) -> None:
        """Perform all that is queued, and return when it is done.

        Checked first: the counts, byte sizes and dtypes of both sides of every pair are compared before a byte moves.

        Stream order: the transfer sees all work that was enqueued before the call on the communicator's stream (or,
        without one, on the current stream). Work that is enqueued there after the call returned sees the received
        data, and may overwrite the sent tensors: no peer still reads them.

        On return, and on every error, the queue is empty and no reference to a queued tensor is left.

        Raises:
            TransferMismatchError: on every rank of the group; no byte moved and the communicator stays usable.
            TransferOverflowError: more is queued than `transfer_limit_bytes`; no byte moved.
            TransferTimeoutError, PeerLostError: a peer did not do its part within the timeout, or is gone. Sent
                tensors are untouched, received ones are undefined. `error.usable` says whether this communicator can
                be used again; if not, close it and make a new one.
        """

    def start(self) -> PendingTransfer:
        """Begin all that is queued, and return what to wait for. `start().wait()` is `execute()`.

        Until `wait()` returned, the sent tensors may not be overwritten and the received ones not touched. Up to
        `max_in_flight` transfers may be under way; they are waited for in the order in which they were started. The
        default does everything at once.

        Raises:
            TransferError: as `execute()`, here or in `wait()`.
        """
        self.execute()
        return PendingTransfer(self.last_stats)

    @property
    def max_in_flight(self) -> int:
        """How many transfers may be started before the first of them is waited for."""
        return 1

    def set_stream(self, stream: torch.Stream | None) -> None:
        """Use `stream` for packing, unpacking and stream-ordered transfers; None means the current stream.

        Args:
            stream: a `torch.cuda.Stream`, or a `torch.Stream` of a CUDA device.

        Raises:
            InvalidTransferError: it is a stream of another device: nothing on it would be ordered with the tensors.
        """
        from eplb_core.contract.cuda_stream import (
            as_cuda_stream,  # needs torch, which importing this module does not load
        )

        device = None if self._binding is None else self._binding.context.device
        if stream is not None and device is not None and device.type != "cpu" and stream.device != device:
            raise InvalidTransferError(
                f"cannot use a stream of {stream.device}", why=f"this communicator moves tensors on {device}"
            )
        self._stream = None if stream is None else as_cuda_stream(stream)

    def trust_matching(self, trusted: bool) -> None:
        """Say that from now on both sides of every pair are queued from one plan, which all ranks have agreed on.

        A backend may then leave out the comparison of the whole group and leave each pair of ranks to itself. What it
        still notices raises `TransferMismatchError`, and may leave the communicator unusable. The default does nothing.
        """
        return

    def register(self, tensors: Sequence[torch.Tensor], *, landing: bool = False) -> None:
        """Declare tensors that will be sent from, or received into, again and again.

        A one-sided transport registers their memory with the device and then skips copies. The tensors are kept alive
        until `close()`. The default does nothing; registering is never needed for a right result, and every rank may
        register what it likes.

        Args:
            tensors: any tensors on the communicator's device; the allocations behind them are registered whole.
            landing: they are received into, and nobody reads them before `execute()` returned. After an error they
                are not used again before `close()`, since bytes may still arrive, unless `may_land_late` is False.
        """
        return

    def close(self) -> None:
        """Release everything. May be called twice; releases the rest even when a part of it fails.

        An error while closing means that the peers could not be told, never that resources are still held.
        """
        return

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """Whether memory profiling has to run a dummy collective so that this transport's buffers are counted."""
        return True

    @property
    def may_land_late(self) -> bool:
        """Whether bytes may be written to receive tensors after `execute()`, or `wait()`, has raised.

        Where that cannot be, a `Rearranger` receives into slots that hold nothing any more instead of a window. False
        is a promise, also for a peer that is killed, or stopped and goes on later, and until the process ends. It has
        to be the same on all ranks. The default makes no promise.
        """
        return True

    @property
    def transfer_limit_bytes(self) -> int | None:
        """The most bytes that one `execute()` can receive, and the most it can send, on this rank. None = no limit."""
        return None

    @property
    def staging_bytes(self) -> int:
        """Bytes of memory, on all devices together, that this rank's transport holds for staging now."""
        return 0

    @property
    def staging_limit_bytes(self) -> int:
        """Bytes of staging memory that the configuration allows a rank, what the caller stages in included."""
        return DEFAULT_STAGING_BYTES

    @property
    def last_stats(self) -> TransferStats | None:
        """What the last finished `execute()` did, or None before the first."""
        return None

    @property
    def binding(self) -> Binding:
        """What it was made from and for.

        Raises:
            EplbError: it was not made by `create_eplb_communicator`.
        """
        if self._binding is None:
            raise EplbError(
                f"this {type(self).__name__} is not bound to a group",
                remedy="make it with create_eplb_communicator, or call bind() yourself",
            )
        return self._binding

    def bind(self, binding: Binding) -> None:
        """Tell the communicator what it was made from; `create_eplb_communicator` does."""
        self._binding = binding

    def __enter__(self) -> Self:
        """Return the communicator; leaving the block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, whatever happened inside the block."""
        self.close()
