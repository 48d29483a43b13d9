"""One group of messages on a separate stream, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch

from eplb_backends.pynccl.transport import Transport
from eplb_core.errors import PeerLostError, TransferError, TransferTimeoutError
from eplb_core.transport.coalesce import Message
from eplb_core.transport.deadline import call_within, wait_until
from eplb_core.transport.streams import on_stream
from eplb_core.words import ranks_text

_LATER_S = 1.5


class Lane(Protocol):
    """The stream for NCCL's kernels, beside the caller's stream."""

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The stream handle for NCCL."""

    def enter(self) -> None:
        """Order later work here after all work enqueued on the current stream."""

    def mark(self) -> None:
        """Mark the work launched so far."""

    def finished(self) -> bool:
        """Whether the marked work is done."""

    def leave(self) -> None:
        """Order later work on the current stream after the work here."""

    def keep(self, tensor: torch.Tensor) -> None:
        """Keep the tensor's memory from being reused before all work launched here is done."""


class CudaLane:
    """A separate CUDA stream: a stuck transfer on it does not block the caller's stream.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._marked = torch.cuda.Event()

    @property
    def stream(self) -> torch.cuda.Stream:
        """The stream."""
        return self._stream

    def enter(self) -> None:
        """Wait for the current stream, on the device."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def mark(self) -> None:
        """Record an event."""
        self._marked.record(self._stream)

    def finished(self) -> bool:
        """Query the event."""
        return bool(self._marked.query())

    def leave(self) -> None:
        """Make the current stream wait for the event, on the device."""
        torch.cuda.current_stream(self._device).wait_event(self._marked)

    def keep(self, tensor: torch.Tensor) -> None:
        """Tell torch's allocator that the stream uses the memory."""
        tensor.record_stream(self._stream)


class NcclExchange:
    """Runs one group at a time.

    Args:
        transport: issues it.
        lane: where it runs.
        device: the device of all messages.
        timeout_s: for each group, in seconds, including earlier work on the stream.
        abort: whether a group that does not end is aborted.
    """

    def __init__(
        self, transport: Transport, lane: Lane, device: torch.device, timeout_s: float, *, abort: bool
    ) -> None:
        self._transport = transport
        self._lane = lane
        self._device = device
        self._timeout_s = timeout_s
        self._abort = abort

    def warm_up(self, rank: int, world_size: int) -> None:
        """Connect this rank to every other one: each sends one number to each. Every rank must call it.

        Raises:
            TransferTimeoutError: a rank did not take part in time.
            PeerLostError: NCCL cannot connect the ranks.
        """
        others = [other for other in range(world_size) if other != rank]

        def connect() -> None:
            with on_stream(self._device, None):
                one = torch.ones(1, dtype=torch.uint8, device=self._device)
                landing = torch.empty(len(others), dtype=torch.uint8, device=self._device)
                sends = [Message(one, other) for other in others]
                self.run(sends, [Message(landing[at : at + 1], other) for at, other in enumerate(others)])

        try:
            # The inner deadline applies once NCCL has launched; this one, a little later, while it is connecting.
            call_within(self._timeout_s + _LATER_S, connect)
        except TransferError:
            raise
        except TimeoutError as error:
            raise self._timed_out(others, aborted=self._abort and self._transport.abort()) from error

    def run(self, sends: Sequence[Message], recvs: Sequence[Message]) -> None:
        """Pack on the current stream, launch, wait for it on the host, unpack.

        Raises:
            TransferTimeoutError: it did not end in time.
            PeerLostError: NCCL reports an error.
        """
        messages = [*recvs, *sends]
        if not messages:
            return
        began = time.monotonic()
        peers = sorted({message.peer for message in messages})
        for message in sends:
            message.pack()
        self._lane.enter()
        try:
            self._transport.launch(sends, recvs, self._lane.stream)
        except Exception as error:  # each binding has different exceptions
            self._let_go(messages)
            raise _broken(peers, f"{type(error).__name__}: {error}") from error
        self._lane.mark()
        failure = ""

        def ended() -> bool:
            nonlocal failure
            failure = self._transport.failure()
            return bool(failure) or self._lane.finished()

        in_time = wait_until(ended, self._timeout_s - (time.monotonic() - began))
        if failure:
            self._let_go(messages)
            raise _broken(peers, failure)
        if not in_time:
            aborted = self._let_go(messages)
            raise self._timed_out(peers, aborted=aborted)
        self._lane.leave()
        for message in recvs:
            message.unpack()

    def _let_go(self, messages: Sequence[Message]) -> bool:
        """Abort, and keep the memory of a transfer that may still be running from being reused."""
        for message in messages:
            self._lane.keep(message.payload)
        return self._abort and self._transport.abort()

    def _timed_out(self, peers: Sequence[int], *, aborted: bool = False) -> TransferTimeoutError:
        return TransferTimeoutError(
            f"the NCCL transfer with {ranks_text(peers)} did not end within {self._timeout_s:g} s",
            peers=peers,
            phase="transfer",
            why="a rank is dead, stopped or did not launch its part, or earlier work on the stream does not end",
            remedy="make a new communicator"
            if aborted
            else "the transfer is still on the GPU: abort the NCCL communicator that carries it, then make new ones",
        )


def _broken(peers: Sequence[int], reason: str) -> PeerLostError:
    return PeerLostError(
        f"NCCL failed to transfer with {ranks_text(peers)}",
        peers=peers,
        phase="transfer",
        why=reason,
        remedy="set NCCL_DEBUG=WARN for details; make a new communicator",
    )
