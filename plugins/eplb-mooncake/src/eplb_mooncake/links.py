"""One link to each peer: a TCP connection for small messages, besides Mooncake's connection for the bytes.

A separate connection, because the kernel closes it when a process ends, so that the peers of a dead rank know at once,
and because Mooncake has no message from the reader to the rank it reads from.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import IntEnum

from eplb_core import BackendContext
from eplb_core.errors import BackendUnavailableError, ControlPlaneError, TransferTimeoutError
from eplb_core.transport import HostIdentity
from eplb_core.words import ranks_text

_TOKEN_BYTES = 16
_HELLO = struct.Struct(f"<{_TOKEN_BYTES}sI")  # the listener's token, the rank that connects
_HELLO_S = 2.0  # a peer sends hello as soon as it is connected; anything else is not a peer
_MESSAGE = struct.Struct("<BIQH")  # kind, number, address, bytes of text
_LONGEST_TEXT = 4096
_SIOCGIFADDR = 0x8915
_NOWHERE = ("192.0.2.1", 9)  # an address for documentation, on no network; nothing is sent


class Kind(IntEnum):
    """The kind of a message."""

    READY = 1
    """The sender's next chunk for the receiver is at the address; the number is its ticket."""
    TAKEN = 2
    """The chunk with this ticket was read."""
    FAILED = 3
    """The sender gives up; the number is the rank to blame, the text is the reason."""


@dataclass(frozen=True, slots=True)
class Message:
    """One received message."""

    kind: Kind
    number: int
    address: int
    text: str


@dataclass(frozen=True, slots=True)
class Card:
    """What a rank sends to every other one before they connect.

    Attributes:
        host: the address at which it listens.
        port: for messages.
        engine: its Transfer Engine's name.
        sample: the address of the bytes of `token` in its registered memory.
        token: proves that a connecting process belongs to the group, hexadecimal.
    """

    host: str
    port: int
    engine: str
    sample: int
    token: str


@dataclass(slots=True)
class Link:
    """The connection to one peer.

    Attributes:
        peer: its rank.
        connection: connected, non-blocking.
        engine: the name of its Transfer Engine.
    """

    peer: int
    connection: socket.socket
    engine: str
    _arrived: bytearray = field(default_factory=bytearray)

    def send(self, kind: Kind, number: int, address: int = 0, text: str = "") -> None:
        """Send one message. Raises `OSError` if the peer is gone."""
        content = text.encode()[:_LONGEST_TEXT]
        message = _MESSAGE.pack(kind, number, address, len(content)) + content
        # A socket's buffer holds thousands of messages; a peer leaves at most those of two rounds unread.
        if self.connection.send(message) != len(message):
            raise BlockingIOError("it has not read its messages")

    def messages(self) -> Iterator[Message]:
        """Yield received messages. Raises `OSError` if the peer is gone or violates the protocol."""
        ended = False
        with contextlib.suppress(BlockingIOError):
            while not ended:
                received = self.connection.recv(65536)
                self._arrived += received
                ended = not received
        while len(self._arrived) >= _MESSAGE.size:
            kind, number, address, length = _MESSAGE.unpack_from(self._arrived)
            if kind not in Kind.__members__.values() or length > _LONGEST_TEXT:
                raise ConnectionError("it sent an invalid message")
            if len(self._arrived) < _MESSAGE.size + length:
                break
            text = self._arrived[_MESSAGE.size : _MESSAGE.size + length].decode(errors="replace")
            del self._arrived[: _MESSAGE.size + length]
            yield Message(Kind(kind), number, address, text)
        if ended:
            raise ConnectionResetError("it has closed the connection")


def find_host(context: BackendContext, interface: str | None, timeout_s: float) -> str:
    """Return the IPv4 address at which the other ranks reach this one.

    Args:
        context: the group; every rank calls this at the same time.
        interface: the name of the network interface to take, or None.
        timeout_s: how long to wait for the slowest rank, in seconds.

    Raises:
        BackendUnavailableError: the interface does not exist, or none can be found.
        TransferTimeoutError: a rank did not answer in time.
    """
    places = _gather(context, "hosts of mooncake ranks", HostIdentity.here().loopback, timeout_s)
    if interface:
        return _address_of(interface)
    if len(set(places)) == 1:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_NOWHERE)
        except OSError as error:
            raise BackendUnavailableError(
                "cannot find the address at which other hosts reach this one",
                name="mooncake",
                why=f"there is no default route ({error})",
                remedy="name the network interface, such as mooncake?interface=eth0",
            ) from error
        return str(probe.getsockname()[0])


