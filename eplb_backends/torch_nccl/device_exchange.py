"""Moves messages over an NCCL process group, with a deadline that also applies to the host.

`Work.wait(timeout)` has a deadline too, but polls only every millisecond, and on expiry marks the work as failed: in
its default setting (`TORCH_NCCL_ASYNC_ERROR_HANDLING=3`) torch's watchdog thread then terminates the whole process a
minute later. So this module polls `Work.is_completed()` itself, and aborts the group as its owner would, which stops
the watchdog first.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from eplb_core.errors import PeerLostError, TransferError, TransferTimeoutError
from eplb_core.transport.coalesce import Message
from eplb_core.transport.deadline import call_within, wait_until
from eplb_core.transport.streams import on_stream
from eplb_core.words import ranks_text

_ABORT_S = 1.0  # ncclCommAbort itself can hang; it is then abandoned in a thread

logger = logging.getLogger(__name__)


class DeviceExchange:
    """Runs batches of sends and receives on one process group.

    Args:
        group: a process group with an NCCL backend.
        device: the device of all messages.
        timeout_s: for each batch, in seconds, including earlier work on the stream.
        abort: whether a batch that does not end aborts the group.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout_s: float, *, abort: bool) -> None:
        self._group = group
        self._device = device
        self._timeout_s = timeout_s
        self._abort = abort

    def warm_up(self, *, peers: bool) -> None:
        """Connect the group, and with `peers` also every pair of its ranks. Every rank must call it.

        Raises:
            TransferTimeoutError: a rank did not take part in time.
            PeerLostError: NCCL cannot connect the ranks.
        """
        deadline = time.monotonic() + self._timeout_s
        others = [rank for rank in range(self._group.size()) if rank != self._group.rank()]

        def launch() -> list[dist.Work]:
            with on_stream(self._device, None):
                one = torch.ones(1, dtype=torch.int32, device=self._device)
                landing = torch.empty(len(others), dtype=torch.int32, device=self._device)
                works = [dist.all_reduce(one.clone(), group=self._group, async_op=True)]
                if peers and others:
                    sends = [Message(one, rank) for rank in others]
                    recvs = [Message(landing[at : at + 1], rank) for at, rank in enumerate(others)]
                    works += self._post(sends, recvs)
                return [work for work in works if work is not None]

        try:
            works = call_within(self._timeout_s, launch)
        except TimeoutError as error:
            raise self._timed_out(others) from error
        except RuntimeError as error:
            raise self._broken(others, error) from error
        self._finish(works, others, deadline)

    def run(self, sends: Sequence[Message], recvs: Sequence[Message]) -> None:
        """Pack, post all in one batch on the current stream, wait for it on the host, unpack.

        Raises:
            TransferTimeoutError: it did not end in time.
            PeerLostError: NCCL reports an error.
        """
        if not sends and not recvs:
            return
        deadline = time.monotonic() + self._timeout_s
        peers = sorted({message.peer for message in (*sends, *recvs)})
        for message in sends:
            message.pack()
        try:
            works = self._post(sends, recvs)
        except RuntimeError as error:
            raise self._broken(peers, error) from error
        self._finish(works, peers, deadline)
        for message in recvs:
            message.unpack()

    def _post(self, sends: Sequence[Message], recvs: Sequence[Message]) -> list[dist.Work]:
        operations = [dist.P2POp(dist.irecv, each.payload, group=self._group, group_peer=each.peer) for each in recvs]
        operations += [dist.P2POp(dist.isend, each.payload, group=self._group, group_peer=each.peer) for each in sends]
        return [work for work in dist.batch_isend_irecv(operations) if work is not None]

    def _finish(self, works: Sequence[dist.Work], peers: Sequence[int], deadline: float) -> None:
        """Wait on the host, then make the current stream wait, so that a stuck transfer does not block it."""
        if not wait_until(lambda: all(work.is_completed() for work in works), deadline - time.monotonic()):
            raise self._timed_out(peers)
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise self._broken(peers, error) from error

    def _timed_out(self, peers: Sequence[int]) -> TransferError:
        aborted = self._abort_group()
        return TransferTimeoutError(
            f"the NCCL transfer with {ranks_text(peers)} did not end within {self._timeout_s:g} s",
            peers=peers,
            phase="transfer",
            why="a rank is dead, stopped or did not launch its part, or earlier work on the stream does not end",
            remedy="make a new device process group, then a new communicator"
            if aborted
            else "abort the device process group: the transfer is still on the GPU; then make new ones",
        )

    def _broken(self, peers: Sequence[int], error: RuntimeError) -> TransferError:
        self._abort_group()
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return PeerLostError(
            f"NCCL failed to transfer with {ranks_text(peers)}",
            peers=peers,
            phase="transfer",
            why=reason,
            remedy="set NCCL_DEBUG=WARN for details; make a new device process group, then a new communicator",
        )

    def _abort_group(self) -> bool:
        if not self._abort:
            return False
        abort = getattr(self._group, "abort", None)
        if abort is None:
            logger.warning("this torch cannot abort a process group; the transfer stays on the GPU")
            return False
        with contextlib.suppress(TimeoutError, RuntimeError):
            call_within(_ABORT_S, abort)
            return True
        logger.warning("aborting the NCCL process group did not end within %g s", _ABORT_S)
        return False
