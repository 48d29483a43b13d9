"""The `torch_gloo` communicator: moves CPU tensors directly, and device tensors through reused host buffers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from eplb_backends.torch_gloo.options import GlooOptions
from eplb_backends.torch_gloo.staging import HostBuffer, Part, cut
from eplb_core import BackendContext, TransferStats
from eplb_core.errors import BackendUnavailableError
from eplb_core.transport import Message, Payloads, QueuedCommunicator, coalesce, exchange, synchronize


def create(context: BackendContext, options: GlooOptions, expert_weights: Sequence[torch.Tensor]) -> GlooCommunicator:
    """Return a communicator over the group's CPU process group; a `BackendFactory`.

    Raises:
        BackendUnavailableError: the group has no CPU process group.
    """
    if context.cpu_group is None:
        raise BackendUnavailableError(
            "torch_gloo needs a CPU process group",
            name="torch_gloo",
            why="this group has none: it is stateless",
            remedy="use a backend that needs no process group, such as nixl",
        )
    return GlooCommunicator(context, options, context.cpu_group)


class GlooCommunicator(QueuedCommunicator):
    """Sends and receives over gloo.

    Args:
        context: the group.
        options: the options of the config string.
        cpu_group: the gloo process group.
        staged: whether tensors go through host buffers; None means only device tensors.
    """

    path = "gloo"

    def __init__(
        self,
        context: BackendContext,
        options: GlooOptions,
        cpu_group: dist.ProcessGroup,
        *,
        staged: bool | None = None,
    ) -> None:
        super().__init__(context, options)
        self._group = cpu_group
        self._staged = context.device.type != "cpu" if staged is None else staged
        half = int(options.window) // 2
        pin = options.pin_memory and context.device.type == "cuda"
        self._send_buffer = HostBuffer(half, pin)
        self._receive_buffer = HostBuffer(half, pin)
        self._part_bytes = self._send_buffer.part_bytes(context.world_size - 1)

    @property
    def staging_bytes(self) -> int:
        """Bytes of the host buffers, which grow up to the window."""
        return self._send_buffer.nbytes + self._receive_buffer.nbytes

    def move(self, sends: Payloads, recvs: Payloads) -> TransferStats:
        """Send and receive; device tensors in rounds that fit the host buffers."""
        phases = {"pack": 0.0, "transfer": 0.0, "unpack": 0.0}
        if self._staged:
            self._exchange_in_rounds(sends, recvs, phases)
        else:
            began = time.perf_counter()
            exchange(self._group, coalesce(sends), coalesce(recvs), self.timeout_s)
            phases["transfer"] = time.perf_counter() - began
        return TransferStats(phases=phases)

    def release(self) -> None:
        """Free the host buffers. The process group belongs to the caller."""
        self._send_buffer.release()
        self._receive_buffer.release()

    def _exchange_in_rounds(self, sends: Payloads, recvs: Payloads, phases: dict[str, float]) -> None:
        outgoing, incoming = cut(sends, self._part_bytes), cut(recvs, self._part_bytes)
        nothing: dict[int, Part] = {}
        for sent, received in itertools.zip_longest(outgoing, incoming, fillvalue=nothing):
            began = time.perf_counter()
            messages = self._send_buffer.messages(sent)
            landing = self._receive_buffer.messages(received)
            _copy([pair for message in messages for pair in message.parts])
            # gloo knows no streams: the copies must be complete before it reads them.
            synchronize(self.context.device, self._stream)
            packed = time.perf_counter()
            exchange(self._group, _payloads(messages), _payloads(landing), self.timeout_s)
            moved = time.perf_counter()
            _copy([(piece, slot) for message in landing for slot, piece in message.parts])
            # The next round uses the same buffers, and is not ordered after these copies.
            synchronize(self.context.device, self._stream)
            phases["pack"] += packed - began
            phases["transfer"] += moved - packed
            phases["unpack"] += time.perf_counter() - moved


def _copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source, non_blocking=True)


def _payloads(messages: Sequence[Message]) -> list[Message]:
    """Return the messages without their parts, which are copied on the stream, not where gloo is called."""
    return [Message(message.payload, message.peer) for message in messages]
