"""The `nixl` communicator: implements the contract with one `Round` per `execute()`."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from eplb_backends.nixl import layout
from eplb_backends.nixl.agent import Agent, NixlError
from eplb_backends.nixl.engine import Engine
from eplb_backends.nixl.inbox import SCATTER_BYTES, Incoming
from eplb_backends.nixl.links import Links
from eplb_backends.nixl.memory import (
    Regions,
    SlotPool,
    allocation_of,
    expandable_segments,
    joined,
    left_for_staging,
    staging_for,
)
from eplb_backends.nixl.options import NixlOptions
from eplb_backends.nixl.outbox import Outgoing
from eplb_backends.nixl.peers import Peers
from eplb_backends.nixl.prepared import LandingPieces, block_of
from eplb_backends.nixl.round import Round, Shared
from eplb_backends.nixl.selftest import LARGEST_WORLD, PAGE_BYTES, read_from_every_peer
from eplb_core.contract.communicator import EplbCommunicator, PendingTransfer
from eplb_core.contract.context import BackendContext
from eplb_core.contract.payload import Payloads
from eplb_core.contract.stats import TransferStats
from eplb_core.control.agreement import all_say, failed_ranks
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import (
    ControlPlaneError,
    EplbError,
    IntegrityError,
    InvalidTransferError,
    TransferError,
)
from eplb_core.transport.checksums import checksums
from eplb_core.transport.coalesce import as_bytes
from eplb_core.transport.failure import as_transfer_error
from eplb_core.transport.match import check_match
from eplb_core.transport.pattern import pattern
from eplb_core.transport.queue import TransferQueue
from eplb_core.transport.streams import mark, on_stream
from eplb_core.words import ranks_text

_SETTLE_S = 0.2  # how long READs in flight may take to end after an error
_MAX_IN_FLIGHT = 8
_NOT_EXPANDABLE = "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False before the weights are allocated"

logger = logging.getLogger(__name__)


def create(context: BackendContext, options: NixlOptions, expert_weights: Sequence[torch.Tensor]) -> NixlCommunicator:
    """Return a connected communicator; a `BackendFactory`.

    Raises:
        BackendNotInstalledError: no NIXL package is installed.
        TransferError: a step ("agent", "connect", "self-test") failed on a rank; the same on every rank.
    """
    return NixlCommunicator(context, options, sum(tensor.nbytes for tensor in expert_weights))


class NixlCommunicator(EplbCommunicator):
    """Moves tensors by READs that the receiving rank drives.

    Args:
        context: the group.
        options: the options of the config string.
        layer_bytes: what this rank has of one layer, the same on every rank; None if that is not known.
    """

    def __init__(self, context: BackendContext, options: NixlOptions, layer_bytes: int | None = None) -> None:
        self._control = context.control
        self._device = context.device
        self._options = options
        window = context.staging_bytes if options.window is None else int(options.window)
        self._staging_bytes = window if layer_bytes is None else staging_for(layer_bytes, window)
        self._mode = options.mode
        self._timeout_s = float(options.timeout)
        self._queue = TransferQueue(context.rank, context.world_size, context.device)
        self._registered = Regions()
        self._landing = Regions()
        self._unpublished = False
        self._trusted = False
        self._epoch = 0
        self._stats: TransferStats | None = None
        self._agent: Agent | None = None
        self._shared: Shared | None = None
        self._engine: Engine | None = None
        self._in_flight = 0
        self._one_host = False
        self._memory = "DRAM" if context.device.type == "cpu" else "VRAM"
        self._links = Links(self._memory, options.min_gbps)
        try:
            self._connect(context.rank)
            if 1 < context.world_size <= LARGEST_WORLD:
                self._self_test(context.rank, context.world_size)
        except BaseException:
            self.close()
            raise

    # --- the contract -----------------------------------------------------------------------------------------------

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """False: it allocates only its windows, which stay within the `window` option."""
        return False

    @property
    def staging_bytes(self) -> int:
        """Bytes of the two windows and of the page that peers read first."""
        if self._shared is None:
            return 0
        return len(self._shared.send_window.buffer) + len(self._shared.receive_window.buffer) + PAGE_BYTES

    @property
    def staging_limit_bytes(self) -> int:
        """The part of the `window` option that the two windows leave to a rearrangement."""
        return left_for_staging(self._staging_bytes)

    @property
    def may_land_late(self) -> bool:
        """False between ranks of one host without a progress thread: there bytes move only while a rank polls.

        With a network adapter that writes by itself, or with NIXL's thread, an abandoned READ may still end.
        """
        return not self._one_host or self._options.progress == "on"

    @property
    def last_stats(self) -> TransferStats | None:
        """Statistics of the last finished `execute()`."""
        return self._stats

    def trust_matching(self, trusted: bool) -> None:
        """Compare pair by pair, without the rest of the group, while `trusted`."""
        self._trusted = trusted

    def register(self, tensors: Sequence[torch.Tensor], *, landing: bool = False) -> None:
        """Register the allocations behind `tensors`, each once; peers learn of them when they first need them.

        An allocation that partly overlaps an earlier one is not registered: its tensors are packed. So are tensors in
        memory of `expandable_segments`, with a warning; `mode=direct` refuses them.
        Registered memory can be read, and written, by every peer of the group.

        Raises:
            InvalidTransferError: a tensor is on another device.
            TransferError: NIXL cannot register the memory, or with `mode=direct` it is of `expandable_segments`.
        """
        self._queue.check_open()
        elsewhere = next((tensor.device for tensor in tensors if tensor.device != self._device), None)
        if elsewhere is not None:
            raise InvalidTransferError(
                f"cannot register a tensor on {elsewhere}", why=f"this communicator moves tensors on {self._device}"
            )
        ranges = self._readable([allocation_of(tensor) for tensor in tensors if tensor.nbytes])
        # NIXL does not find memory covered by two registrations, so an allocation that overlaps is skipped.
        fresh = [
            (address, nbytes) for address, nbytes in joined(ranges) if not self._registered.overlap(address, nbytes)
        ]
        if fresh and self._agent is not None:
            try:
                self._agent.register(fresh, tensors)
            except NixlError as error:
                raise TransferError(
                    "the tensors cannot be registered", phase="register", usable=True, why=str(error)
                ) from error
            for address, nbytes in fresh:
                self._registered.add(address, nbytes)
            self._unpublished = True
        for tensor in tensors:
            self._number(tensor)
        for address, nbytes in ranges if landing else ():
            if self._registered.contain(address, nbytes) and not self._landing.contain(address, nbytes):
                self._landing.add(address, nbytes)

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        """Queue a send."""
        self._queue.add_send(tensor, dst_rank)

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        """Queue a receive."""
        self._queue.add_recv(tensor, src_rank)

    def add_payloads(self, sends: Payloads, recvs: Payloads) -> None:
        """Queue many at once."""
        self._queue.add_payloads(sends, recvs)

    def execute(self) -> None:
        """Compare, announce, let the peers read, read."""
        self.start().wait()

    def start(self) -> PendingTransfer:
        """Compare and announce; reading continues in `wait()`, of this transfer or an earlier one."""
        began = time.perf_counter()
        sends, recvs = self._queue.take()
        phases: dict[str, float] = {}
        with self._breaking():
            if self._in_flight >= self.max_in_flight:
                raise TransferError(
                    f"{self._in_flight} transfers are in flight", phase="start", why="wait for one first"
                )
            with _timed(phases, "agree"):
                self._agree(sends, recvs)
            with _timed(phases, "pack"):
                shared, engine = self._connected()
                outgoing = layout.outgoing(
                    sends, self._registered, shared.peers.own_rows, self._mode, layout.FEW_SMALL[self._memory]
                )
                incoming = layout.incoming(recvs, self._landing, shared.peers.places)
                if self._options.verify != "off":
                    self._add_sums(sends, outgoing)
                if self._unpublished:
                    shared.peers.publish()
                    self._unpublished = False
                this = Round(
                    shared,
                    self._epoch,
                    outgoing,
                    incoming,
                    self._stream,
                    mark(self._device, self._stream),
                    lambda peer: layout.describe(recvs.get(peer, [])),
                )
                self._epoch += 1
            with _timed(phases, "read"):
                engine.start(this)
        self._in_flight += 1
        return _Pending(self, this, incoming, phases, began, sends, recvs)

    @property
    def max_in_flight(self) -> int:
        """Several: reading, packing and the caller's copies then overlap."""
        return _MAX_IN_FLIGHT

    def finish(self, pending: _Pending) -> TransferStats:
        """Wait for one transfer; `_Pending.wait` calls it."""
        phases = pending.phases
        self._queue.check_open()
        with self._breaking():
            _, engine = self._connected()
            with _timed(phases, "read"):
                work, pending.work = pending.work, iter(())  # it may hold a reference to the waiter
                engine.wait(pending.round, work)
            self._in_flight -= 1
            if self._options.verify != "off":
                with _timed(phases, "verify"):
                    self._compare_sums(pending.incoming)
        before, after = pending.round.descriptors
        self._stats = TransferStats(
            seconds=time.perf_counter() - pending.began,
            bytes_sent=_nbytes(pending.sends),
            bytes_received=_nbytes(pending.recvs),
            messages=sum(len(each) for side in (pending.sends, pending.recvs) for each in side.values()),
            phases=phases,
            paths={peer: self._links.describe(peer) for peer in sorted(pending.round.partners)},
            descriptors=before,
            descriptors_merged=after,
        )
        return self._stats

    def close(self) -> None:
        """Wait a moment for the peers; release READs, peers, registrations, agent and windows, in this order."""
        self._queue.close("it was closed")
        shared, self._shared, self._engine = self._shared, None, None
        try:
            if shared is not None and self._agent is not None and not self._agent.abandoned:
                shared.peers.part()
        finally:
            if self._agent is not None:
                self._agent.close()

    # --- steps of a transfer ----------------------------------------------------------------------------------------

    def _readable(self, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the ranges that peers can read reliably, those outside `expandable_segments`."""
        chunked = expandable_segments(self._device)
        refused = [each for each in ranges if chunked.overlap(*each)]
        if not refused:
            return ranges
        what = f"{len(refused)} of {len(ranges)} tensors are in memory of expandable_segments"
        if self._mode == "direct":
            raise TransferError(
                what,
                phase="register",
                usable=True,
                why="peers read such memory over tcp, or wrongly",
                remedy=f"{_NOT_EXPANDABLE}, or use mode=auto",
            )
        logger.warning("%s: they are packed instead of read in place; %s", what, _NOT_EXPANDABLE)
        return [each for each in ranges if each not in refused]

    def _number(self, tensor: torch.Tensor) -> None:
        """Number the rows of a tensor, which are read one by one; peers learn the numbers with the metadata."""
        block = block_of(tensor)
        if self._shared is None or self._mode == "packed" or block is None:
            return
        address, nbytes, distance, count = block
        alone = nbytes >= SCATTER_BYTES or self._mode == "direct" or layout.FEW_SMALL[self._memory]
        if alone and self._registered.contain(address, distance * (count - 1) + nbytes):
            self._unpublished |= self._shared.peers.own_rows.add(block)

    def _agree(self, sends: Payloads, recvs: Payloads) -> None:
        problem = layout.unregistered(sends, self._registered) if self._mode == "direct" else None
        if not self._trusted:
            check_match(self._control, sends, recvs, self._timeout_s, problem)
        elif problem is not None:
            raise problem

    def _add_sums(self, sends: Payloads, outgoing: Mapping[int, Outgoing]) -> None:
        with on_stream(self._device, self._stream):
            for peer, out in outgoing.items():
                tensors = [as_bytes(payload.tensor) for payload in sends[peer] if payload.nbytes]
                out.sums = checksums(tensors, sample=self._options.verify == "sample")

    def _compare_sums(self, incoming: Mapping[int, Incoming]) -> None:
        """Raise `IntegrityError`, naming all of them, for received tensors whose checksums differ from the source's."""
        wrong: list[tuple[int, int]] = []
        for peer, arrived in incoming.items():
            with on_stream(self._device, self._stream):
                targets = [as_bytes(message.tensor) for message in arrived.messages]
                here = checksums(targets, sample=self._options.verify == "sample")
            there = np.concatenate([*arrived.sums, np.empty(0, np.int64)])
            complete = len(there) == len(here)
            indices = np.flatnonzero(here != there).tolist() if complete else range(len(here))
            wrong += [(peer, index) for index in indices]
        if wrong:
            peers = sorted({peer for peer, _ in wrong})
            raise IntegrityError(
                f"{len(wrong)} tensors from {ranks_text(peers)} arrived with different bytes than were sent",
                peers=peers,
                phase="verify",
                where="source rank and number of the receive with bytes, from 0: "
                + ", ".join(f"{peer}: {index}" for peer, index in wrong[:8]),
                wrong=wrong,
            )

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """After an error that leaves READs or peers in an unknown state, refuse everything except `close()`."""
        try:
            yield
        except TransferError as error:
            if not error.usable:
                self._break(error.what)
            raise
        except NixlError as error:
            self._break(error.what)
            raise TransferError("NIXL failed on this rank", phase="pack", why=str(error)) from error
        except BaseException as error:
            self._break(f"{type(error).__name__}: {error}")
            if isinstance(error, Exception):
                raise as_transfer_error(error) from error
            raise

    def _break(self, why: str) -> None:
        self._queue.close(f"an earlier transfer failed: {why}")
        if self._agent is not None:
            self._agent.settle(_SETTLE_S)

    # --- connecting -------------------------------------------------------------------------------------------------

    def _connect(self, rank: int) -> None:
        error: EplbError | None = None
        name = ""
        try:
            self._agent = Agent(f"eplb-rank{rank}", self._device, progress_thread=self._options.progress == "on")
            page = pattern(PAGE_BYTES, self._device, rank)
            if self._device.type != "cpu":
                torch.cuda.current_stream(self._device).synchronize()
            self._agent.register([(page.data_ptr(), PAGE_BYTES)], [page])
            self._shared = Shared(
                Peers(self._agent, self._control, self._links, self._timeout_s, page.data_ptr()),
                SlotPool(self._agent, self._staging_bytes, self._device),
                SlotPool(self._agent, self._staging_bytes, self._device),
                self._device,
                self._links.measured,
            )
            self._engine = Engine(self._shared.peers, self._timeout_s)
            name = self._agent.name
        except EplbError as caught:
            error = caught
        told = _agree_on_step(self._control, "agent", error, f"{name} {self._links.boot}", self._timeout_s)
        names, boots = zip(*(each.split(" ", 1) for each in told), strict=True)
        self._one_host = len(set(boots)) == 1
        shared, _ = self._connected()
        shared.peers.meet(list(names))
        shared.peers.publish()

    def _self_test(self, rank: int, world_size: int) -> None:
        """Read from every peer; all ranks fail if one does."""
        error: EplbError | None = None
        shared, _ = self._connected()
        send_window, receive_window = shared.send_window, shared.receive_window
        shared.peers.proven.update(range(world_size))  # if one is not, this raises
        try:
            # This time the windows themselves are source and destination, so nothing may be packed into them.
            self._mode = "direct"
            self._registered.add(*allocation_of(send_window.buffer))
            self._landing.add(*allocation_of(receive_window.buffer))
            read_from_every_peer(self, send_window.buffer, receive_window.buffer, rank, world_size)
        except EplbError as caught:
            error = caught
        self._registered, self._landing, self._mode = Regions(), Regions(), self._options.mode
        shared.peers.places = LandingPieces()  # nothing else may land in the window
        _agree_on_step(self._control, "self-test", error, "", self._timeout_s)

    def _connected(self) -> tuple[Shared, Engine]:
        if self._shared is None or self._engine is None:
            raise EplbError("the communicator is not connected")
        return self._shared, self._engine


class _Pending(PendingTransfer):
    """A transfer in flight."""

    def __init__(
        self,
        communicator: NixlCommunicator,
        this: Round,
        incoming: Mapping[int, Incoming],
        phases: dict[str, float],
        began: float,
        sends: Payloads,
        recvs: Payloads,
    ) -> None:
        self._communicator = communicator
        self.round = this
        self.incoming = incoming
        self.phases = phases
        self.began = began
        self.sends = sends
        self.recvs = recvs
        self.work: Iterator[object] = iter(())

    def use_idle_time(self, work: Iterator[object]) -> None:
        """Let `wait()` advance `work` while READs are in flight and no notification arrives."""
        self.work = work

    def wait(self) -> TransferStats:
        """Wait until everything is read on both sides."""
        return self._communicator.finish(self)


def _nbytes(payloads: Payloads) -> int:
    return sum(payload.nbytes for each in payloads.values() for payload in each)


def _agree_on_step(
    control: ControlPlane, step: str, problem: EplbError | None, value: str, timeout_s: float
) -> list[str]:
    """Return every rank's `value`. If `problem` is set on any rank, raise on all; there, the problem itself."""
    try:
        answers = all_say(control, f"the step '{step}'", timeout_s, value=value.encode(), problem=problem)
    except ControlPlaneError as error:
        raise (problem or as_transfer_error(error, step)) from error
    if problem is not None:
        raise problem
    failed = failed_ranks(answers)
    if failed:
        raise TransferError(
            f"the step '{step}' failed on rank {failed[0]}", peers=failed, phase=step, why=answers[failed[0]].problem
        )
    return [answer.value.decode() for answer in answers]


@contextlib.contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    """Add the duration of the block to a phase, which is also a range for profilers."""
    began = time.perf_counter()
    try:
        with torch.profiler.record_function(f"eplb::{name}"):
            yield
    finally:
        phases[name] = phases.get(name, 0.0) + time.perf_counter() - began
