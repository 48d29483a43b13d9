"""The process that has imported torch once and forks a rank whenever it is asked to; `rank_process` is who asks.

It imports nothing of this package that reads an environment, starts no thread of Python, and touches neither CUDA nor a
transport: a rank that it forks is as good as a new process. It ends with the process that started it, however that one
ends, and takes its ranks with it.
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
"""What the server writes of each rank: its process id, then its exit code, negative for a signal."""

_PR_SET_PDEATHSIG = 1
_REQUEST_FDS = 4  # the rank's pipe, where to write the numbers, stdout, stderr


def serve(control_fd: int, launcher: int) -> None:
    """Be the server. This returns in a rank that was forked, when it has done its work, and never in the server.

    Args:
        control_fd: the socket over which requests come. When it ends, the server ends with its last rank.
        launcher: the process that asks. When it ends, the server and all ranks end at once.
    """
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the launcher, which ends the ranks
    server = os.getpid()
    requests = _Server(socket.socket(fileno=control_fd), launcher)
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # the rank that needs it will say so
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no rank goes through what all share, at its end least of all, which would copy it
    pipe, stdout, stderr = requests.fork_until_retired()
    _end_with(server)
    signal.signal(signal.SIGINT, interrupt)
    for fd, standard in ((stdout, 1), (stderr, 2)):
        os.dup2(fd, standard)
        os.close(fd)
    _perform(Connection(pipe))


@dataclass(frozen=True, slots=True)
class _Rank:
    pid: int
    process: int  # a descriptor, readable when it has ended
    launcher: socket.socket  # takes the numbers; its end says that the launcher needs the process id no more


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
        """Tell the exit code; the process id stays taken, so that whoever means the rank cannot mean another one."""
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
        """Close in a rank what is the server's."""
        self._selector.close()
        self._control.close()
        os.close(self._launcher)
        for rank in self._ranks.values():
            os.close(rank.process)
            rank.launcher.close()


def _tell(rank: _Rank, number: int) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the launcher has lost interest
        rank.launcher.send(NUMBER.pack(number))


def _end_with(server: int) -> None:
    """Have the kernel kill this process when the server ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)


def _perform(pipe: Connection) -> None:
    """Become like the launcher, then do what it says; the interpreter's usual end follows."""
    environment, preparation = pipe.recv()
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    spawn.prepare(preparation)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # else all ranks would draw what the server would have drawn
    function, arguments = pipe.recv()
    function(*arguments, pipe)
