"""The `cuda_ipc` communicator: the receiver maps the sender's memory and copies out of it."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from eplb_core import BackendContext, EplbCommunicator, PendingTransfer, TransferStats
from eplb_core.errors import CommunicatorClosedError, InvalidTransferError, TransferError
from eplb_core.transport import Payloads, TransferQueue, check_match
from eplb_cuda_ipc.driver import CudaMemory
from eplb_cuda_ipc.exchange import Exchange
from eplb_cuda_ipc.layout import pieces_of
from eplb_cuda_ipc.links import Link, connect, listen
from eplb_cuda_ipc.mapped import Mapped
from eplb_cuda_ipc.memory import Memory, MemoryMapError
from eplb_cuda_ipc.messages import Show
from eplb_cuda_ipc.options import CudaIpcOptions
from eplb_cuda_ipc.place import Card, card_of_this_process, exchange, tell_problem
from eplb_cuda_ipc.rescue import Rescue
from eplb_cuda_ipc.round import Round, Shared
from eplb_cuda_ipc.shown import Shown
from eplb_cuda_ipc.window import REGION, Window

_MAX_IN_FLIGHT = 4
_PART_S = 1.0  # how long closing waits for the peers, so that none still maps freed memory
_DEVICE_S = 30.0  # copies wait for nothing, so a device that needs longer than this hangs
_NEWS_S = 0.5  # another rank may have noticed a lost rank earlier
_SAMPLE_BYTES = 64


def create(
    context: BackendContext, options: CudaIpcOptions, expert_weights: Sequence[torch.Tensor]
) -> CudaIpcCommunicator:
    """Return a connected communicator; a `BackendFactory`."""
    return CudaIpcCommunicator(context, options, CudaMemory(context.device))


class CudaIpcCommunicator(EplbCommunicator):
    """Moves tensors between GPUs of one host by copies out of mapped memory.

    Args:
        context: the group.
        options: the options of the config string.
        memory: this rank's memory; the communicator closes it.

    Raises:
        BackendUnavailableError: the ranks cannot map each other's memory.
        TransferTimeoutError: a rank did not connect in time.
    """

    def __init__(self, context: BackendContext, options: CudaIpcOptions, memory: Memory) -> None:
        self._control = context.control
        self._device = context.device
        self._options = options
        self._timeout_s = float(options.timeout)
        self._staging_bytes = context.staging_bytes if options.window is None else int(options.window)
        self._queue = TransferQueue(context.rank, context.world_size, context.device)
        self._memory = memory
        self._shown = Shown(memory)
        self._links: dict[int, Link] = {}
        self._mapped: dict[int, Mapped] = {}
        self._paths: dict[int, str] = {}
        self._window: Window | None = None
        self._connected: tuple[Shared, Exchange] | None = None
        self._trusted = False
        self._closed = False
        self._epoch = 0
        self._in_flight = 0
        self._stats: TransferStats | None = None
        try:
            self._connect(context)
        except BaseException:
            self.close()
            raise

    # --- the contract -----------------------------------------------------------------------------------------------

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        """Queue a send."""
        self._queue.add_send(tensor, dst_rank)

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        """Queue a receive."""
        self._queue.add_recv(tensor, src_rank)

    def register(self, tensors: Sequence[torch.Tensor], *, landing: bool = False) -> None:
        """Let peers map the allocations behind these tensors, once; tensors in them are then sent without packing.

        Peers can read and write the whole allocation, including other tensors in it. `landing` makes no difference:
        receiving needs no registration, and weights that are received into are also sent.

        Raises:
            InvalidTransferError: a tensor is on another device.
        """
        self._queue.check_open()
        elsewhere = next((tensor.device for tensor in tensors if tensor.device != self._device), None)
        if elsewhere is not None:
            raise InvalidTransferError(
                f"cannot register a tensor on {elsewhere}", why=f"this communicator moves tensors on {self._device}"
            )
        if not tensors:
            return
        show = self._shown.add(tensors)
        for link in self._links.values():
            link.send(show)

    def add_payloads(self, sends: Payloads, recvs: Payloads) -> None:
        """Queue many at once."""
        self._queue.add_payloads(sends, recvs)

    def execute(self) -> None:
        """Compare, announce all addresses, copy what the peers announce, and wait until they have copied too."""
        self.start().wait()

    def start(self) -> PendingTransfer:
        """Compare and announce all addresses; copies continue in `wait()`, of this transfer or an earlier one."""
        began = time.perf_counter()
        sends, recvs = self._queue.take()
        with self._breaking():
            shared, exchange = self._parts()
            if self._in_flight >= _MAX_IN_FLIGHT:
                raise TransferError(
                    f"{self._in_flight} transfers are in flight", phase="start", why="wait for one first"
                )
            exchange.check()
            if not self._trusted:
                check_match(self._control, sends, recvs, self._timeout_s)
            agreed = time.perf_counter()
            outgoing = {peer: pieces_of(payloads) for peer, payloads in sends.items()}
            incoming = {peer: pieces_of(payloads) for peer, payloads in recvs.items()}
            this = Round(shared, self._epoch, outgoing, incoming, self._memory.end_of(self._stream))
            self._epoch += 1
            exchange.begin(this)
        self._in_flight += 1
        stats = TransferStats(
            bytes_sent=sum(int(pieces.nbytes.sum()) for pieces in outgoing.values()),
            bytes_received=sum(int(pieces.nbytes.sum()) for pieces in incoming.values()),
            messages=sum(len(pieces.nbytes) for side in (outgoing, incoming) for pieces in side.values()),
            phases={"agree": agreed - began, "offer": time.perf_counter() - agreed},
            paths={peer: self._paths[peer] for peer in sorted(this.heard)},
        )
        return _Pending(self, this, began, stats, [sends, recvs])

    @property
    def max_in_flight(self) -> int:
        """Several: one can be received while another is committed."""
        return _MAX_IN_FLIGHT

    def trust_matching(self, trusted: bool) -> None:
        """Compare pair by pair, without the rest of the group, while `trusted`."""
        self._trusted = trusted

    def finish(self, round_: Round, began: float, stats: TransferStats, work: Iterator[object]) -> TransferStats:
        """Wait for a round that began at `began`, and advance `work` meanwhile; called by the pending transfer."""
        self._queue.check_open()
        called = time.perf_counter()
        with self._breaking():
            self._parts()[1].wait(round_, work)
        self._in_flight -= 1
        ended = time.perf_counter()
        before, after = round_.direct_copies
        self._stats = replace(
            stats,
            seconds=ended - began,
            phases={**stats.phases, "copy": ended - called},
            descriptors=before,
            descriptors_merged=after,
        )
        return self._stats

    def rescue(self, rank: int) -> Rescue:
        """Return the registered tensors of a lost rank.

        Contains everything the lost rank had registered before its last `execute()`, if this rank had mapped it. Slots
        that a rearrangement was writing when the rank died hold a mixture. This communicator moves nothing any more.
        Leave the block when everything is rescued, and before `close()`:

            with communicator.rescue(3) as left:
                expert = left.tensor(index, slot)

        Raises:
            InvalidTransferError: it is not a peer, its process still runs, or it had closed its communicator.
            CommunicatorClosedError: after `close()`.
        """
        if self._closed or self._connected is None:
            raise CommunicatorClosedError("nothing is mapped any more", why="this communicator was closed")
        if rank not in self._links:
            raise InvalidTransferError(
                f"cannot rescue the tensors of rank {rank!r}", why="it is not a peer of this rank"
            )
        if not self._connected[1].died(rank, _NEWS_S):
            raise InvalidTransferError(
                f"cannot rescue the tensors of rank {rank}",
                why="its process still runs, or it has closed its communicator and may have freed its memory",
            )
        self._queue.close(f"the tensors of rank {rank} were rescued")
        return Rescue(self._memory, self._device, rank, self._mapped[rank])

    def close(self) -> None:
        """Wait for copies in flight; unmap, inform the peers, wait a moment for them, and free the window.

        In this order, so that no rank frees memory that another one has mapped, provided that every rank closes.
        """
        self._queue.close("it was closed")
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as in_turn:  # the last one first, and each even if another one fails
            in_turn.callback(self._memory.close)
            in_turn.callback(self._shown.clear)
            for link in self._links.values():
                in_turn.callback(link.close)
            if self._window is not None:
                in_turn.callback(self._window.close)
            if self._connected is not None:
                in_turn.callback(self._connected[1].part, _PART_S)
            in_turn.callback(self._unmap)

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """False: it allocates only its window."""
        return False

    @property
    def may_land_late(self) -> bool:
        """False: only this rank's device writes, and an error is raised only when its copies are done."""
        return False

    @property
    def staging_bytes(self) -> int:
        """Bytes of the window for packing."""
        return 0 if self._window is None else self._window.nbytes

    @property
    def staging_limit_bytes(self) -> int:
        """The part of the `window` option that the packing window leaves to a rearrangement."""
        return self._staging_bytes - int(self._options.packed)

    @property
    def last_stats(self) -> TransferStats | None:
        """Statistics of the last finished `execute()`."""
        return self._stats

    # --- connecting and failing -------------------------------------------------------------------------------------

    def _connect(self, context: BackendContext) -> None:
        with listen(context.world_size) as listener:
            mine = card_of_this_process(self._memory.gpu, listener.getsockname(), secrets.token_bytes(_SAMPLE_BYTES))
            cards = exchange(context, mine, self._memory, self._timeout_s)
            addresses, processes = [card.address for card in cards], [card.process for card in cards]
            self._links = connect(context.rank, listener, addresses, processes, self._timeout_s)
        self._paths = {
            peer: f"cuda ipc, {'same' if cards[peer].gpu == self._memory.gpu else 'peer'} GPU" for peer in self._links
        }
        self._memory.meet([cards[peer].gpu for peer in self._links])
        self._mapped = {peer: Mapped(self._memory) for peer in self._links}
        # Every rank sends before it answers here, so all windows can be mapped once all have answered.
        problem = self._show_window(mine.sample)
        tell_problem(context, "that every rank has shown its window", problem, self._timeout_s)
        self._parts()[1].listen()
        tell_problem(context, "whether all ranks can read all windows", self._untrue(cards), self._timeout_s)

    def _show_window(self, sample: bytes) -> str:
        """Make this rank's window and show it to the others; return the problem, or an empty text."""
        try:
            self._window = window = Window(self._memory, int(self._options.packed))
            self._memory.write(window.address, sample)
            regions = self._shown.add_allocation(window.address)
        except RuntimeError as error:  # raised by the driver
            return f"rank {self._queue.rank} has no memory to share: {error}"
        for link in self._links.values():
            link.send(Show(regions, []))
        shared = Shared(self._memory, self._links, self._mapped, self._shown, window)
        self._connected = shared, Exchange(shared, self._queue.rank, self._timeout_s)
        return "" if regions else f"the memory of rank {self._queue.rank} cannot be mapped by others"

    def _untrue(self, cards: list[Card]) -> str:
        """Read from the window of every peer; return the problem, or an empty text."""
        for peer, mapped in self._mapped.items():
            try:
                first = mapped.addresses(np.array([REGION]), np.zeros(1, np.int64), np.array([_SAMPLE_BYTES]))
                seen = self._memory.read(int(first[0]), _SAMPLE_BYTES)
            except (MemoryMapError, ValueError) as error:
                return f"rank {self._queue.rank} cannot read the memory of rank {peer}: {error}"
            if seen != cards[peer].sample:
                return f"rank {self._queue.rank} reads different bytes than rank {peer} has written"
        return ""

    def _parts(self) -> tuple[Shared, Exchange]:
        if self._connected is None:
            raise TransferError("this communicator is not connected", phase="start")
        return self._connected

    def _unmap(self) -> None:
        # Unmapping memory that a copy still reads would be worse than leaving it mapped until this process ends.
        if self._connected is None or self._connected[1].quiesce(_DEVICE_S):
            for mapped in self._mapped.values():
                mapped.let_go()

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """After a failure amid a transfer, inform the peers who is to blame and refuse everything except `close()`."""
        try:
            yield
        except TransferError as error:
            if not error.usable:
                self._break(error)
            raise
        except BaseException as error:
            failure = TransferError(
                "the device failed on this rank", phase="copy", why=f"{type(error).__name__}: {error}"
            )
            self._break(failure)
            if isinstance(error, RuntimeError):  # raised by torch or the driver
                raise failure from error
            raise

    def _break(self, error: TransferError) -> None:
        """Wait until nothing lands in the tensors of this rank any more."""
        self._queue.close(f"an earlier transfer failed: {error.what}")
        if self._connected is not None:
            self._connected[1].give_up(error)
            self._connected[1].quiesce(_DEVICE_S)


class _Pending(PendingTransfer):
    """A transfer in flight. Keeps its tensors alive until it has ended, and no longer.

    Args:
        communicator: its communicator.
        round_: its state.
        began: when it was started.
        stats: its statistics so far.
        transfers: its tensors.
    """

    def __init__(
        self,
        communicator: CudaIpcCommunicator,
        round_: Round,
        began: float,
        stats: TransferStats,
        kept: list[Payloads],
    ) -> None:
        super().__init__(None)
        self._communicator = communicator
        self._round: Round | None = round_
        self._began = began
        self._known = stats
        self._kept = kept  # the tensors, until they have been copied
        self._work: Iterator[object] = iter(())

    def use_idle_time(self, work: Iterator[object]) -> None:
        """Let `wait()` advance `work` while copies are in flight."""
        self._work = work

    def wait(self) -> TransferStats | None:
        """Wait until everything is copied, on both sides."""
        if self._round is not None:
            try:
                work, self._work = self._work, iter(())  # it may hold a reference to the waiter
                self._stats = self._communicator.finish(self._round, self._began, self._known, work)
            finally:
                self._kept, self._round = [], None
        return self._stats
