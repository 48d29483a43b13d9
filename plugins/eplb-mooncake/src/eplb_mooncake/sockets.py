"""Mooncake's own sockets, found by their ports, because its interface cannot end a wait.

If a later version waits in another way, this module has no effect, and closing takes as long as without it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

_LISTEN_S = 0.05
_TIMEVAL = struct.Struct("ll")  # seconds, microseconds


def shorten_listening(port: int) -> None:
    """Make the listener at this port check more often whether it should stop.

    By default it checks once a second, and closing an engine waits for that without letting any Python thread run.
    """
    for each in _sockets():
        with each, contextlib.suppress(OSError):
            if each.getsockname()[1] == port and each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(0, int(_LISTEN_S * 1e6)))


def end_connections(host: str, port: int) -> None:
    """Shut down every connection to this address, so that a wait for an answer fails at once."""
    for each in _sockets():
        with each, contextlib.suppress(OSError):
            if each.getpeername()[:2] == (host, port):
                each.shutdown(socket.SHUT_RDWR)


def _sockets() -> Iterator[socket.socket]:
    """Yield a duplicate of every IPv4 socket of this process; the caller closes it."""
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{handle}").startswith("socket:"):
                duplicate = socket.socket(fileno=os.dup(int(handle)))
                if duplicate.family == socket.AF_INET:
                    yield duplicate
                else:
                    duplicate.close()
