"""The communicator contract: what an engine may rely on, and what a backend has to keep.

Every promise is in these docstrings, and is checked for every backend by the same tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TransferStats:
    """What one `execute()` did on this rank.

    Attributes:
        seconds: wall time from the call to the return.
        bytes_sent: payload bytes that left this rank.
        bytes_received: payload bytes that reached this rank.
        messages: tensors sent and received.
        phases: phase name -> seconds, in the order in which they ran.
        paths: peer rank -> the transport that its bytes took, where the backend knows it.
    """

    seconds: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    messages: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=dict)


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

    def set_stream(self, stream: torch.cuda.Stream | None) -> None:
        """Use `stream` for packing, unpacking and stream-ordered transfers; None means the current stream."""
        self._stream = stream

    def register(self, tensors: Sequence[torch.Tensor]) -> None:
        """Declare tensors that will be sent from, or received into, again and again.

        A one-sided transport registers their memory with the device and then skips copies. The tensors have to stay
        alive until `close()`. The default does nothing; registering is never needed for a right result.
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
    def transfer_limit_bytes(self) -> int | None:
        """The most bytes that one `execute()` can receive, and the most it can send, on this rank. None = no limit."""
        return None

    @property
    def staging_bytes(self) -> int:
        """Bytes of memory, on all devices together, that this rank's transport holds for staging now."""
        return 0

    @property
    def last_stats(self) -> TransferStats | None:
        """What the last finished `execute()` did, or None before the first."""
        return None

    def __enter__(self) -> Self:
        """Return the communicator; leaving the block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, whatever happened inside the block."""
        self.close()
