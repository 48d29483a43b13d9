"""The `pynccl` communicator: ncclSend and ncclRecv in one group per `execute()`.

The group is opened after the ranks have compared their queues, not at the first `add_send`. NCCL launches a group when
it is closed and cannot discard one, so a mismatch found while the group is open could not keep bytes from moving. And
a group is a state of the thread, so any other NCCL call of the engine between adding and executing would become part
of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from eplb_backends.pynccl.bootstrap import open_transport
from eplb_backends.pynccl.dtypes import name_of, unsupported
from eplb_backends.pynccl.exchange import CudaLane, Lane, NcclExchange
from eplb_backends.pynccl.options import PyNcclOptions
from eplb_backends.pynccl.transport import Transport
from eplb_core import BackendContext, TransferStats
from eplb_core.errors import BackendUnavailableError, InvalidTransferError, TransferError
from eplb_core.transport import Payloads, QueuedCommunicator, coalesce, in_order

_REINTERPRET = "pynccl?reinterpret=bytes moves their bytes as they are"


def create(
    context: BackendContext, options: PyNcclOptions, expert_weights: Sequence[torch.Tensor]
) -> PyNcclCommunicator:
    """Return a communicator; a `BackendFactory`.

    Raises:
        BackendUnavailableError: the tensors are not on a CUDA device, NCCL cannot carry their dtypes, the engine's
            communicator is not usable, or NCCL cannot connect the ranks.
        BackendNotInstalledError: there is no engine's communicator, and nccl4py is not installed.
    """
    if context.device.type != "cuda":
        raise BackendUnavailableError(
            "pynccl moves tensors on CUDA-like devices only", name="pynccl", why=f"these are on {context.device.type}"
        )
    refused = unsupported(tensor.dtype for tensor in expert_weights) if options.reinterpret == "off" else []
    if refused:
        raise BackendUnavailableError(
            f"NCCL cannot carry the dtypes {', '.join(refused)}", name="pynccl", remedy=_REINTERPRET
        )
    transport = open_transport(context, options)
    communicator = PyNcclCommunicator(context, options, transport, CudaLane(context.device))
    if options.warm_up == "peers":
        try:
            communicator.warm_up()
        except TransferError as error:
            communicator.close()
            raise BackendUnavailableError(
                "pynccl could not connect the ranks", name="pynccl", why=str(error)
            ) from error
    return communicator


class PyNcclCommunicator(QueuedCommunicator):
    """Sends and receives over an NCCL communicator, ordered on the communicator's stream.

    Args:
        context: the group.
        options: the options of the config string.
        transport: the NCCL communicator; closed with this one.
        lane: the stream that NCCL's kernels run on.
    """

    path = "NCCL"

    def __init__(self, context: BackendContext, options: PyNcclOptions, transport: Transport, lane: Lane) -> None:
        super().__init__(context, options)
        self._small_bytes = int(options.coalesce)
        self._any_dtype = options.reinterpret == "bytes"
        self._transport = transport
        self._exchange = NcclExchange(transport, lane, context.device, self.timeout_s, abort=options.abort)

    def warm_up(self) -> None:
        """Connect this rank to every other one; raises `TransferError` if that fails."""
        self._exchange.warm_up(self.context.rank, self.context.world_size)

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        """Queue a send."""
        self._check_dtype(tensor)
        super().add_send(tensor, dst_rank)

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        """Queue a receive."""
        self._check_dtype(tensor)
        super().add_recv(tensor, src_rank)

    def add_payloads(self, sends: Payloads, recvs: Payloads) -> None:
        """Queue many at once."""
        if not self._any_dtype:
            for payload in (*in_order(sends), *in_order(recvs)):
                self._check_dtype(payload.tensor)
        super().add_payloads(sends, recvs)

    def move(self, sends: Payloads, recvs: Payloads) -> TransferStats:
        """Issue everything as one group."""
        began = time.perf_counter()
        self._exchange.run(coalesce(sends, self._small_bytes), coalesce(recvs, self._small_bytes))
        return TransferStats(phases={"transfer": time.perf_counter() - began})

    def release(self) -> None:
        """Close a communicator of our own."""
        self._transport.close()

    def _check_dtype(self, tensor: object) -> None:
        if self._any_dtype or not isinstance(tensor, torch.Tensor) or not unsupported([tensor.dtype]):
            return
        raise InvalidTransferError(
            f"cannot move a tensor of dtype {name_of(tensor.dtype)}",
            why="NCCL cannot carry it",
            remedy=_REINTERPRET,
        )
