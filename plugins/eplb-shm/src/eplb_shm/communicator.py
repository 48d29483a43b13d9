"""The `shm` communicator: pack into a slot of one's own window, tell the peer, who copies it out and says so."""

from __future__ import annotations

import contextlib
import select
import time
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from eplb_core import BackendContext, EplbCommunicator, TransferQueue, TransferStats, check_match
from eplb_core.errors import PeerLostError, TransferError, TransferTimeoutError
from eplb_shm.chunks import Chunk, cut, pack, unpack
from eplb_shm.links import Kind, Link, connect
from eplb_shm.options import ShmOptions
from eplb_shm.window import Window


def create(context: BackendContext, options: ShmOptions, expert_weights: Sequence[torch.Tensor]) -> ShmCommunicator:
    """Return a connected communicator; a `BackendFactory`."""
    return ShmCommunicator(context, options)


class ShmCommunicator(EplbCommunicator):
    """Moves tensors through shared windows.

    Args:
        context: the group.
        options: the options of the config string.

    Raises:
        BackendUnavailableError: the ranks are not on one host.
        TransferTimeoutError: a rank did not connect in time.
    """

    def __init__(self, context: BackendContext, options: ShmOptions) -> None:
        self._control = context.control
        self._timeout_s = float(options.timeout)
        self._queue = TransferQueue(context.rank, context.world_size, context.device)
        self._window = Window(int(options.window))
        self._links: dict[int, Link] = {}
        self._stats: TransferStats | None = None
        try:
            self._links = connect(context, self._window, self._timeout_s)
        except BaseException:
            self._window.close()
            raise

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        """Queue a send."""
        self._queue.add_send(tensor, dst_rank)

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        """Queue a receive."""
        self._queue.add_recv(tensor, src_rank)

    def execute(self) -> None:
        """Compare, then pack and unpack until all chunks have gone both ways."""
        began = time.perf_counter()
        sends, recvs = self._queue.take()
        with self._breaking():
            check_match(self._control, sends, recvs, self._timeout_s)
            agreed = time.perf_counter()
            slot_bytes = self._window.slot_bytes
            round_ = _Round(self._window, self._links, cut(sends, slot_bytes), cut(recvs, slot_bytes))
            round_.run(self._timeout_s)
        ended = time.perf_counter()
        copying = round_.pack_s + round_.unpack_s
        self._stats = TransferStats(
            seconds=ended - began,
            bytes_sent=sum(send.nbytes for send in sends),
            bytes_received=sum(recv.nbytes for recv in recvs),
            messages=len(sends) + len(recvs),
            phases={
                "agree": agreed - began,
                "pack": round_.pack_s,
                "wait": ended - agreed - copying,
                "unpack": round_.unpack_s,
            },
            paths={transfer.peer: "shared memory" for transfer in (*sends, *recvs)},
        )

    def close(self) -> None:
        """Close the connections and let go of all windows."""
        self._queue.close("it was closed")
        for link in self._links.values():
            link.connection.close()
        self._links = {}
        self._window.close()

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """False: its window is host memory."""
        return False

    @property
    def may_land_late(self) -> bool:
        """False: bytes are copied by the thread that receives them, and by nobody else."""
        return False

    @property
    def staging_bytes(self) -> int:
        """Bytes of this rank's window."""
        return 0 if self._window.memory is None else self._window.nbytes

    @property
    def staging_limit_bytes(self) -> int:
        """Three times the window for what the caller stages in, 256 MiB with the window by default."""
        return 3 * self._window.nbytes

    @property
    def last_stats(self) -> TransferStats | None:
        """What the last finished `execute()` did."""
        return self._stats

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
                        link.send(Kind.FAILED, error.peers[0] if error.peers else self._queue.rank, error.what)
            raise


