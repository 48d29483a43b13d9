"""The server process that imports torch once and forks a rank at each request of `rank_process`.

It imports nothing of this package that reads the environment, starts no Python thread, and touches neither CUDA nor a
transport: a forked rank is as good as a new process. The server and its ranks end when the process that started it
ends, even by a crash.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import selectors
import signal
import socket
import struct
import sys
from dataclasses import dataclass
from multiprocessing import spawn
from multiprocessing.connection import Connection

PRELOADED = ("numpy", "torch", "torch.distributed")
NUMBER = struct.Struct("q")
"""What the server writes for each rank: its process id, then its exit code, negative for a signal."""

_PR_SET_PDEATHSIG = 1
_REQUEST_FDS = 4  # the rank's pipe, where to write the numbers, stdout, stderr


def serve(control_fd: int, launcher: int) -> None:
    """Run the server. Returns only in a forked rank that has done its work, never in the server.

    Args:
        control_fd: the socket for requests. When it is closed, the server ends with its last rank.
        launcher: the requesting process. When it ends, the server and all ranks end at once.
    """
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the launcher, which terminates the ranks
    server = os.getpid()
    requests = _Server(socket.socket(fileno=control_fd), launcher)
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # the rank that needs it will report the error
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the ranks' garbage collectors must not walk shared objects: that would copy the pages
    pipe, stdout, stderr = requests.fork_until_retired()
    end_with(server)
    signal.signal(signal.SIGINT, interrupt)
    for fd, standard in ((stdout, 1), (stderr, 2)):
        os.dup2(fd, standard)
        os.close(fd)
    _perform(Connection(pipe))


@dataclass(frozen=True, slots=True)
class _Rank:
    pid: int
    process: int  # a descriptor, readable when it has ended
    launcher: socket.socket  # takes the numbers; closed when the launcher no longer needs the process id


class _Server:
    def __init__(self, control: socket.socket, launcher: int) -> None:
        self._control = control
        self._launcher = os.pidfd_open(launcher)
        if os.getppid() != launcher:
            os._exit(0)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._control, selectors.EVENT_READ)
        self._selector.register(self._launcher, selectors.EVENT_READ)
        self._ranks: dict[int, _Rank] = {}
        self._retired = False

    def fork_until_retired(self) -> tuple[int, int, int]:
        """Serve; return only in a rank, with the descriptors of its pipe, stdout and stderr."""
        while self._ranks or not self._retired:
            for key, _ in self._selector.select():
                if isinstance(key.data, _Rank):
                    (self._tell_end if key.fd == key.data.process else self._reap)(key.data)
                elif key.fileobj is self._control:
                    forked = self._take_request()
                    if forked is not None:
                        return forked
                else:
                    os._exit(0)
        os._exit(0)

    def _take_request(self) -> tuple[int, int, int] | None:
        _, fds, _, _ = socket.recv_fds(self._control, 1, _REQUEST_FDS)
        if len(fds) != _REQUEST_FDS:
            self._selector.unregister(self._control)
            self._retired = True
            return None
        pipe, launcher, stdout, stderr = fds
        pid = os.fork()
        if pid == 0:
            self._let_go()
            os.close(launcher)
            return pipe, stdout, stderr
        for fd in (pipe, stdout, stderr):
            os.close(fd)
        rank = _Rank(pid, os.pidfd_open(pid), socket.socket(fileno=launcher))
        self._ranks[pid] = rank
        self._selector.register(rank.process, selectors.EVENT_READ, rank)
        _tell(rank, pid)
        return None

    def _tell_end(self, rank: _Rank) -> None:
        """Send the exit code; the process id stays reserved, so that a signal for the rank cannot reach another."""
        self._selector.unregister(rank.process)
        ended = os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOWAIT)
        if ended is not None:
            _tell(rank, ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)
        self._selector.register(rank.launcher, selectors.EVENT_READ, rank)

    def _reap(self, rank: _Rank) -> None:
        self._selector.unregister(rank.launcher)
        os.waitpid(rank.pid, 0)
        os.close(rank.process)
        rank.launcher.close()
        del self._ranks[rank.pid]

    def _let_go(self) -> None:
        """Close the server's descriptors in a rank."""
        self._selector.close()
        self._control.close()
        os.close(self._launcher)
        for rank in self._ranks.values():
            os.close(rank.process)
            rank.launcher.close()


def _tell(rank: _Rank, number: int) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the launcher is no longer listening
        rank.launcher.send(NUMBER.pack(number))


def end_with(server: int) -> None:
    """Make the kernel kill this process when its parent, `server`, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:  # it has already ended
        os.kill(os.getpid(), signal.SIGKILL)


def _perform(pipe: Connection) -> None:
    """Take over the launcher's environment, then run its function; the interpreter then exits as usual."""
    environment, preparation = pipe.recv()
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    spawn.prepare(preparation)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # else all ranks would draw the same numbers
    function, arguments = pipe.recv()
    function(*arguments, pipe)