def listen(host: str, backlog: int) -> socket.socket:
    """Return a socket that listens on a free port of `host`."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind((host, 0))
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def exchange_cards(context: BackendContext, mine: Card, timeout_s: float) -> list[Card]:
    """Return the card of every rank, in rank order. Raises `TransferTimeoutError` if one does not come in time."""
    said = _gather(context, "addresses of mooncake ranks", json.dumps(asdict(mine)).encode(), timeout_s)
    cards = []
    for raw in said:
        card = json.loads(raw)
        cards.append(
            Card(str(card["host"]), int(card["port"]), str(card["engine"]), int(card["sample"]), str(card["token"]))
        )
    return cards


def connect(rank: int, listener: socket.socket, cards: list[Card], timeout_s: float) -> dict[int, Link]:
    """Return a link to every other rank. Every rank calls it at the same time, and connects to lower ranks.

    Raises:
        TransferTimeoutError: a rank did not connect in time.
    """
    deadline = time.monotonic() + timeout_s
    tokens = [bytes.fromhex(card.token) for card in cards]
    connections: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as on_error:
        on_error.callback(_close_all, connections)
        why = "no rank connected"
        try:
            for lower in range(rank):
                connections[lower] = socket.create_connection((cards[lower].host, cards[lower].port), _left(deadline))
                connections[lower].sendall(_HELLO.pack(tokens[lower], rank))
            missing = set(range(rank + 1, len(cards)))
            while missing:
                listener.settimeout(_left(deadline))
                connection = listener.accept()[0]
                higher = _greeted(connection, tokens[rank], _left(deadline))
                if higher not in missing:
                    connection.close()
                    continue
                missing.remove(higher)
                connections[higher] = connection
                connection.sendall(tokens[higher])
            for lower in range(rank):
                if not secrets.compare_digest(_receive(connections[lower], _TOKEN_BYTES), tokens[rank]):
                    raise ConnectionError(f"the process that answers for rank {lower} does not belong to this group")
        except OSError as error:
            why = f"{type(error).__name__}: {error}"
            absent = [peer for peer in range(len(cards)) if peer not in connections and peer != rank]
            raise _late("connect", absent, timeout_s, why) from error
        for connection in connections.values():
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        on_error.pop_all()
    return {peer: Link(peer, connection, cards[peer].engine) for peer, connection in connections.items()}


def new_token() -> bytes:
    """Return unguessable bytes."""
    return secrets.token_bytes(_TOKEN_BYTES)


def _greeted(connection: socket.socket, token: bytes, patience_s: float) -> int | None:
    """Return the connected rank, or None if it is not a rank of this group."""
    connection.settimeout(min(patience_s, _HELLO_S))
    try:
        shown, rank = _HELLO.unpack(_receive(connection, _HELLO.size))
    except OSError:
        return None
    return int(rank) if secrets.compare_digest(shown, token) else None


def _receive(connection: socket.socket, nbytes: int) -> bytes:
    content = b""
    while len(content) < nbytes:
        part = connection.recv(nbytes - len(content))
        if not part:
            raise ConnectionResetError("it has closed the connection")
        content += part
    return content


def _close_all(connections: dict[int, socket.socket]) -> None:
    for connection in connections.values():
        connection.close()


def _gather(context: BackendContext, what: str, payload: bytes, timeout_s: float) -> list[bytes]:
    try:
        return context.control.all_gather(what, payload, timeout_s)
    except ControlPlaneError as error:
        raise _late("connect", list(error.missing), timeout_s, str(error)) from error


def _address_of(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            answer = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise BackendUnavailableError(
                f"the network interface {interface!r} has no IPv4 address",
                name="mooncake",
                why=str(error),
                remedy=f"name another one with the interface option; there are {names}",
            ) from error
    return socket.inet_ntoa(answer[20:24])


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _late(phase: str, missing: list[int], timeout_s: float, why: str) -> TransferTimeoutError:
    ranks = ranks_text(missing) if missing else "all ranks"
    return TransferTimeoutError(f"no connection to {ranks} within {timeout_s:g} s", peers=missing, phase=phase, why=why)
