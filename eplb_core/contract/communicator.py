"""The communicator contract: what an engine may rely on and a backend must guarantee.

Every promise is stated in these docstrings and checked by the same tests for every backend.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from eplb_core.contract.context import Binding
from eplb_core.contract.staging import DEFAULT_STAGING_BYTES
from eplb_core.contract.stats import TransferStats
from eplb_core.errors import EplbError, InvalidTransferError

if TYPE_CHECKING:
    import torch

    from eplb_core.contract.payload import Payloads


class PendingTransfer:
    """A started transfer. This one has already ended; backends that overlap transfers return a subclass.

    Args:
        stats: what it did.
    """

    def __init__(self, stats: TransferStats | None) -> None:
        self._stats = stats

    def wait(self) -> TransferStats | None:
        """Wait until everything is sent and received, and return the statistics; raises as `execute()` does."""
        return self._stats

    def use_idle_time(self, work: Iterator[object]) -> None:
        """Let `wait()` advance `work`, one item at a time, while this rank is otherwise idle.

        An item takes a few hundred microseconds at most and queues nothing. The caller does the items that remain;
        the default does none.
        """
        return


class EplbCommunicator(ABC):
    """Moves tensors between the ranks of one expert-parallel group.

    A backend overrides `add_send`, `add_recv` and `execute`; everything else has a default that suits a transport
    without buffers, registrations or other resources.

    SPMD: every rank of the group calls `execute()` equally often, also with nothing queued.

    Matching: the i-th send from rank s to rank d pairs with the i-th receive on d from s. Nothing else orders them.

    Ranks are group ranks: 0 .. world_size - 1 of the communicator's group.

    Only one thread may use a communicator at a time. Communicators are independent of one another.
    """

    _stream: torch.cuda.Stream | None = None
    _binding: Binding | None = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Have what runs on a communicator, such as a background job, end before it is closed."""
        super().__init_subclass__(**keywords)
        if "close" in cls.__dict__:
            cls.close = _ending_users(cls.close)  # type: ignore[method-assign, assignment]

    @abstractmethod
    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        """Queue `tensor` to be sent to `dst_rank` by the next `execute()`.

        The tensor is kept by reference and read during `execute()`: its content may change until then. Any shape is
        accepted, including an empty one.

        Raises:
            InvalidTransferError: the rank is this rank or is not in the group, or the tensor is not contiguous or is
                on another device. Nothing is queued.
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

        The caller guarantees that `add_send` would accept each tensor and that its storage has not changed since the
        payload was made. The default adds one after the other; a backend that must be fast with hundreds of small
        tensors holds a `TransferQueue`, which takes them unchecked.

        Args:
            sends: destination -> payloads sent to it, in order.
            recvs: source -> payloads received from it, in order.

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
        """Perform all queued transfers, and return when they are done.

        Checked first: the counts, byte sizes and dtypes of both sides of every pair are compared before a byte moves.

        Stream order: the transfer sees all work enqueued before the call on the communicator's stream (or, without
        one, on the current stream). Work enqueued there after the call has returned sees the received data, and may
        overwrite the sent tensors: no peer still reads them.

        On return, and on every error, the queue is empty and no reference to a queued tensor remains.

        Raises:
            TransferMismatchError: on every rank of the group; no byte moved and the communicator stays usable.
            TransferOverflowError: more is queued than `transfer_limit_bytes`; no byte moved.
            TransferTimeoutError, PeerLostError: a peer did not do its part within the timeout, or is gone. Sent
                tensors are untouched, received ones are undefined. `error.usable` says whether this communicator can
                be used again; if not, close it and make another.
        """

    def start(self) -> PendingTransfer:
        """Start all queued transfers, and return a handle to wait on. `start().wait()` is `execute()`.

        Until `wait()` has returned, the sent tensors must not be overwritten and the received ones not touched. Up to
        `max_in_flight` transfers may be in flight; wait for them in the order in which they were started. The default
        completes the transfer before it returns.

        Raises:
            TransferError: as `execute()`, here or in `wait()`.
        """
        self.execute()
        return PendingTransfer(self.last_stats)

    @property
    def max_in_flight(self) -> int:
        """How many transfers may be started before the first one is waited for."""
        return 1

    def set_stream(self, stream: torch.Stream | None) -> None:
        """Use `stream` for packing, unpacking and stream-ordered transfers; None means the current stream.

        Args:
            stream: a `torch.cuda.Stream`, or a `torch.Stream` of a CUDA device.

        Raises:
            InvalidTransferError: the stream is on another device: its work would not be ordered with the tensors.
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
        """Declare that from now on all ranks queue both sides of every pair from one agreed plan.

        A backend may then skip the comparison across the group and let each pair of ranks check itself. A mismatch
        that it still detects raises `TransferMismatchError`, and may leave the communicator unusable. The default does
        nothing.
        """
        return

    def register(self, tensors: Sequence[torch.Tensor], *, landing: bool = False) -> None:
        """Declare tensors that will be sent from, or received into, repeatedly.

        A one-sided transport registers their memory with the device and then skips copies. The tensors are kept alive
        until `close()`. The default does nothing. A correct result never depends on registration, and each rank may
        register different tensors.

        Args:
            tensors: any tensors on the communicator's device; their whole allocations are registered.
            landing: they are received into, and nobody reads them before `execute()` has returned. After an error they
                are not used again before `close()`, since bytes may still arrive, unless `may_land_late` is False.
        """
        return

    def close(self) -> None:
        """Release everything. May be called twice; if one release fails, the others still happen.

        An error while closing means that the peers could not be informed, never that resources are still held.
        """
        if self._binding is not None:
            self._binding.closes()

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """Whether memory profiling must run a dummy collective to count this transport's buffers."""
        return True

    @property
    def may_land_late(self) -> bool:
        """Whether bytes may be written to receive tensors after `execute()`, or `wait()`, has raised.

        If False, a `Rearranger` receives directly into slots that no longer hold an expert, without a window. False is
        a promise until the process ends, even if a peer is killed, or is stopped and resumes later. The value must be
        the same on all ranks. The default makes no promise.
        """
        return True

    @property
    def transfer_limit_bytes(self) -> int | None:
        """The most bytes that one `execute()` can receive, and the most it can send, on this rank. None = no limit."""
        return None

    @property
    def staging_bytes(self) -> int:
        """Bytes of staging memory that this rank's transport holds now, on all devices together."""
        return 0

    @property
    def staging_limit_bytes(self) -> int:
        """Bytes of staging memory that the configuration allows a rank, including the caller's."""
        return DEFAULT_STAGING_BYTES if self._binding is None else self._binding.context.staging_bytes

    @property
    def last_stats(self) -> TransferStats | None:
        """Statistics of the last finished `execute()`, or None before the first."""
        return None

    @property
    def binding(self) -> Binding:
        """The configuration and group that the communicator was made for.

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
        """Attach the `Binding`; `create_eplb_communicator` does it."""
        self._binding = binding

    def __enter__(self) -> Self:
        """Return the communicator; leaving the block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, even if the block raised."""
        self.close()


_Communicator = TypeVar("_Communicator", bound=EplbCommunicator)


def _ending_users(close: Callable[[_Communicator], None]) -> Callable[[_Communicator], None]:
    @functools.wraps(close)
    def end_users_and_close(self: _Communicator) -> None:
        if self._binding is not None:
            self._binding.closes()
        close(self)

    return end_users_and_close
