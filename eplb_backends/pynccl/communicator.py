"""The `pynccl` communicator: ncclSend and ncclRecv in one group for each `execute()`.

The group is opened after the ranks have compared what they queued, not at the first `add_send`. NCCL launches a group
when it is closed and offers no way to discard one, so a mismatch that is noticed with the group open could not keep
bytes from moving; and a group is a state of the thread, so whatever else the engine does over NCCL between adding and
executing would be drawn into it.
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
from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.contract.context import BackendContext
from eplb_core.contract.stats import TransferStats
from eplb_core.errors import BackendUnavailableError, InvalidTransferError, TransferError
from eplb_core.transport.coalesce import coalesce
from eplb_core.transport.match import check_match
from eplb_core.transport.queue import TransferQueue
from eplb_core.transport.streams import on_stream

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
            "pynccl moves tensors on CUDA-like devices only", name="pynccl", why=f"these lie on {context.device.type}"
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


class PyNcclCommunicator(EplbCommunicator):
    """Sends and receives over an NCCL communicator, ordered on the communicator's stream.

    Args:
        context: the group.
        options: the options of the config string.
        transport: the NCCL communicator; it is closed with this.
        lane: the stream that NCCL's kernels run on.
    """

    def __init__(self, context: BackendContext, options: PyNcclOptions, transport: Transport, lane: Lane) -> None:
        self._control = context.control
        self._device = context.device
        self._timeout_s = float(options.timeout)
        self._small_bytes = int(options.coalesce)
        self._any_dtype = options.reinterpret == "bytes"
        self._transport = transport
        self._exchange = NcclExchange(transport, lane, context.device, self._timeout_s, abort=options.abort)
        self._queue = TransferQueue(context.rank, context.world_size, context.device)
        self._stats: TransferStats | None = None

    @property
    def last_stats(self) -> TransferStats | None:
        """What the last finished `execute()` did."""
        return self._stats

    def warm_up(self) -> None:
        """Connect this rank with every other one; raises `TransferError` if that fails."""
        self._exchange.warm_up(self._queue.rank, self._queue.world_size)

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        """Queue a send."""
        self._check_dtype(tensor)
        self._queue.add_send(tensor, dst_rank)

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        """Queue a receive."""
        self._check_dtype(tensor)
        self._queue.add_recv(tensor, src_rank)

    def execute(self) -> None:
        """Compare, then issue everything as one group."""
        began = time.perf_counter()
        sends, recvs = self._queue.take()
        try:
            check_match(self._control, sends, recvs, self._timeout_s)
            agreed = time.perf_counter()
            with on_stream(self._device, self._stream):
                self._exchange.run(coalesce(sends, self._small_bytes), coalesce(recvs, self._small_bytes))
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
            paths={transfer.peer: "NCCL" for transfer in (*sends, *recvs)},
        )

    def close(self) -> None:
        """Refuse further use, and let a communicator of our own go."""
        self._queue.close("it was closed")
        self._transport.close()

    def _check_dtype(self, tensor: object) -> None:
        if self._any_dtype or not isinstance(tensor, torch.Tensor) or not unsupported([tensor.dtype]):
            return
        raise InvalidTransferError(
            f"cannot move a tensor of dtype {name_of(tensor.dtype)}",
            why="NCCL cannot carry it",
            remedy=_REINTERPRET,
        )