class _Round:
    """One transfer under way.

    Args:
        window: this rank's window; all slots are free.
        links: those to all peers.
        outgoing: peer -> chunks that it gets.
        incoming: peer -> chunks that come from it.
    """

    def __init__(
        self,
        window: Window,
        links: dict[int, Link],
        outgoing: dict[int, deque[Chunk]],
        incoming: dict[int, deque[Chunk]],
    ) -> None:
        self._window = window
        self._links = links
        self._outgoing = outgoing
        self._incoming = incoming
        self._untaken = {peer: len(chunks) for peer, chunks in outgoing.items()}
        self._turns = deque(outgoing)
        self._poll = select.poll()
        self._by_handle = {links[peer].connection.fileno(): links[peer] for peer in {*outgoing, *incoming}}
        for handle in self._by_handle:
            self._poll.register(handle, select.POLLIN)
        self.pack_s = 0.0
        self.unpack_s = 0.0

    def run(self, timeout_s: float) -> None:
        """Return when every chunk was taken, on both sides.

        Raises:
            TransferTimeoutError: a peer did not do its part within `timeout_s` seconds.
            PeerLostError: a peer is gone, or gave up because of another one.
        """
        deadline = time.monotonic() + timeout_s
        while self._untaken or self._incoming:
            packed = self._pack_next()
            patience_s = 0.0 if packed else deadline - time.monotonic()
            ready = self._poll.poll(max(patience_s, 0.0) * 1000)
            if not ready and not packed:
                raise self._timeout(timeout_s)
            for handle, _ in ready:
                self._hear(self._by_handle[handle])

    def _pack_next(self) -> bool:
        """Fill one slot for the peer whose turn it is; return whether there was one free, and something to send."""
        if not self._turns or not self._window.free:
            return False
        began = time.perf_counter()
        peer = self._turns.popleft()
        slot = self._window.free.pop()  # the one freed last is still in the cache
        pack(self._outgoing[peer].popleft(), self._window.slot(slot))
        if self._outgoing[peer]:
            self._turns.append(peer)
        self._send(self._links[peer], Kind.FULL, slot)
        self.pack_s += time.perf_counter() - began
        return True

    def _hear(self, link: Link) -> None:
        try:
            for kind, number, text in link.messages():
                if kind is Kind.FULL:
                    self._unpack_next(link, number)
                elif kind is Kind.TAKEN:
                    self._window.free.append(number)
                    self._untaken[link.peer] -= 1
                    if not self._untaken[link.peer]:
                        del self._untaken[link.peer]
                else:
                    raise PeerLostError(f"rank {link.peer} gave up", peers={number, link.peer}, phase="move", why=text)
        except PeerLostError:
            raise
        except OSError as error:
            if link.peer in self._untaken or link.peer in self._incoming:
                raise self._lost(link, error) from error
            self._poll.unregister(link.connection)  # it is through with this transfer, and may have closed since

    def _unpack_next(self, link: Link, slot: int) -> None:
        began = time.perf_counter()
        chunks = self._incoming[link.peer]
        unpack(link.window[slot * self._window.slot_bytes :], chunks.popleft())
        if not chunks:
            del self._incoming[link.peer]
        self._send(link, Kind.TAKEN, slot)
        self.unpack_s += time.perf_counter() - began

    def _send(self, link: Link, kind: Kind, slot: int) -> None:
        try:
            link.send(kind, slot)
        except OSError as error:
            raise self._lost(link, error) from error

    def _lost(self, link: Link, error: OSError) -> PeerLostError:
        return PeerLostError(f"rank {link.peer} is gone", peers=[link.peer], phase="move", why=str(error))

    def _timeout(self, timeout_s: float) -> TransferTimeoutError:
        silent = sorted({*self._untaken, *self._incoming})
        return TransferTimeoutError(
            f"ranks {', '.join(map(str, silent))} did not send or take everything within {timeout_s:g} s",
            peers=silent,
            phase="move",
            remedy="look at the log of that rank; if it was only slow, raise the timeout option",
        )
