"""The `shm` communicator: pack into a slot of this rank's window, notify the peer, which copies it out and confirms."""

from __future__ import annotations

import contextlib
import select
import time
from collections import deque
from collections.abc import Sequence

import torch

from eplb_core import BackendContext, TransferStats
from eplb_core.errors import PeerLostError, TransferError, TransferTimeoutError
from eplb_core.transport import Payloads, QueuedCommunicator
from eplb_core.words import ranks_text
from eplb_shm.chunks import Chunk, cut, pack, unpack
from eplb_shm.links import Kind, Link, connect
from eplb_shm.options import ShmOptions
from eplb_shm.window import Window


def create(context: BackendContext, options: ShmOptions, expert_weights: Sequence[torch.Tensor]) -> ShmCommunicator:
    """Return a connected communicator; a `BackendFactory`."""
    return ShmCommunicator(context, options)


class ShmCommunicator(QueuedCommunicator):
    """Moves tensors through shared windows.

    Args:
        context: the group.
        options: the options of the config string.

    Raises:
        BackendUnavailableError: the ranks are not on one host.
        TransferTimeoutError: a rank did not connect in time.
    """

    path = "shared memory"

    def __init__(self, context: BackendContext, options: ShmOptions) -> None:
        super().__init__(context, options)
        self._window = Window(int(options.window))
        self._links: dict[int, Link] = {}
        try:
            self._links = connect(context, self._window, self.timeout_s)
        except BaseException:
            self._window.close()
            raise

    def move(self, sends: Payloads, recvs: Payloads) -> TransferStats:
        """Pack and unpack until all chunks have been moved both ways."""
        began = time.perf_counter()
        slot_bytes = self._window.slot_bytes
        round_ = _Round(self._window, self._links, cut(sends, slot_bytes), cut(recvs, slot_bytes))
        round_.run(self.timeout_s)
        waited = time.perf_counter() - began - round_.pack_s - round_.unpack_s
        return TransferStats(phases={"pack": round_.pack_s, "wait": waited, "unpack": round_.unpack_s})

    def give_up(self, error: TransferError) -> None:
        """Inform the peers which rank is to blame: otherwise those that wait for this rank would blame it."""
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.send(Kind.FAILED, error.peers[0] if error.peers else self.context.rank, error.what)

    def release(self) -> None:
        """Close the connections and release all windows."""
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
        """False: only the receiving thread copies bytes."""
        return False

    @property
    def staging_bytes(self) -> int:
        """Bytes of this rank's window."""
        return 0 if self._window.memory is None else self._window.nbytes

    @property
    def staging_limit_bytes(self) -> int:
        """Three times the window, for the caller's staging; with the window 256 MiB by default."""
        return 3 * self._window.nbytes


class _Round:
    """One transfer in flight.

    Args:
        window: this rank's window, with all slots free.
        links: to all peers.
        outgoing: peer -> chunks for it.
        incoming: peer -> chunks from it.
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
        """Wait until every chunk is taken, on both sides.

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
        """Fill one slot for the peer whose turn it is; return False without a free slot or anything to send."""
        if not self._turns or not self._window.free:
            return False
        began = time.perf_counter()
        peer = self._turns.popleft()
        slot = self._window.free.pop()  # the last one freed is still in the cache
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
            self._poll.unregister(link.connection)  # it has finished this transfer, and may have closed since

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
            f"{ranks_text(silent)} did not send or take everything within {timeout_s:g} s",
            peers=silent,
            phase="move",
            remedy="check the log of that rank; if it was only slow, raise the timeout option",
        )
