"""One link to each peer: a Unix socket for small messages, which the kernel closes when a process ends.

This is how a dead peer is noticed: its memory stays mapped, and can be read as if nothing had happened. The kernel also
reports which process has connected, by its process id.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Sequence

from eplb_core.errors import TransferTimeoutError
from eplb_core.words import ranks_text
from eplb_cuda_ipc.messages import Message, decode, encode

_READ_BYTES = 1 << 18
_CREDENTIALS = struct.Struct("iII")  # process, user, group


class Link:
    """The connection to one peer.

    Args:
        peer: its rank.
        connection: a stream; made non-blocking.

    Attributes:
        lost: why nothing can be sent or received any more, or an empty text.
    """

    def __init__(self, peer: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.peer = peer
        self.lost = ""
        self._connection = connection
        self._leaving = bytearray()
        self._arrived = bytearray()

    def fileno(self) -> int:
        """Return the socket's number, for `poll`."""
        return self._connection.fileno()

    @property
    def interest(self) -> int:
        """What to poll for; 0 for nothing."""
        if self.lost:
            return 0
        return select.POLLIN | (select.POLLOUT if self._leaving else 0)

    def send(self, message: Message) -> None:
        """Send a message, now or, if the peer is slow to read, in later calls of `flush`. Never blocks or raises."""
        self._leaving += encode(message)
        self.flush()

    def flush(self) -> None:
        """Send the remaining bytes, as far as the peer accepts them."""
        try:
            while self._leaving and not self.lost:
                del self._leaving[: self._connection.send(self._leaving)]
        except BlockingIOError:
            return
        except OSError:
            self._leaving.clear()  # it is gone; `receive` finds out, after its last messages

    def receive(self) -> list[Message]:
        """Return the messages that have arrived, including the last ones of a lost peer; `lost` then says why."""
        try:
            while not self.lost:
                received = self._connection.recv(_READ_BYTES)
                self._arrived += received
                if not received:
                    self.lost = "it has closed the connection"
        except BlockingIOError:
            pass
        except OSError as error:
            self.lost = _why(error)
        try:
            return decode(self._arrived)
        except ValueError as error:
            self.lost = self.lost or f"it sent an invalid message: {error}"
            return []

    def close(self) -> None:
        """Close the connection; may be called twice."""
        self.lost = self.lost or "it was closed"
        self._leaving.clear()
        self._connection.close()


def listen(backlog: int) -> socket.socket:
    """Return a socket that listens at an abstract name chosen by the kernel, which leaves no file behind."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind("")
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(
    rank: int, listener: socket.socket, addresses: Sequence[bytes], processes: Sequence[int], timeout_s: float
) -> dict[int, Link]:
    """Return a link to every other rank. Every rank calls it at the same time, and connects to lower ranks.

    Args:
        rank: this rank.
        listener: for connections of higher ranks.
        addresses: of every rank's listener.
        processes: the process id of every rank, all different.
        timeout_s: for all connections together, in seconds.

    Raises:
        TransferTimeoutError: a rank did not connect in time.
    """
    deadline = time.monotonic() + timeout_s
    connections: dict[int, socket.socket] = {}
    try:
        for lower in range(rank):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connections[lower] = connection
            connection.settimeout(_left(deadline))
            connection.connect(addresses[lower])
            if _process(connection) != processes[lower]:
                raise ConnectionError(f"the listener there is not rank {lower}")
        missing = {processes[higher]: higher for higher in range(rank + 1, len(addresses))}
        while missing:
            listener.settimeout(_left(deadline))
            connection = listener.accept()[0]
            found = missing.pop(_process(connection), None)
            if found is None:
                connection.close()  # a stranger
            else:
                connections[found] = connection
        return {peer: Link(peer, connection) for peer, connection in connections.items()}
    except OSError as error:
        for connection in connections.values():
            connection.close()
        absent = [peer for peer in range(len(addresses)) if peer not in connections and peer != rank]
        raise TransferTimeoutError(
            f"no connection to {ranks_text(absent or connections)} within {timeout_s:g} s",
            peers=absent or connections,
            phase="connect",
            why=_why(error),
        ) from error


def _process(connection: socket.socket) -> int:
    """Return the id of the process at the other end."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[0])


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _why(error: OSError) -> str:
    return f"{type(error).__name__}: {error}"
