"""The `mooncake` communicator: peers READ what a rank offers, through bounded windows or in place."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch

from eplb_core import BackendContext, EplbCommunicator, TransferQueue, TransferStats, check_match
from eplb_core.errors import BackendUnavailableError, TransferError
from eplb_mooncake.chunks import cut
from eplb_mooncake.engine import SAMPLE_BYTES, Engine
from eplb_mooncake.links import Card, Kind, Link, connect, exchange_cards, find_host, listen, new_token
from eplb_mooncake.options import MooncakeOptions
from eplb_mooncake.regions import Regions
from eplb_mooncake.round import Round
from eplb_mooncake.window import Window


def create(
    context: BackendContext, options: MooncakeOptions, expert_weights: Sequence[torch.Tensor]
) -> MooncakeCommunicator:
    """Return a connected communicator; a `BackendFactory`."""
    return MooncakeCommunicator(context, options)


class MooncakeCommunicator(EplbCommunicator):
    """Moves tensors by READs of Mooncake's Transfer Engine.

    Args:
        context: the group.
        options: the options of the config string.

    Raises:
        BackendUnavailableError: Mooncake cannot be loaded or started, or does not reach a peer.
        TransferTimeoutError: a rank did not connect in time.
    """

    def __init__(self, context: BackendContext, options: MooncakeOptions) -> None:
        self._control = context.control
        self._options = options
        self._timeout_s = float(options.timeout)
        self._queue = TransferQueue(context.rank, context.world_size, context.device)
        self._readable = Regions()
        self._landing = Regions()
        self._links: dict[int, Link] = {}
        self._window: Window | None = None
        self._engine: Engine | None = None
        self._stats: TransferStats | None = None
        try:
            self._connect(context)
        except BaseException:
            self.close()
            raise

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        """Queue a send."""
        self._queue.add_send(tensor, dst_rank)

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        """Queue a receive."""
        self._queue.add_recv(tensor, src_rank)

    def register(self, tensors: Sequence[torch.Tensor], *, landing: bool = False) -> None:
        """Let peers read these tensors in place, and read into them in place if they are `landing`.

        Memory that Mooncake refuses, such as a part of what is registered already, goes through the windows.
        """
        self._queue.check_open()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            start, nbytes = storage.data_ptr(), storage.nbytes()
            if self._engine is None or tensor.device.type != "cpu" or nbytes == 0:
                continue
            if not self._readable.cover(start, nbytes):
                if self._readable.touch(start, nbytes) or not self._engine.register(start, nbytes, tensor):
                    continue
                self._readable.add(start, nbytes)
            if landing and tensor.is_contiguous() and not self._landing.touch(tensor.data_ptr(), tensor.nbytes):
                self._landing.add(tensor.data_ptr(), tensor.nbytes)

    def execute(self) -> None:
        """Compare, then offer and read until all chunks have gone both ways."""
        began = time.perf_counter()
        sends, recvs = self._queue.take()
        if self._window is None or self._engine is None:  # it cannot be: the queue would be closed
            return
        with self._breaking():
            check_match(self._control, sends, recvs, self._timeout_s)
            agreed = time.perf_counter()
            slot_bytes = self._window.slot_bytes
            round_ = Round(
                self._engine,
                self._window,
                self._links,
                self._readable,
                self._landing,
                cut(sends, slot_bytes),
                cut(recvs, slot_bytes),
                self._timeout_s,
            )
            round_.run()
        ended = time.perf_counter()
        self._stats = TransferStats(
            seconds=ended - began,
            bytes_sent=sum(send.nbytes for send in sends),
            bytes_received=sum(recv.nbytes for recv in recvs),
            messages=len(sends) + len(recvs),
            phases={
                "agree": agreed - began,
                "pack": round_.pack_s,
                "read": ended - agreed - round_.pack_s - round_.unpack_s,
                "unpack": round_.unpack_s,
            },
            paths={transfer.peer: f"mooncake {self._options.protocol}" for transfer in (*sends, *recvs)},
            descriptors=round_.reads,
            descriptors_merged=round_.reads,
        )

    def close(self) -> None:
        """Close the connections, end the engine, and let go of the window.

        READs that are still in flight, after an error, end with the engine.
        """
        self._queue.close("it was closed")
        for link in self._links.values():
            link.connection.close()  # before the engine: the peers of a rank that gave up should know at once
        self._links = {}
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._window = None

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """False: its window is host memory."""
        return False

    @property
    def staging_bytes(self) -> int:
        """Bytes of this rank's window."""
        return 0 if self._window is None else self._window.nbytes

    @property
    def staging_limit_bytes(self) -> int:
        """Four times the window, for the window and what the caller stages in: 256 MiB by default."""
        return 4 * int(self._options.window)

    @property
    def last_stats(self) -> TransferStats | None:
        """What the last finished `execute()` did."""
        return self._stats

    def _connect(self, context: BackendContext) -> None:
        host = find_host(context, self._options.interface, self._timeout_s)
        engine = self._engine = Engine(host, self._options)
        window = self._window = Window(int(self._options.window))
        if not engine.register(window.address(0), window.nbytes, window):
            raise BackendUnavailableError(
                f"Mooncake does not register a window of {window.nbytes} bytes",
                name="mooncake",
                why="its reason is on stderr",
                remedy="where it says that memory cannot be locked, raise `ulimit -l`",
            )
        token = new_token()
        # The first slot shows the token until the first `execute()`, before which every rank has read it.
        window.memory[: len(token)] = list(token)
        with listen(host, context.world_size) as listener:
            mine = Card(host, listener.getsockname()[1], engine.name, window.address(0), token.hex())
            cards = exchange_cards(context, mine, self._timeout_s)
            self._links = connect(context.rank, listener, cards, self._timeout_s)
        samples = {
            peer: (cards[peer].engine, cards[peer].sample, bytes.fromhex(cards[peer].token)) for peer in self._links
        }
        slot = window.to_receive[0]
        engine.open(samples, window.slot(slot)[:SAMPLE_BYTES], self._timeout_s)

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """After a failure amid a transfer, tell the peers who is to blame and refuse everything but `close()`."""
        try:
            yield
        except TransferError as error:
            if not error.usable:
                self._queue.close(f"an earlier transfer failed: {error.what}")
                for link in self._links.values():
                    with contextlib.suppress(OSError):
                        link.send(Kind.FAILED, error.peers[0] if error.peers else self._queue.rank, text=error.what)
            raise
