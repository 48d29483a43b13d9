"""A connection of one's own to a store, which never keeps its user longer than it may.

Torch's client waits without an end for a store whose process is stopped, or whose host has vanished from the network;
and making a connection to a store that is gone takes the whole timeout of that store, often half an hour. So a
connection is made in a thread that is left behind in time, and its socket is told to give up on an answer.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from torch.distributed import DistError, DistNetworkError, PrefixStore, Store, TCPStore

from eplb_core.errors import ControlPlaneError

_DESCRIPTORS = Path("/proc/self/fd")
_GRACE_S = 1.0  # for the store to say that a wait has timed out
_LOOK_UP_S = 1.0  # more for a connection: torch looks the address's name up, and a name server may be slow
_REMEDY = "start again; a store outside the workers, such as torchrun's, outlives them"
_one_at_a_time = threading.Lock()  # so that each finds its own socket


class StoreConnection:
    """A connection to a store.

    Args:
        store: the store as seen over it.
        answer_s: how long the store may take to answer, in seconds.
        line: its socket; None where that is not known, and nothing limits how long the store takes.
    """

    def __init__(self, store: Store, answer_s: float = math.inf, line: socket.socket | None = None) -> None:
        self.store = store
        self._answer_s = answer_s
        self._line = line
        self._patience_s = 0.0
        self._lost = ""

    @property
    def lost(self) -> str:
        """Why the store is not asked any more, or nothing."""
        return self._lost

    def answer_within(self, seconds: float) -> None:
        """Give the store so long for an answer from now on, where it has a limit at all."""
        if math.isfinite(self._answer_s):
            self._answer_s = seconds
            self.store.set_timeout(datetime.timedelta(seconds=seconds))

    @contextlib.contextmanager
    def answering_within(self, seconds: float) -> Iterator[None]:
        """Give the store no longer than this for an answer inside the block."""
        before = self._answer_s
        self.answer_within(min(seconds, before))
        try:
            yield
        finally:
            self.answer_within(before)

    @contextlib.contextmanager
    def patient(self, *, waits: bool = False) -> Iterator[None]:
        """Ask the store one question inside the block.

        Args:
            waits: whether the store is given a timeout for this question; it answers at the latest a moment after.

        Raises:
            DistError: what the store raises. One that does not answer is never asked again: an answer that comes late
                would be taken for that to another question.
        """
        if self._lost:  # torch would print a stack for each attempt
            raise DistNetworkError(self._lost)
        self._set_patience(_GRACE_S if waits else self._answer_s)
        try:
            yield
        except DistNetworkError as error:
            self._lost = str(error).splitlines()[0]
            self._cut()
            raise

    def _cut(self) -> None:
        """End it also for other threads: whoever waits for an answer gets a `DistError` at once."""
        if self._line is not None:
            with contextlib.suppress(OSError):
                self._line.shutdown(socket.SHUT_RDWR)

    def _set_patience(self, seconds: float) -> None:
        if self._line is None or seconds == self._patience_s:
            return
        self._patience_s = seconds
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6) or int(seconds < 1))
        with contextlib.suppress(OSError):
            self._line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def connect(store: Store, timeout_s: float) -> StoreConnection:
    """Return a second connection to a store: waiting on a shared one keeps whoever else uses it from the store.

    A store that cannot be connected to again is shared.

    Args:
        store: any store, with prefixes or without.
        timeout_s: how long making the connection may take, and later every answer, in seconds.

    Raises:
        ControlPlaneError: the store is gone, or does not answer in time.
    """
    address = _address(store)
    if address is not None:
        _refuse_if_gone(address, timeout_s)
    made: list[StoreConnection] = []
    failed: list[Exception] = []

    def make() -> None:
        try:
            made.append(_make(store, address, timeout_s))
        except Exception as error:  # noqa: BLE001 - it is raised, or stands for "cannot be cloned", below
            failed.append(error)

    thread = threading.Thread(target=make, name="eplb store connection", daemon=True)
    alone = _one_at_a_time.acquire(timeout=timeout_s / 4)
    try:
        thread.start()
        thread.join(timeout_s + _LOOK_UP_S)
    finally:
        if alone:
            _one_at_a_time.release()
    if made:
        return made[0]
    if (
        not failed
    ):  # the thread ends when the store answers, or at the store's own timeout; ending it now is not possible
        raise _gone(store, f"it did not answer within {timeout_s:g} s")
    if isinstance(failed[0], DistError):
        raise _gone(store, str(failed[0]).splitlines()[0]) from failed[0]
    if isinstance(failed[0], AttributeError | RuntimeError | NotImplementedError):  # not every store can be cloned
        return StoreConnection(store, timeout_s)
    raise failed[0]


def _make(store: Store, address: tuple[str, int] | None, timeout_s: float) -> StoreConnection:
    before = _sockets()
    copy: Store = store.clone()  # type: ignore[attr-defined]  # there, but not in its stub
    lines = _new_lines(before, address) if address is not None else []
    copy.set_timeout(datetime.timedelta(seconds=timeout_s))  # else reading waits as long as the original would
    if len(lines) != 1:  # another thread has connected to the same store in this moment, or there is no /proc
        for line in lines:
            line.close()
        return StoreConnection(copy, timeout_s)
    return StoreConnection(copy, timeout_s, lines[0])


def _address(store: Store) -> tuple[str, int] | None:
    """Return where a store listens, or None if it does not."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return (store.host, store.port) if isinstance(store, TCPStore) else None


def _refuse_if_gone(address: tuple[str, int], timeout_s: float) -> None:
    """Raise if nobody listens there. Torch would try again and again."""
    deadline = time.monotonic() + timeout_s
    try:
        socket.create_connection(address, timeout=max(deadline - time.monotonic(), 0.001)).close()
    except ConnectionRefusedError as error:
        raise ControlPlaneError(
            f"the store at {address[0]}:{address[1]} is gone", why="the connection was refused", remedy=_REMEDY
        ) from error
    except OSError:  # torch may know another way there
        return


def _gone(store: Store, why: str) -> ControlPlaneError:
    address = _address(store)
    where = f" at {address[0]}:{address[1]}" if address is not None else ""
    return ControlPlaneError(f"the store{where} is gone or does not answer", why=why, remedy=_REMEDY)


def _sockets() -> dict[str, int]:
    """Return the sockets of this process: what the kernel calls each -> a descriptor."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for entry in os.listdir(_DESCRIPTORS):
            with contextlib.suppress(OSError):
                name = os.readlink(_DESCRIPTORS / entry)
                if name.startswith("socket:"):
                    found[name] = int(entry)
    return found


def _new_lines(before: dict[str, int], address: tuple[str, int]) -> list[socket.socket]:
    """Return copies of the sockets that are connected to the port of `address` and were not there `before`."""
    lines = []
    for name, descriptor in _sockets().items():
        if name in before:
            continue
        with contextlib.suppress(OSError):
            line = socket.socket(fileno=os.dup(descriptor))
            try:
                connected = line.getpeername()[1] == address[1]
            except (OSError, IndexError, TypeError):
                connected = False
            if connected:
                lines.append(line)
            else:
                line.close()
    return lines
