"""The `torch_gloo` communicator: CPU tensors as they are, device tensors through host buffers that are reused."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from eplb_backends.torch_gloo.options import GlooOptions
from eplb_backends.torch_gloo.staging import HostBuffer, Part, cut
from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.contract.context import BackendContext
from eplb_core.contract.payload import Transfer
from eplb_core.contract.stats import TransferStats
from eplb_core.errors import BackendUnavailableError, TransferError
from eplb_core.transport.coalesce import Message, coalesce
from eplb_core.transport.match import check_match
from eplb_core.transport.process_group import exchange
from eplb_core.transport.queue import TransferQueue
from eplb_core.transport.streams import on_stream, synchronize


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


class GlooCommunicator(EplbCommunicator):
    """Sends and receives over gloo.

    Args:
        context: the group.
        options: the options of the config string.
        cpu_group: the gloo process group.
        staged: whether tensors go through host buffers; None means exactly those on a device.
    """

    def __init__(
        self,
        context: BackendContext,
        options: GlooOptions,
        cpu_group: dist.ProcessGroup,
        *,
        staged: bool | None = None,
    ) -> None:
        self._control = context.control
        self._group = cpu_group
        self._device = context.device
        self._staged = context.device.type != "cpu" if staged is None else staged
        self._timeout_s = float(options.timeout)
        self._queue = TransferQueue(context.rank, context.world_size, context.device)
        half = int(options.window) // 2
        pin = options.pin_memory and context.device.type == "cuda"
        self._send_buffer = HostBuffer(half, pin)
        self._receive_buffer = HostBuffer(half, pin)
        self._part_bytes = self._send_buffer.part_bytes(context.world_size - 1)
        self._stats: TransferStats | None = None

    @property
    def staging_bytes(self) -> int:
        """Bytes of the host buffers, which grow up to the window."""
        return self._send_buffer.nbytes + self._receive_buffer.nbytes

    @property
    def last_stats(self) -> TransferStats | None:
        """What the last finished `execute()` did."""
        return self._stats

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        """Queue a send."""
        self._queue.add_send(tensor, dst_rank)

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        """Queue a receive."""
        self._queue.add_recv(tensor, src_rank)

    def execute(self) -> None:
        """Compare, then send and receive; device tensors in rounds that fit the host buffers."""
        began = time.perf_counter()
        sends, recvs = self._queue.take()
        phases = {"agree": 0.0, "pack": 0.0, "transfer": 0.0, "unpack": 0.0}
        try:
            check_match(self._control, sends, recvs, self._timeout_s)
            phases["agree"] = time.perf_counter() - began
            if self._staged:
                self._exchange_in_rounds(sends, recvs, phases)
            else:
                exchange(self._group, coalesce(sends), coalesce(recvs), self._timeout_s)
                phases["transfer"] = time.perf_counter() - began - phases["agree"]
        except TransferError as error:
            if not error.usable:
                self._queue.close(f"an earlier transfer failed: {error.what}")
            raise
        self._stats = TransferStats(
            seconds=time.perf_counter() - began,
            bytes_sent=sum(send.nbytes for send in sends),
            bytes_received=sum(recv.nbytes for recv in recvs),
            messages=len(sends) + len(recvs),
            phases=phases,
            paths={transfer.peer: "gloo" for transfer in (*sends, *recvs)},
        )

    def close(self) -> None:
        """Let the host buffers go. The process group is the caller's."""
        self._queue.close("it was closed")
        self._send_buffer.release()
        self._receive_buffer.release()

    def _exchange_in_rounds(
        self, sends: Sequence[Transfer], recvs: Sequence[Transfer], phases: dict[str, float]
    ) -> None:
        outgoing, incoming = cut(sends, self._part_bytes), cut(recvs, self._part_bytes)
        nothing: dict[int, Part] = {}
        for sent, received in itertools.zip_longest(outgoing, incoming, fillvalue=nothing):
            began = time.perf_counter()
            messages = self._send_buffer.messages(sent)
            landing = self._receive_buffer.messages(received)
            self._copy([pair for message in messages for pair in message.parts])
            # gloo knows no streams: the copies have to be there before it reads them.
            synchronize(self._device, self._stream)
            packed = time.perf_counter()
            exchange(self._group, _payloads(messages), _payloads(landing), self._timeout_s)
            moved = time.perf_counter()
            self._copy([(piece, slot) for message in landing for slot, piece in message.parts])
            # The buffers are the next round's too, and that one is not ordered behind these copies.
            synchronize(self._device, self._stream)
            phases["pack"] += packed - began
            phases["transfer"] += moved - packed
            phases["unpack"] += time.perf_counter() - moved

    def _copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        with on_stream(self._device, self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)


def _payloads(messages: Sequence[Message]) -> list[Message]:
    """Return the messages without their parts, which are copied on the stream and not where gloo is called."""
    return [Message(message.payload, message.peer) for message in messages]
