"""One link to each peer: a socket for small messages, and the peer's window, received through that socket.

The sockets have abstract names, which leave no file behind, and the kernel closes them when a process ends, so that the
peers of a dead rank know at once. They also order memory: bytes written before a message is sent are visible when it
arrives.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from eplb_core import BackendContext
from eplb_core.errors import BackendUnavailableError, ControlPlaneError, TransferTimeoutError
from eplb_core.transport import HostIdentity
from eplb_core.words import ranks_text
from eplb_shm.window import Bytes, Window, map_window

_TOKEN_BYTES = 16
_HELLO = struct.Struct(f"<{_TOKEN_BYTES}sI")  # the listener's token, the rank that connects
_MESSAGE = struct.Struct("<BI")  # kind, slot
_LONGEST = 4096


class Kind(IntEnum):
    """The kind of a message."""

    FULL = 1
    """A slot of the sender's window holds the next chunk."""
    TAKEN = 2
    """A slot of the receiver's window was copied out and is free again."""
    FAILED = 3
    """The sender gives up; the number is the rank to blame, the text is the reason."""


@dataclass(slots=True)
class Link:
    """The connection to one peer.

    Attributes:
        peer: its rank.
        connection: connected, keeps message boundaries, non-blocking.
        window: the peer's window, uint8 `[bytes]`; read-only.
    """

    peer: int
    connection: socket.socket
    window: Bytes

    def send(self, kind: Kind, number: int, text: str = "") -> None:
        """Send one message. Raises `OSError` if the peer is gone."""
        self.connection.send(_MESSAGE.pack(kind, number) + text.encode()[: _LONGEST - _MESSAGE.size])

    def messages(self) -> Iterator[tuple[Kind, int, str]]:
        """Yield received messages. Raises `OSError` if the peer is gone."""
        while True:
            try:
                raw = self.connection.recv(_LONGEST)
            except BlockingIOError:
                return
            if len(raw) < _MESSAGE.size:
                raise ConnectionResetError("it has closed the connection")
            kind, number = _MESSAGE.unpack_from(raw)
            yield Kind(kind), number, raw[_MESSAGE.size :].decode(errors="replace")


def connect(context: BackendContext, window: Window, timeout_s: float) -> dict[int, Link]:
    """Return a link to every other rank. Every rank calls it at the same time.

    Raises:
        BackendUnavailableError: the ranks are not all on one host and in one network namespace.
        TransferTimeoutError: a rank did not connect in time.
    """
    deadline = time.monotonic() + timeout_s
    token = secrets.token_bytes(_TOKEN_BYTES)
    place = HostIdentity.here().loopback
    links: dict[int, Link] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, contextlib.ExitStack() as on_error:
        listener.bind("")  # the kernel chooses an abstract name
        listener.listen(context.world_size)
        try:
            said = context.control.all_gather("shm addresses", place + token + listener.getsockname(), timeout_s)
        except ControlPlaneError as error:
            raise _late(list(error.missing), timeout_s, str(error)) from error
        places = [value[: len(place)] for value in said]
        if len(set(places)) > 1:
            raise BackendUnavailableError(
                "the ranks do not share memory",
                name="shm",
                why=f"rank {next(r for r, other in enumerate(places) if other != places[0])} is on another host, or in "
                "another network namespace, than rank 0",
                remedy="use a backend that goes over the network",
            )

        def wait_on(connection: socket.socket) -> socket.socket:
            on_error.callback(connection.close)
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            return connection

        try:
            lower = {
                rank: wait_on(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) for rank in range(context.rank)
            }
            for rank, connection in lower.items():
                token_and_name = said[rank][len(place) :]
                connection.connect(token_and_name[_TOKEN_BYTES:])
                _give(connection, window, _HELLO.pack(token_and_name[:_TOKEN_BYTES], context.rank))
            while len(links) < context.world_size - 1 - context.rank:
                listener.settimeout(max(deadline - time.monotonic(), 0.001))
                connection = wait_on(listener.accept()[0])
                peer = _receive(connection, window.nbytes, token)
                if peer is not None:
                    links[peer.peer] = peer
                    _give(connection, window, _HELLO.pack(token, context.rank))
            for rank, connection in lower.items():
                peer = _receive(connection, window.nbytes, said[rank][len(place) :][:_TOKEN_BYTES])
                if peer is None:
                    raise ConnectionError(f"rank {rank} did not answer as itself")
                links[rank] = peer
        except OSError as error:
            missing = [rank for rank in range(context.world_size) if rank not in links and rank != context.rank]
            raise _late(missing, timeout_s, f"{type(error).__name__}: {error}") from error
        for link in links.values():
            link.connection.setblocking(False)
        on_error.pop_all()
    return links


def _give(connection: socket.socket, window: Window, hello: bytes) -> None:
    socket.send_fds(connection, [hello], [window.handle])


def _receive(connection: socket.socket, nbytes: int, token: bytes) -> Link | None:
    """Take a peer's hello and map its window; None if it is not a peer of this group."""
    raw, handles, _, _ = socket.recv_fds(connection, _HELLO.size, 1)
    try:
        if len(raw) != _HELLO.size or len(handles) != 1:
            return None
        shown, rank = _HELLO.unpack(raw)
        if not secrets.compare_digest(shown, token):
            return None
        return Link(rank, connection, map_window(handles[0], nbytes, writable=False))
    finally:
        for handle in handles:
            os.close(handle)


def _late(missing: list[int], timeout_s: float, why: str) -> TransferTimeoutError:
    return TransferTimeoutError(
        f"no connection to {ranks_text(missing)} within {timeout_s:g} s", peers=missing, phase="connect", why=why
    )
