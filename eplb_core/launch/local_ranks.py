"""Starts ranks as local processes, and always terminates them.

The parent hosts the store through which the ranks meet, so that it outlives them. Each child reports over a separate
pipe; the first failure, or the deadline, terminates all.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import logging
import multiprocessing
import os
import secrets
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from eplb_core.errors import EplbError, InputError
from eplb_core.launch.fork_server import end_with
from eplb_core.launch.rank_devices import limit_visible_gpus
from eplb_core.launch.rank_process import RankProcess, start_rank
from eplb_core.words import signal_name

_GRACE_S = 5.0  # once a rank has failed, the others have this long to report
_JOIN_S = 30.0  # a rank that has reported has this long to exit
_DUMP_S = 0.5  # time for the stacks to reach stderr before a rank that hangs is killed
_LOOPBACK = "127.0.0.1"
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_LOOPBACK_S = 5.0
_BACKLOG = 1024  # connections that ranks may open at once
_START_S = 120.0  # for all ranks to meet

_NOT_TORCHRUN = "start it with torchrun, or unset RANK and WORLD_SIZE to start local ranks"

logger = logging.getLogger(__name__)


class LocalRankError(EplbError, RuntimeError):
    """A local rank failed, died or did not finish in time. `rank` is the first such rank."""

    def __init__(self, what: str, *, rank: int, why: str | None = None) -> None:
        self.rank = rank
        super().__init__(what, why=why)


@dataclass(slots=True)
class RankEnvironment:
    """What a rank knows about itself.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: the number of ranks.
        local_rank: the rank's number on its host.
        local_world_size: the number of ranks on its host.
        store: the store through which all ranks meet.
        own_gpu_first: whether the rank's own GPU is the first that it sees, because a launcher limits the visible ones.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    store: dist.Store
    _pipe: Connection | None = None
    own_gpu_first: bool = False

    @classmethod
    def from_torchrun(cls, timeout_s: float = _START_S) -> RankEnvironment:
        """Join the ranks that `torchrun` started, on one machine or several, from its environment variables.

        Args:
            timeout_s: how long to wait for the store of rank 0, in seconds.

        Raises:
            InputError: a variable is missing or is not a number, or the store that they name is not there.
        """
        try:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local_rank = int(os.environ.get("LOCAL_RANK", rank))
            local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except KeyError as error:
            raise InputError(
                f"{error.args[0]} is not set, but RANK and WORLD_SIZE are", remedy=_NOT_TORCHRUN
            ) from error
        except ValueError as error:
            raise InputError("a variable of torchrun is not a number", why=str(error), remedy=_NOT_TORCHRUN) from error
        if not 0 <= rank < world_size or not 0 <= local_rank < local_world_size:
            raise InputError(
                f"RANK is {rank} of WORLD_SIZE {world_size}, LOCAL_RANK {local_rank} of {local_world_size}",
                why="ranks are counted from 0",
                remedy=_NOT_TORCHRUN,
            )
        limit = datetime.timedelta(seconds=min(timeout_s, _START_S))
        try:
            store, _, _ = next(iter(dist.rendezvous("env://", rank, world_size, timeout=limit)))
        except (dist.DistError, RuntimeError, ValueError, OSError) as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"no store at {address}:{port}, the address in MASTER_ADDR and MASTER_PORT",
                why=first_line,
                remedy=_NOT_TORCHRUN,
            ) from error
        return cls(rank, world_size, local_rank, local_world_size, dist.PrefixStore("eplb", store))

    def init_process_group(self, timeout_s: float = 600.0) -> None:
        """Create the default torch.distributed group (gloo) of all ranks.

        Raises:
            InputError: gloo cannot use the network interface, or the ranks did not come.
        """
        try:
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore("world", self.store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=datetime.timedelta(seconds=timeout_s),
            )
        except (RuntimeError, ValueError) as error:
            chosen = os.environ.get(_GLOO_INTERFACE)
            raise InputError(
                "gloo cannot make a process group",
                where=f"rank {self.rank}",
                why=str(error).splitlines()[0].rpartition("] ")[2] if str(error) else type(error).__name__,
                remedy=f"{_GLOO_INTERFACE} is {chosen!r}; set it to an interface of this machine, or unset it"
                if chosen
                else f"set {_GLOO_INTERFACE} to an interface that the ranks reach one another over",
            ) from error

    def report(self, event: object) -> None:
        """Send a picklable progress event to the parent, if there is one."""
        if self._pipe is not None:
            self._pipe.send(("event", event))


