"""Starts the processes of local ranks: forked from a server that has imported torch, or spawned if there is none.

Importing torch takes a second of CPU in every new process. The server does it once; a forked rank starts in
milliseconds, with the launcher's current environment, directory, `sys.path`, stdout and stderr. Libraries that the
server has loaded may have read their environment variables: if one changes, a new server is started.

One server is kept for the whole process, as in `multiprocessing`, because starting it is expensive.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing import spawn, util
from multiprocessing.connection import Connection, wait
from typing import Any, Final, Protocol

from eplb_core.errors import InputError
from eplb_core.launch.fork_server import NUMBER

START_METHOD_VARIABLE: Final = "EPLB_START_METHOD"

_TUNED = {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0xf0000"}
"""Environment of the server, unless the user has set it: ranks then copy blocks of 960 KiB and more past the cache,
1.5 times as fast. The C library's own threshold is three quarters of the cache: hundreds of MB."""

_READ_LATER = ("EPLB_", "PYTEST_", "NIXL_", "UCX_")
"""Variables that the server's imports do not read. If any other variable changes, a new server is started."""

_READY_S = 60.0  # for the server to import torch, on a busy machine too
_KILLED_S = 30.0  # for a killed process to be gone
_SERVE = (
    "import sys; sys.path[:] = {path!r}; from eplb_core.launch.fork_server import serve; serve({control}, {launcher})"
)


class RankProcess(Protocol):
    """The process of a local rank, with the interface of a `multiprocessing` process."""

    @property
    def pid(self) -> int | None:
        """The process id."""

    @property
    def exitcode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    def is_alive(self) -> bool:
        """Whether it runs."""

    def join(self, timeout: float | None = None) -> None:
        """Wait until it ends, `timeout` seconds at most."""

    def kill(self) -> None:
        """Kill it with SIGKILL, if it runs."""

    def close(self) -> None:
        """Release its resources. It must have ended."""


def start_rank(function: Callable[..., None], arguments: Sequence[Any], name: str) -> tuple[RankProcess, Connection]:
    """Start a process that calls `function(*arguments, pipe)`; return it with the other end of `pipe`.

    The environment variable `EPLB_START_METHOD` selects how: `forkserver`, the default, or `spawn`, for an entirely
    new process each time. Without a fork server, as on an old kernel, it is always `spawn`.

    Args:
        function: at the top level of an importable module.
        arguments: picklable.
        name: of the process, for `multiprocessing.current_process().name`.

    Raises:
        InputError: `EPLB_START_METHOD` is neither of the two.
    """
    ours, theirs = multiprocessing.Pipe()
    process: RankProcess | None = None
    try:
        process = _the_server.fork(theirs) if _fork_wanted() else None
        if process is None:
            new = multiprocessing.get_context("spawn").Process(target=function, args=(*arguments, theirs), name=name)
            new.start()
            return new, ours
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died, as its exit code will show
            ours.send((dict(os.environ), _preparation(name)))
            ours.send((function, tuple(arguments)))
    except BaseException:
        ours.close()
        if process is not None:
            process.kill()
            process.join(_KILLED_S)
            process.close()
        raise
    finally:
        theirs.close()
    return process, ours


def start_server() -> None:
    """Start a server in the background, while this process does other things."""
    if _fork_wanted():
        _the_server.start()


def _fork_wanted() -> bool:
    method = os.environ.get(START_METHOD_VARIABLE) or "forkserver"
    if method not in ("forkserver", "spawn"):
        raise InputError(f"{START_METHOD_VARIABLE} is {method!r}", remedy="set it to forkserver or spawn, or unset it")
    return method == "forkserver" and hasattr(os, "pidfd_open") and not getattr(sys, "frozen", False)


def _preparation(name: str) -> dict[str, Any]:
    """Return what a child process takes over: `sys.path`, `sys.argv`, directory and main module."""
    preparation = spawn.get_preparation_data(name)
    return {**preparation, "authkey": bytes(preparation["authkey"])}


