"""The `torch_gloo` communicator: CPU tensors as they are, device tensors through host buffers that are reused."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from eplb_backends.torch_gloo.options import GlooOptions
from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.contract.context import BackendContext
from eplb_core.contract.payload import Transfer
from eplb_core.contract.stats import TransferStats
from eplb_core.errors import BackendUnavailableError, TransferError, TransferOverflowError
from eplb_core.transport.coalesce import as_bytes, coalesce
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
    """

    def __init__(self, context: BackendContext, options: GlooOptions, cpu_group: dist.ProcessGroup) -> None:
        self._control = context.control
        self._group = cpu_group
        self._device = context.device
        self._timeout_s = float(options.timeout)
        self._queue = TransferQueue(context.rank, context.world_size, context.device)
        half = int(options.window) // 2
        pin = options.pin_memory and context.device.type == "cuda"
        self._send_buffer = HostBuffer(half, pin)
        self._receive_buffer = HostBuffer(half, pin)
        self._stats: TransferStats | None = None

    @property
    def transfer_limit_bytes(self) -> int | None:
        """Half the window for device tensors; no limit for CPU tensors."""
        return None if self._device.type == "cpu" else self._send_buffer.limit

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
        """Compare, copy device tensors to the host, send and receive, copy back."""
        began = time.perf_counter()
        sends, recvs = self._queue.take()
        problem = None
        if self._device.type != "cpu":
            problem = self._send_buffer.refuse(sends, "send") or self._receive_buffer.refuse(recvs, "receive")
        try:
            check_match(self._control, sends, recvs, self._timeout_s, problem)
            agreed = time.perf_counter()
            host_sends, host_recvs = sends, recvs
            if self._device.type != "cpu":
                host_sends = self._send_buffer.hold(sends)
                host_recvs = self._receive_buffer.hold(recvs)
                self._copy(host_sends, sends)
                # gloo knows no streams: the copies have to be there before it reads them.
                synchronize(self._device, self._stream)
            packed = time.perf_counter()
            exchange(self._group, coalesce(host_sends), coalesce(host_recvs), self._timeout_s)
            moved = time.perf_counter()
            if self._device.type != "cpu":
                self._copy(recvs, host_recvs)
                # The buffer is the next transfer's too, and that one is not ordered behind these copies.
                synchronize(self._device, self._stream)
        except TransferError as error:
            if not error.usable:
                self._queue.close(f"an earlier transfer failed: {error.what}")
            raise
        ended = time.perf_counter()
        self._stats = TransferStats(
            seconds=ended - began,
            bytes_sent=sum(send.nbytes for send in sends),
            bytes_received=sum(recv.nbytes for recv in recvs),
            messages=len(sends) + len(recvs),
            phases={
                "agree": agreed - began,
                "pack": packed - agreed,
                "transfer": moved - packed,
                "unpack": ended - moved,
            },
            paths={transfer.peer: "gloo" for transfer in (*sends, *recvs)},
        )

    def close(self) -> None:
        """Let the host buffers go. The process group is the caller's."""
        self._queue.close("it was closed")
        self._send_buffer.release()
        self._receive_buffer.release()

    def _copy(self, to: Sequence[Transfer], source: Sequence[Transfer]) -> None:
        with on_stream(self._device, self._stream):
            for target, origin in zip(to, source, strict=True):
                as_bytes(target.tensor).copy_(as_bytes(origin.tensor), non_blocking=True)


class HostBuffer:
    """A host buffer that grows to what is needed, up to a limit, and is reused.

    Args:
        limit: the most bytes that it may grow to.
        pin: whether it is page-locked.
    """

    def __init__(self, limit: int, pin: bool) -> None:
        self.limit = limit
        self._pin = pin
        self._memory: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        return 0 if self._memory is None else self._memory.numel()

    def refuse(self, transfers: Sequence[Transfer], verb: str) -> TransferOverflowError | None:
        """Return why these transfers do not fit, or None if they do."""
        needed = sum(transfer.nbytes for transfer in transfers)
        if needed <= self.limit:
            return None
        return TransferOverflowError(
            f"{needed} bytes to {verb} do not fit the host buffer of {self.limit} bytes",
            peers={transfer.peer for transfer in transfers},
            phase="pack",
            usable=True,
            remedy=f"use a larger window ({2 * needed} bytes would do), or queue less before execute()",
        )

    def hold(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        """Return transfers of the same sizes to the same peers, whose tensors (uint8 `[bytes]`) lie in this buffer."""
        sizes = [transfer.nbytes for transfer in transfers]
        if sum(sizes) > self.nbytes:
            self._memory = None  # first give back, then take: not both at once
            self._memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self._pin)
        if self._memory is None:
            return [Transfer(torch.empty(0, dtype=torch.uint8), transfer.peer) for transfer in transfers]
        views = torch.split_with_sizes(self._memory[: sum(sizes)], sizes)
        return [Transfer(view, transfer.peer) for view, transfer in zip(views, transfers, strict=True)]

    def release(self) -> None:
        """Free the memory."""
        self._memory = None
