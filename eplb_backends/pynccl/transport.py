"""The NCCL communicators that `pynccl` can use: the engine's, and a new one. Both issue one group at a time."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from eplb_core.transport.coalesce import Message
from eplb_core.transport.deadline import call_within

_ABORT_S = 1.0  # ncclCommAbort itself can hang; it is then abandoned in a thread
_CLOSE_S = 5.0  # destroying waits for the other ranks of the node, which may close later or be gone
_IN_PROGRESS = 7  # ncclInProgress

UNIQUE_ID_BYTES = 128
"""The size of NCCL's unique id."""

logger = logging.getLogger(__name__)


class EngineCommunicator(Protocol):
    """The interface of the coordinator's `device_communicator.pynccl_comm`."""

    disabled: bool
    available: bool

    def send(self, tensor: torch.Tensor, dst: int, stream: torch.cuda.Stream | None = None) -> None:
        """Enqueue a send."""

    def recv(self, tensor: torch.Tensor, src: int, stream: torch.cuda.Stream | None = None) -> None:
        """Enqueue a receive."""

    def group_start(self) -> None:
        """Open a group."""

    def group_end(self) -> None:
        """Close the group and launch its contents."""


class Transport(ABC):
    """Issues sends and receives on an NCCL communicator."""

    @abstractmethod
    def launch(self, sends: Sequence[Message], recvs: Sequence[Message], stream: torch.cuda.Stream | None) -> None:
        """Enqueue all of them on `stream` as one group.

        The group is always closed. NCCL launches nothing of a group in which a call failed.
        """

    @abstractmethod
    def failure(self) -> str:
        """Return the error that NCCL reports for pending work, or an empty text."""

    @abstractmethod
    def abort(self) -> bool:
        """Abort pending work, without the other ranks; return whether that is known to have worked."""

    @abstractmethod
    def close(self) -> None:
        """Release the communicator, if it is ours."""


class EngineTransport(Transport):
    """Uses the engine's communicator, which the engine keeps.

    Args:
        communicator: the one that the group coordinator carries.
    """

    def __init__(self, communicator: EngineCommunicator) -> None:
        self._communicator = communicator

    def launch(self, sends: Sequence[Message], recvs: Sequence[Message], stream: torch.cuda.Stream | None) -> None:
        """Enqueue all as one group."""
        self._communicator.group_start()
        with closing_group(self._communicator.group_end):
            for message in recvs:
                self._communicator.recv(message.payload, message.peer, stream=stream)
            for message in sends:
                self._communicator.send(message.payload, message.peer, stream=stream)

    def failure(self) -> str:
        """Return nothing: its interface does not report errors."""
        return ""

    def abort(self) -> bool:
        """Do nothing: its interface offers no abort, and the engine uses it for other things."""
        return False

    def close(self) -> None:
        """Do nothing: it belongs to the engine."""


class OwnTransport(Transport):
    """Uses a new communicator, made with nccl4py. Bootstrapping needs only the unique id.

    Args:
        unique_id: 128 bytes that `unique_id()` returned on one of the ranks.
        rank: this rank.
        world_size: the number of ranks.
        device: the CUDA device.
        timeout_s: for all ranks to meet, in seconds.

    Raises:
        TimeoutError: a rank did not come in time.
        Exception: what nccl4py raises.
    """

    def __init__(self, unique_id: bytes, rank: int, world_size: int, device: torch.device, timeout_s: float) -> None:
        import nccl.core

        def connect() -> Any:
            with torch.cuda.device(device):
                identity = nccl.core.UniqueId.from_bytes(unique_id)
                return nccl.core.Communicator.init(nranks=world_size, rank=rank, unique_id=identity)

        self._nccl: Any = nccl.core
        self._device = device
        self._communicator: Any = call_within(timeout_s, connect)

    @staticmethod
    def unique_id() -> bytes:
        """Return a new id; its holder listens on a port until all ranks have met.

        Raises:
            Exception: what nccl4py raises if it finds no NCCL.
        """
        import nccl.core

        return bytes(nccl.core.get_unique_id())

    def launch(self, sends: Sequence[Message], recvs: Sequence[Message], stream: torch.cuda.Stream | None) -> None:
        """Enqueue all as one group."""
        handle = 0 if stream is None else int(stream.cuda_stream)
        self._nccl.group_start()
        with closing_group(self._nccl.group_end):
            for message in recvs:
                self._communicator.recv(message.payload, message.peer, stream=handle)
            for message in sends:
                self._communicator.send(message.payload, message.peer, stream=handle)

    def failure(self) -> str:
        """Return NCCL's asynchronous error."""
        result = self._communicator.get_async_error()
        if int(result) in (0, _IN_PROGRESS):
            return ""
        return f"{self._nccl.get_error_string(result)}: {self._communicator.get_last_error()}".rstrip(": ")

    def abort(self) -> bool:
        """Abort and free the communicator."""
        return self._leave("abort", _ABORT_S)

    def close(self) -> None:
        """Destroy the communicator, waiting at most a few seconds for the other ranks of the node."""
        self._leave("destroy", _CLOSE_S)

    def _leave(self, how: str, timeout_s: float) -> bool:
        communicator, self._communicator = self._communicator, None
        if communicator is None:
            return True

        def leave() -> None:
            with torch.cuda.device(self._device):
                getattr(communicator, how)()

        try:
            call_within(timeout_s, leave)
        except TimeoutError:
            logger.warning("NCCL did not %s a communicator within %g s; it continues in the background", how, timeout_s)
            return False
        except Exception as error:  # noqa: BLE001 - closing releases the rest all the same
            logger.warning("NCCL failed to %s a communicator: %s", how, error)
            return False
        return True


@contextlib.contextmanager
def closing_group(end: Callable[[], None]) -> Any:
    """Call `end` at the end of the block, also after an error, which then propagates."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # a group with a failed call fails again when it is closed
            end()
        raise
    end()
