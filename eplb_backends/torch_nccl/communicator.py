"""The `torch_nccl` communicator: one batch of isend and irecv on the device group."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from eplb_backends.torch_nccl.device_exchange import DeviceExchange
from eplb_backends.torch_nccl.options import TorchNcclOptions
from eplb_core import BackendContext, TransferStats
from eplb_core.errors import BackendUnavailableError, TransferError
from eplb_core.transport import Payloads, QueuedCommunicator, coalesce, exchange


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


class NcclCommunicator(QueuedCommunicator):
    """Sends and receives over the caller's process group, ordered on the communicator's stream.

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
        super().__init__(context, options)
        self.path = "gloo" if context.device.type == "cpu" else "NCCL"
        self._group = group
        self._device_exchange = device_exchange
        self._small_bytes = int(options.coalesce)

    def move(self, sends: Payloads, recvs: Payloads) -> TransferStats:
        """Run everything as one batch on the stream."""
        began = time.perf_counter()
        outgoing, incoming = coalesce(sends, self._small_bytes), coalesce(recvs, self._small_bytes)
        if self._device_exchange is None:
            exchange(self._group, outgoing, incoming, self.timeout_s)
        else:
            self._device_exchange.run(outgoing, incoming)
        return TransferStats(phases={"transfer": time.perf_counter() - began})
