"""One set of processes through its trials, and whether anything of them is left when they are gone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from eplb_core.launch.local_ranks import Outcome, collect_local_ranks, store_of_this_machine
from eplb_core.launch.rank_process import RankProcess, start_rank
from eplb_core.registry.config import parse_config
from eplb_core.registry.registry import default_registry
from eplb_core.testing.campaign.member import Host, Next, Told, take_part
from eplb_core.testing.campaign.plan import KINDS, Trial, plan_trials

_TRIAL_S = 40.0  # the most that one trial may take, beside its timeout
_START_S = 60.0
_JOIN_S = 10.0
_LOOK_AGAIN_S = 2.0  # for what a process that was killed has left to be gone
_SHARED_MEMORY = Path("/dev/shm")
_WATCH_S = 0.05
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER

_ENVIRONMENT = {
    "RES_OPTIONS": "timeout:1 attempts:1",  # as in the runner of the conformance kit
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


@dataclass(slots=True)
class Episode:
    """What became of one set of processes.

    Attributes:
        config: the backend.
        seed: with `ranks` and the kinds of faults, gives the trials.
        ranks: how many processes there were at first.
        trials: what was to be tried.
        told: trial -> process -> what it told.
        following: trial -> process -> what it told of the rearrangement after it.
        too_late: trials in which a process was to leave and had ended the rearrangement before.
        outcomes: how each process ended.
        left_behind: what was still there afterwards.
        log: the end of what all processes have written to standard error.
        seconds: how long it took.
    """

    config: str
    seed: int
    ranks: int
    trials: list[Trial]
    told: dict[int, dict[int, Told]] = field(default_factory=dict)
    following: dict[int, dict[int, Next]] = field(default_factory=dict)
    too_late: set[int] = field(default_factory=set)
    outcomes: list[Outcome] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    log: str = ""
    seconds: float = 0.0


def run_episode(
    config: str,
    seed: int,
    ranks: int,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    background: bool | None = None,
    timeout_s: float = 2.0,
) -> Episode:
    """Run the trials of one seed.

    Args:
        config: the backend, as a config string without a timeout.
        seed: everything random follows from it.
        ranks: how many processes there are at first.
        kinds: which faults.
        background: whether all trials are jobs, or none; None draws it each time.
        timeout_s: the communicator's, while something goes wrong, in seconds.
    """
    entry = default_registry().select(parse_config(config))
    can = entry.spec.capabilities if entry.spec is not None else None
    beside = False if can is None or not can.background else background
    trials = plan_trials(seed, ranks, kinds, beside)
    chance = random.Random(f"stateless {seed}")
    stateless = frozenset(
        trial.number for trial in trials if chance.random() < 0.5 and can is not None and can.stateless_groups
    )
    episode = Episode(config, seed, ranks, trials)

    def take(process: int, event: tuple[str, int, Told | Next | None]) -> None:
        _, number, what = event
        if what is None:
            episode.too_late.add(number)
        elif isinstance(what, Told):
            episode.told.setdefault(number, {})[process] = what
        else:
            episode.following.setdefault(number, {})[process] = what

    pids: list[int] = []
    began = time.monotonic()
    _adopt_orphans()
    memory = _SharedMemory(pids)
    with tempfile.TemporaryDirectory(prefix="eplb-campaign-") as folder:
        temporary = Path(folder, "tmp")
        temporary.mkdir()
        log = Path(folder, "log")
        with _environment(_ENVIRONMENT), _store_hosts(trials) as hosts:
            limit_s = _START_S + len(trials) * (_TRIAL_S + 2 * timeout_s)
            arguments = (str(log), str(temporary), config, seed, timeout_s, trials, hosts, stateless)
            episode.outcomes = collect_local_ranks(
                take_part, ranks, arguments, timeout_s=limit_s, on_event=take, on_start=pids.extend, grace_s=limit_s
            )
        episode.log = log.read_text("utf-8", "replace")[-20_000:] if log.exists() else ""
        episode.left_behind = _left_behind(pids, temporary, memory.stop())
    episode.seconds = time.monotonic() - began
    return episode


# --- stores that may fail --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _store_hosts(trials: Sequence[Trial]) -> Iterator[dict[int, Host]]:
    """Give each trial whose store fails a process that hosts it."""
    processes: list[tuple[RankProcess, Connection]] = []
    hosts: dict[int, Host] = {}
    try:
        for trial in trials:
            if trial.loses_store:
                process, pipe = start_rank(_host, (), f"store of trial {trial.number}")
                processes.append((process, pipe))
                hosts[trial.number] = Host(process.pid or 0, pipe.recv())
        yield hosts
    finally:
        for process, pipe in processes:
            process.kill()
            process.join(_JOIN_S)
            process.close()
            pipe.close()


def _host(pipe: Connection) -> None:
    store = store_of_this_machine()
    pipe.send(store.port)
    with contextlib.suppress(EOFError):
        pipe.recv()  # until the launcher ends this process, or itself


@contextlib.contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """Have the processes that are started inside the block find these variables."""
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# --- what is left ----------------------------------------------------------------------------------------------------


def _adopt_orphans() -> None:
    """Become the parent of what the ranks may leave behind, so that it can be seen."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


class _SharedMemory:
    """Watches what appears in /dev/shm while ranks live, and which of it is theirs: others use it too.

    Args:
        pids: the ranks, as they become known.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._strange = _names()  # what is not of the ranks, or is not known to be
        self._theirs: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="shared memory", daemon=True)
        self._thread.start()

    def stop(self) -> set[str]:
        """Return the names of what ranks have had."""
        self._ended.set()
        self._thread.join()
        return self._theirs

    def _watch(self) -> None:
        while not self._ended.wait(_WATCH_S):
            for name in _names() - self._strange - self._theirs:
                if any(_holds(pid, name) for pid in list(self._pids)):
                    self._theirs.add(name)


def _names() -> set[str]:
    try:
        return set(os.listdir(_SHARED_MEMORY))
    except OSError:
        return set()


def _holds(pid: int, name: str) -> bool:
    with contextlib.suppress(OSError):
        if str(_SHARED_MEMORY / name) in Path(f"/proc/{pid}/maps").read_text():
            return True
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(descriptor) == str(_SHARED_MEMORY / name):
                    return True
    return False


def _left_behind(pids: Sequence[int], temporary: Path, shared: set[str]) -> list[str]:
    """Return what is still there of processes that have ended."""
    ends = time.monotonic() + _LOOK_AGAIN_S
    while True:
        found = [f"process {pid}" for pid in pids if Path(f"/proc/{pid}").exists()]
        found += [f"process {pid}, a child of a rank" for pid in _orphans()]
        found += [f"temporary file {path.relative_to(temporary)}" for path in sorted(temporary.rglob("*"))]
        found += [f"shared memory {name}" for name in sorted(shared & _names())]
        if not found or time.monotonic() > ends:
            return found
        time.sleep(0.05)


def _orphans() -> list[int]:
    """Return the children of this process that it has not started: the fork server is known to `rank_process`."""
    children: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            children += [int(pid) for pid in (task / "children").read_text().split()]
    orphans = []
    for pid in children:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"fork_server" not in command and b"resource_tracker" not in command:
                orphans.append(pid)
    return orphans
