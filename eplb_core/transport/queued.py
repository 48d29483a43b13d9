"""A communicator with queue, comparison, statistics and errors built in: a backend adds how bytes move."""

from __future__ import annotations

import contextlib
import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.contract.context import BackendContext
from eplb_core.contract.option_types import CommonOptions
from eplb_core.contract.payload import Payload, Payloads
from eplb_core.contract.stats import TransferStats
from eplb_core.errors import TransferError
from eplb_core.transport.failure import as_transfer_error
from eplb_core.transport.match import check_match
from eplb_core.transport.queue import TransferQueue
from eplb_core.transport.streams import on_stream


class QueuedCommunicator(EplbCommunicator):
    """Implements what the contract asks of every backend; a subclass adds `move`, and `release` if it holds resources.

    `execute()` empties the queue, compares what all ranks queued, calls `move`, and records statistics. Any exception
    of `move` leaves as a `TransferError`. After one that is not `usable`, the peers are informed (`give_up`), and
    everything except `close()` raises `CommunicatorClosedError`.

    A subclass that adds no arguments is itself a `BackendFactory`.

    Args:
        context: the group.
        options: the options of the config string.
        expert_weights: the tensors of one layer. Not kept.

    Attributes:
        context: as given: rank, world size, device, control plane and process groups.
        timeout_s: the longest that any wait for a peer may take, in seconds.
        queue: what is queued.
        path: the transport that the bytes take, for `TransferStats.paths`; empty if `move` reports it per peer.
    """

    path = ""

    def __init__(
        self, context: BackendContext, options: CommonOptions, expert_weights: Sequence[torch.Tensor] = ()
    ) -> None:
        self.context = context
        self.timeout_s = float(options.timeout)
        self.queue = TransferQueue(context.rank, context.world_size, context.device)
        self._stats: TransferStats | None = None
        self._released = False

    # --- what a backend writes --------------------------------------------------------------------------------------

    @abstractmethod
    def move(self, sends: Payloads, recvs: Payloads) -> TransferStats | None:
        """Send and receive everything, and return when nothing is in flight any more.

        All ranks take part, and both sides of every pair have the same counts, sizes and dtypes. The communicator's
        stream is the current one. Tensors without elements are among the payloads.

        Args:
            sends: destination -> payloads sent to it, in order; destinations ascend.
            recvs: source -> payloads received from it, in order; sources ascend.

        Returns:
            What only the transport knows: `phases`, `paths` and `descriptors`; None for nothing. The rest is filled in.

        Raises:
            TransferError: it failed; `peers` names the ranks to blame. Any other exception is turned into one.
        """

    def release(self) -> None:
        """Release everything that this rank holds. Called once, also after a failure or an incomplete construction."""
        return

    def refuse(self, sends: Payloads, recvs: Payloads) -> TransferError | None:
        """Return why this rank cannot move its queue, or None. With a reason, every rank raises before a byte moves.

        The error should be `usable`: nothing has happened yet.
        """
        return None

    def give_up(self, error: TransferError) -> None:
        """Inform the peers that this rank has failed, and which ranks are to blame, so that they do not wait for it.

        Called once, when a transfer has failed and the communicator cannot be used again. Its exceptions are ignored.
        """
        return

    # --- the contract -----------------------------------------------------------------------------------------------

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        """Queue a send."""
        self.queue.add_send(tensor, dst_rank)

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        """Queue a receive."""
        self.queue.add_recv(tensor, src_rank)

    def add_payloads(self, sends: Payloads, recvs: Payloads) -> None:
        """Queue many at once."""
        self.queue.add_payloads(sends, recvs)

    def execute(self) -> None:
        """Compare the queues of all ranks, then move everything."""
        began = time.perf_counter()
        sends, recvs = self.queue.take()
        try:
            check_match(self.context.control, sends, recvs, self.timeout_s, self.refuse(sends, recvs))
            agreed = time.perf_counter()
            with on_stream(self.context.device, self._stream):
                known = self.move(sends, recvs) or TransferStats()
        except BaseException as error:
            self._fail(error)
            raise
        ended = time.perf_counter()
        peers = sorted({*sends, *recvs})
        self._stats = replace(
            known,
            seconds=ended - began,
            bytes_sent=nbytes_of(sends),
            bytes_received=nbytes_of(recvs),
            messages=sum(map(len, (*sends.values(), *recvs.values()))),
            phases={"agree": agreed - began, **(known.phases or {"move": ended - agreed})},
            paths=known.paths or (dict.fromkeys(peers, self.path) if self.path else {}),
        )

    def close(self) -> None:
        """Refuse further use, and release everything."""
        self.queue.close("it was closed")
        if not self._released:
            self._released = True
            self.release()

    @property
    def last_stats(self) -> TransferStats | None:
        """Statistics of the last finished `execute()`."""
        return self._stats

    def _fail(self, error: BaseException) -> None:
        """Raise an exception from `execute()` as a `TransferError`, unless it is one already or ends the process."""
        failure = as_transfer_error(error)
        if failure.usable:
            return
        self.queue.close(f"an earlier transfer failed: {failure.what}")
        with contextlib.suppress(Exception):
            self.give_up(failure)
        if failure is not error and isinstance(error, Exception):
            raise failure from error


def nbytes_of(payloads: Payloads) -> int:
    """Return the bytes of all of them."""
    return sum(payload.nbytes for payload in in_order(payloads))


def in_order(payloads: Payloads) -> Iterable[Payload]:
    """Return the payloads of all peers, peer by peer."""
    return (payload for each in payloads.values() for payload in each)