@dataclass(slots=True)
class Outcome:
    """How one local rank ended.

    Attributes:
        rank: the rank.
        result: what its target returned.
        error: the class name of the exception that it raised, or None.
        message: the exception's text, or what happened to the process.
        trace: the traceback as text.
        exit_code: of the process; negative for a signal; None if it was killed at the deadline.
    """

    rank: int
    result: Any = None
    error: str | None = None
    message: str = ""
    trace: str = ""
    exit_code: int | None = None
    reported: bool = field(default=False, repr=False)

    @property
    def succeeded(self) -> bool:
        """Whether the target returned and the process ended by itself.

        A crash of a library at process exit does not matter: the result had already been handed over.
        """
        return self.reported and self.error is None and self.exit_code is not None and self.exit_code <= 0


def run_local_ranks(
    target: Callable[..., Any],
    num_ranks: int,
    args: Sequence[Any] = (),
    *,
    timeout_s: float,
    on_event: Callable[[int, Any], None] | None = None,
) -> list[Any]:
    """Run `target(environment, *args)` in `num_ranks` new processes and return their results, in rank order.

    Args:
        target: a function at the top level of an importable module.
        num_ranks: how many processes.
        args: picklable arguments.
        timeout_s: time limit once the processes have started, in seconds.
        on_event: called in this process with `(rank, event)` for each `RankEnvironment.report(event)`.

    Raises:
        LocalRankError: a rank raised, died or did not finish in time. All processes have ended by then.
    """
    outcomes = collect_local_ranks(target, num_ranks, args, timeout_s=timeout_s, on_event=on_event)
    failed = [outcome for outcome in outcomes if not outcome.succeeded]
    if failed:
        # A rank that raised is more informative than one terminated as a consequence.
        first = next((outcome for outcome in failed if outcome.error), failed[0])
        raise LocalRankError(
            f"rank {first.rank} failed with {first.error}" if first.error else f"rank {first.rank} failed",
            rank=first.rank,
            why=first.trace or first.message,
        )
    return [outcome.result for outcome in outcomes]


