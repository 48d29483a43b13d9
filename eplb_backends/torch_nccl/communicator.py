"""The `torch_nccl` communicator: one batch of isend and irecv on the device group."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from eplb_backends.torch_nccl.device_exchange import DeviceExchange
from eplb_backends.torch_nccl.options import TorchNcclOptions
from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.contract.context import BackendContext
from eplb_core.contract.stats import TransferStats
from eplb_core.errors import BackendUnavailableError, TransferError
from eplb_core.transport.coalesce import coalesce
from eplb_core.transport.match import check_match
from eplb_core.transport.process_group import exchange
from eplb_core.transport.queue import TransferQueue
from eplb_core.transport.streams import on_stream


def create(
    context: BackendContext, options: TorchNcclOptions, expert_weights: Sequence[torch.Tensor]
) -> NcclCommunicator:
    """Return a communicator over the device group, or for CPU tensors over the CPU group; a `BackendFactory`.

    Raises:
        BackendUnavailableError: the group has no process group for the tensors' device, or NCCL cannot connect it.
    """
    on_cpu = context.device.type == "cpu"
    group = context.cpu_group if on_cpu else context.device_group
    if group is None:
        raise BackendUnavailableError(
            f"torch_nccl needs a {'CPU' if on_cpu else 'device'} process group for tensors on {context.device}",
            name="torch_nccl",
            why="this group has none",
            remedy="give the group coordinator one, or use a backend that needs none, such as nixl",
        )
    if on_cpu:
        return NcclCommunicator(context, options, group)
    device_exchange = DeviceExchange(group, context.device, float(options.timeout), abort=options.abort)
    if options.warm_up != "off":
        try:
            device_exchange.warm_up(peers=options.warm_up == "peers")
        except TransferError as error:
            raise BackendUnavailableError(
                "torch_nccl could not connect its process group", name="torch_nccl", why=error.what, remedy=error.remedy
            ) from error
    return NcclCommunicator(context, options, group, device_exchange)


class NcclCommunicator(EplbCommunicator):
    """Sends and receives over a process group, ordered on the communicator's stream.

    Args:
        context: the group.
        options: the options of the config string.
        group: the process group that carries the tensors.
        device_exchange: carries device tensors over it; None for CPU tensors.
    """

    def __init__(
        self,
        context: BackendContext,
        options: TorchNcclOptions,
        group: dist.ProcessGroup,
        device_exchange: DeviceExchange | None = None,
    ) -> None:
        self._control = context.control
        self._device = context.device
        self._group = group
        self._device_exchange = device_exchange
        self._timeout_s = float(options.timeout)
        self._small_bytes = int(options.coalesce)
        self._queue = TransferQueue(context.rank, context.world_size, context.device)
        self._stats: TransferStats | None = None

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
        """Compare, then run everything as one batch on the stream."""
        began = time.perf_counter()
        sends, recvs = self._queue.take()
        try:
            check_match(self._control, sends, recvs, self._timeout_s)
            agreed = time.perf_counter()
            with on_stream(self._device, self._stream):
                outgoing, incoming = coalesce(sends, self._small_bytes), coalesce(recvs, self._small_bytes)
                if self._device_exchange is None:
                    exchange(self._group, outgoing, incoming, self._timeout_s)
                else:
                    self._device_exchange.run(outgoing, incoming)
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
            phases={"agree": agreed - began, "transfer": ended - agreed},
            paths={t.peer: "gloo" if self._device.type == "cpu" else "NCCL" for t in (*sends, *recvs)},
        )

    def close(self) -> None:
        """Refuse further use. The process group is the caller's."""
        self._queue.close("it was closed")