class _ForkedRank:
    """A child of the server."""

    def __init__(self, pid: int, numbers: socket.socket) -> None:
        self.pid = pid
        self._numbers = numbers
        self._exitcode: int | None = None
        self._process: int | None = None
        with contextlib.suppress(ProcessLookupError):  # it has already ended
            self._process = os.pidfd_open(pid)

    @property
    def exitcode(self) -> int | None:
        self.join(0)
        return self._exitcode

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        if self._exitcode is None and wait([self._numbers], timeout):
            told = _read_number(self._numbers)
            if told is None:  # the server has died silently, and the kernel kills its ranks
                told = -signal.SIGKILL
                if self._process is not None and not wait([self._process], timeout):
                    return
            self._exitcode = told

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)

    def close(self) -> None:
        with self._numbers:  # the server releases the process id only now, and confirms by closing its side
            self._numbers.shutdown(socket.SHUT_WR)
            wait([self._numbers], _KILLED_S)
        if self._process is not None:
            os.close(self._process)


class _ServerOfThisProcess:
    """Starts the server when it is first needed, and another one when the environment has changed."""

    def __init__(self) -> None:
        self._forget()
        atexit.register(self._end)
        os.register_at_fork(after_in_child=self._forget)  # the parent's server belongs to the parent

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._traits: object = None
        self._retired: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start a server unless a matching one runs."""
        with self._lock:
            self._fitting()

    def fork(self, pipe: Connection) -> _ForkedRank | None:
        """Return a new process that listens to `pipe`, or None if no server starts."""
        with self._lock:
            for _ in range(2):  # retry once if the server was killed
                rank = _ask(self._fitting(), pipe)
                if rank is not None:
                    return rank
                self._end()
        return None

    def _fitting(self) -> socket.socket:
        traits = _traits()
        self._reap()
        if self._control is not None and self._traits == traits:
            return self._control
        self._retire()
        self._traits = traits
        self._control, theirs = socket.socketpair()
        path = [entry for entry in sys.path if isinstance(entry, str)]
        with theirs:
            serve = _SERVE.format(path=path, control=theirs.fileno(), launcher=os.getpid())
            flags = util._args_from_interpreter_flags()  # type: ignore[attr-defined]
            self._server = subprocess.Popen(
                [spawn.get_executable(), *flags, "-c", serve],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_TUNED | os.environ,
            )
        return self._control

    def _retire(self) -> None:
        """Let the server end with the last of its ranks."""
        if self._control is not None and self._server is not None:
            self._control.close()
            self._retired.append(self._server)
        self._control = self._server = None
        self._reap()

    def _reap(self) -> None:
        """Reap the retired servers that have ended: until then they are zombies."""
        self._retired = [server for server in self._retired if server.poll() is None]

    def _end(self) -> None:
        self._retire()
        for server in self._retired:
            server.kill()
            server.wait(_KILLED_S)
        self._retired = []


def _traits() -> object:
    """Return what a server inherits permanently from this process."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(_READ_LATER)}
    limits = [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")]
    return variables, limits, os.sched_getaffinity(0), spawn.get_executable()


def _ask(control: socket.socket, pipe: Connection) -> _ForkedRank | None:
    """Ask the server to fork; return None if it does not."""
    numbers, theirs = socket.socketpair()
    try:
        with contextlib.ExitStack() as opened:
            opened.enter_context(theirs)
            outputs = [_or_nothing(fd, opened) for fd in (1, 2)]
            socket.send_fds(control, [b"."], [pipe.fileno(), theirs.fileno(), *outputs])
        pid = _read_number(numbers) if wait([numbers], _READY_S) else None
    except OSError:
        pid = None
    if pid is None:
        numbers.close()
        return None
    return _ForkedRank(pid, numbers)


def _or_nothing(fd: int, opened: contextlib.ExitStack) -> int:
    """Return the descriptor of an output stream, or of /dev/null if the stream is closed."""
    try:
        os.fstat(fd)
    except OSError:
        fd = os.open(os.devnull, os.O_WRONLY)
        opened.callback(os.close, fd)
    return fd


def _read_number(numbers: socket.socket) -> int | None:
    try:
        told = numbers.recv(NUMBER.size)  # sent in one piece, and too small to be split
    except ConnectionResetError:
        return None
    return NUMBER.unpack(told)[0] if told else None


_the_server = _ServerOfThisProcess()