def collect_local_ranks(
    target: Callable[..., Any],
    num_ranks: int,
    args: Sequence[Any] = (),
    *,
    timeout_s: float,
    on_event: Callable[[int, Any], None] | None = None,
    on_start: Callable[[list[int]], None] | None = None,
    grace_s: float = _GRACE_S,
) -> list[Outcome]:
    """Like `run_local_ranks`, but return how every rank ended instead of raising.

    Args:
        target: as in `run_local_ranks`.
        num_ranks: as in `run_local_ranks`.
        args: as in `run_local_ranks`.
        timeout_s: as in `run_local_ranks`.
        on_event: as in `run_local_ranks`.
        on_start: called once with the process ids, in rank order.
        grace_s: how long the others may continue once a rank has failed.
    """
    store = store_of_this_machine()
    secret = secrets.token_hex(16)  # ranks are told over their pipes; in no environment and on no command line
    outcomes = [Outcome(rank) for rank in range(num_ranks)]
    processes: list[RankProcess] = []
    pipes: dict[Connection, int] = {}
    try:
        for rank in range(num_ranks):
            process, ours = start_rank(_child, (target, args, rank, num_ranks, store.port, secret), f"rank {rank}")
            processes.append(process)
            pipes[ours] = rank
        if on_start is not None:
            on_start([process.pid or 0 for process in processes])
        deadline = time.monotonic() + timeout_s
        cut_short = False
        while pipes:
            ready = wait(list(pipes), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                break
            for pipe in ready:
                rank = pipes[pipe]  # type: ignore[index]
                if not _take(pipe, outcomes[rank], rank, on_event):  # type: ignore[arg-type]
                    pipe.close()  # type: ignore[union-attr]
                    del pipes[pipe]  # type: ignore[arg-type]
                    if not outcomes[rank].reported or outcomes[rank].error:
                        if not cut_short:
                            deadline = min(deadline, time.monotonic() + grace_s)
                        cut_short = True
        for pipe, rank in pipes.items():
            if cut_short:
                outcomes[rank].message = "terminated because another rank failed"
            else:
                outcomes[rank].message = f"did not end within {timeout_s:g} s; its stacks are on stderr"
                _dump_stacks(processes[rank].pid)
            pipe.close()
        if pipes and not cut_short:
            time.sleep(_DUMP_S)
        for rank, process in enumerate(processes):
            if rank not in pipes.values():
                process.join(_JOIN_S)
            if process.is_alive():
                process.kill()
                process.join(_JOIN_S)
                outcomes[rank].message = outcomes[rank].message or f"reported, but did not exit within {_JOIN_S:g} s"
                continue
            outcomes[rank].exit_code = process.exitcode
            outcomes[rank].message = outcomes[rank].message or _how_it_ended(outcomes[rank], process.exitcode or 0)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
        for process in processes:
            process.join(_JOIN_S)
            process.close()
    return outcomes


def store_of_this_machine() -> dist.TCPStore:
    """Return a store that listens on the loopback address only: torch would listen on every address.

    Raises:
        InputError: the loopback interface is down.
    """
    _require_loopback()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.bind((_LOOPBACK, 0))
        listening.listen(_BACKLOG)
        port = listening.getsockname()[1]
        return dist.TCPStore(
            _LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )


def _require_loopback() -> None:
    """Check that this machine reaches itself; torch would try for minutes, and print a stack each time."""
    try:
        with socket.create_server((_LOOPBACK, 0)) as listening:
            socket.create_connection(listening.getsockname(), timeout=_LOOPBACK_S).close()
    except OSError as error:
        raise InputError(
            f"ranks of this machine cannot reach one another at {_LOOPBACK}",
            why=error.strerror or str(error),
            remedy="set the loopback interface up: ip link set lo up",
        ) from error


def _how_it_ended(outcome: Outcome, exit_code: int) -> str:
    """Return a note on how a process ended, and log an abnormal end that is not a failure of its rank."""
    if exit_code >= 0 and not outcome.reported:
        return f"its process exited with code {exit_code} and reported nothing"
    if exit_code >= 0:
        return f"its process exited with code {exit_code} after handing over its result" if exit_code else ""
    what = f"its process was killed by {signal_name(-exit_code)} (signal {-exit_code})"
    if outcome.reported:
        what += " after handing over its result"
        if outcome.error is None:
            logger.warning("rank %d: %s", outcome.rank, what)
        return what
    if -exit_code == signal.SIGKILL:
        what += "; the kernel does this when memory runs out"
    return what


def _take(pipe: Connection, outcome: Outcome, rank: int, on_event: Callable[[int, Any], None] | None) -> bool:
    """Take one message; return False at the end of the pipe."""
    try:
        kind, *content = pipe.recv()
    except (EOFError, OSError):
        return False
    if kind == "event":
        if on_event is not None:
            on_event(rank, content[0])
    elif kind == "result":
        outcome.result, outcome.reported = content[0], True
    else:
        outcome.error, outcome.message, outcome.trace = content
        outcome.reported = True
    return True


def _dump_stacks(pid: int | None) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)


def _child(
    target: Callable[..., Any],
    args: Sequence[Any],
    rank: int,
    world_size: int,
    port: int,
    secret: str,
    pipe: Connection,
) -> None:
    launcher = multiprocessing.parent_process()
    if launcher is not None and launcher.pid == os.getppid():  # else the fork server is the parent, and has seen to it
        end_with(launcher.pid)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    try:
        store = dist.TCPStore(
            _LOOPBACK,
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=_START_S),
        )
        # Torch's store lets in whoever connects; under this prefix nobody writes who was not told it.
        own = dist.PrefixStore(secret, store)
        environment = RankEnvironment(rank, world_size, rank, world_size, own, pipe, limit_visible_gpus(rank))
        pipe.send(("result", target(environment, *args)))
    except BaseException as error:  # noqa: BLE001 - the parent must learn of any failure
        pipe.send(("error", type(error).__name__, str(error), traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        pipe.close()
