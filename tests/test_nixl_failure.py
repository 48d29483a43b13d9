"""What the nixl backend does when a rank dies or stops in the middle, over shared memory and over tcp.

Two ranks live through many endings of a third one; each ending has a communicator of its own. A rank that was killed
is replaced by the next one, one that was stopped goes on once the others have given it up.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import bytes_of, content, error_of

from eplb_backends.nixl.agent import Agent
from eplb_backends.nixl.messages import Writer
from eplb_backends.nixl.outbox import Outbox
from eplb_core.communicator import EplbCommunicator
from eplb_core.errors import TransferError
from eplb_core.factory import create_eplb_communicator
from eplb_core.groups import StatelessGroup
from eplb_core.launch import Outcome, RankEnvironment, collect_local_ranks

TIMEOUT_S = 2.0
PATIENCE_S = 2.0  # what a rank may need beyond the timeout to notice
CLOSE_S = 3.0
VICTIM = 2
LAUNCH_S = 110.0
ROUNDS = 400  # that a random moment may fall in

PACKED = "nixl?mode=packed&window=1MiB"
DIRECT = "nixl?mode=direct&window=1MiB"
MIXED = "nixl?window=1MiB"
TRANSPORTS = {"cma": None, "tcp": "tcp,self"}

# --- how a rank ends -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ending:
    """One way in which the victim ends.

    Attributes:
        phase: a key of `TRAPS`, or `at random`.
        how: SIGKILL or SIGSTOP.
        config: the communicator's.
        nbytes: of each message.
        pairs: who sends to whom.
        trusted: whether the ranks skip the comparison of the whole group.
        moment_s: after the start, for `at random`.
        victim: which process of the launch is the victim; set by `launches`.
        resumes: whether a stopped victim goes on in the end; otherwise it is killed.
    """

    phase: str
    how: signal.Signals
    config: str
    nbytes: int = 300_000
    pairs: tuple[tuple[int, int], ...] = ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1))
    trusted: bool = True
    moment_s: float = 0.0
    victim: int = VICTIM
    resumes: bool = True

    @property
    def name(self) -> str:
        mode = self.config.partition("mode=")[2].partition("&")[0] or "mixed"
        return f"{self.how.name} {self.phase}, {mode}" + (f", at {self.moment_s * 1e3:.1f} ms" if self.moment_s else "")


End = Callable[[], None]


def _on_call(owner: type, method: str, end: End, *, number: int = 1, after: bool = False) -> Any:
    """End before, or after, the call of that number."""
    original = getattr(owner, method)
    calls = 0

    def trapped(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            end()
        result = original(self, *arguments, **named)
        if calls == number and after:
            end()
        return result

    return mock.patch.object(owner, method, trapped)


TRAPS: dict[str, Callable[[End], Any]] = {
    "before ready": lambda end: _on_call(Outbox, "announce", end),
    "while packing": lambda end: _on_call(Outbox, "_fill", end, number=4),
    "while reading": lambda end: _on_call(Agent, "read", end, after=True),
    "while being read": lambda end: _on_call(Agent, "notifications", end, number=12),
    "before done": lambda end: _on_call(Writer, "done", end),
}


@contextlib.contextmanager
def trap(ending: Ending, end: End) -> Iterator[None]:
    """Inside the victim: let the phase of its next transfer end it."""
    if ending.phase == "idle":
        end()
        yield
    elif ending.phase == "at random":
        timer = threading.Timer(ending.moment_s, end)
        timer.start()
        yield
        timer.join()
    else:
        with TRAPS[ending.phase](end):
            yield


# --- what every rank does --------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """The messages of one ending, as one rank sees them."""

    ending: Ending
    rank: int
    sends: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    recvs: list[tuple[torch.Tensor, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for source, destination in self.ending.pairs:
            if source == self.rank:
                raw = content(source, destination, 0, 0, self.ending.nbytes)
                self.sends.append((torch.from_numpy(raw.copy()), destination))
            if destination == self.rank:
                self.recvs.append((torch.full((self.ending.nbytes,), 0xEE, dtype=torch.uint8), source))

    def queue(self, communicator: EplbCommunicator) -> None:
        for tensor, destination in self.sends:
            communicator.add_send(tensor, destination)
        for tensor, source in self.recvs:
            communicator.add_recv(tensor, source)

    def all_arrived(self) -> bool:
        return all(
            bytes_of(tensor) == content(source, self.rank, 0, 0, self.ending.nbytes).tobytes()
            for tensor, source in self.recvs
        )

    def sent_are_unchanged(self) -> bool:
        return all(
            bytes_of(tensor) == content(self.rank, destination, 0, 0, self.ending.nbytes).tobytes()
            for tensor, destination in self.sends
        )


def live_through(environment: RankEnvironment, transports: str | None, endings: list[Ending]) -> None:
    """Take part in those endings that this process has a part in."""
    if transports is not None:
        os.environ["UCX_TLS"] = transports
    for number, ending in enumerate(endings):
        if environment.rank in (0, 1, ending.victim):
            rank = min(environment.rank, VICTIM)
            store = dist.PrefixStore(f"ending {number}", environment.store)
            store.set(f"here {rank}", "")
            store.wait([f"here {each}" for each in range(3)], datetime.timedelta(seconds=LAUNCH_S))
            result = _victim(ending, store) if rank == VICTIM else _survivor(ending, rank, store)
            environment.report((number, rank, result))


def _connect(ending: Ending, rank: int, store: dist.Store) -> tuple[EplbCommunicator, Traffic]:
    """Make the communicator of three, and move everything once."""
    config = f"{ending.config}&timeout={TIMEOUT_S:g}s"
    communicator = create_eplb_communicator(StatelessGroup(rank, 3, store), config)
    traffic = Traffic(ending, rank)
    if "mode=packed" not in config:
        communicator.register([tensor for tensor, _ in traffic.sends])
    traffic.queue(communicator)
    communicator.execute()
    assert traffic.all_arrived()
    communicator.trust_matching(ending.trusted)
    return communicator, traffic


def _victim(ending: Ending, store: dist.Store) -> dict[str, Any]:
    """Returns only if it was stopped and went on."""
    communicator, traffic = _connect(ending, VICTIM, store)

    def end() -> None:
        store.set("ended at", repr(time.monotonic()))
        os.kill(os.getpid(), ending.how)

    def work() -> None:
        with trap(ending, end):
            for _ in range(ROUNDS):
                traffic.queue(communicator)
                communicator.execute()

    error = error_of(work)
    communicator.close()
    return error | {"unchanged": traffic.sent_are_unchanged()}


def _survivor(ending: Ending, rank: int, store: dist.Store) -> dict[str, Any]:
    communicator, traffic = _connect(ending, rank, store)

    def work() -> None:
        for _ in range(ROUNDS):
            traffic.queue(communicator)
            communicator.execute()

    error = error_of(work)
    error["seconds"] = time.monotonic() - float(store.get("ended at"))
    error["unchanged"] = traffic.sent_are_unchanged()
    error["later"] = [
        error_of(communicator.execute)["type"],
        error_of(lambda: communicator.add_recv(torch.zeros(1), 1 - rank))["type"],
    ]
    began = time.monotonic()
    communicator.close()
    communicator.close()
    error["close_s"] = time.monotonic() - began
    pair = replace(ending, pairs=((0, 1), (1, 0)))
    traffic = Traffic(pair, rank)
    group = StatelessGroup(rank, 2, dist.PrefixStore("without the victim", store))
    with create_eplb_communicator(group, f"nixl?window=1MiB&timeout={TIMEOUT_S + 8:g}s") as smaller:
        traffic.queue(smaller)
        smaller.execute()
    error["goes on"] = traffic.all_arrived()
    return error


# --- running them ----------------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """The endings of one set of processes, and what became of them."""

    transport: str
    endings: list[Ending]
    results: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    timeout_s: float = LAUNCH_S

    def run(self) -> Launch:
        pids: list[int] = []

        def take(_: int, event: tuple[int, int, dict[str, Any]]) -> None:
            number, rank, result = event
            self.results[number, rank] = result
            ending = self.endings[number]
            if ending.how == signal.SIGSTOP and {(number, 0), (number, 1)} <= self.results.keys() and rank != VICTIM:
                os.kill(pids[ending.victim], signal.SIGCONT if ending.resumes else signal.SIGKILL)

        self.outcomes = collect_local_ranks(
            live_through,
            1 + max(ending.victim for ending in self.endings),
            (TRANSPORTS[self.transport], self.endings),
            timeout_s=self.timeout_s,
            on_event=take,
            on_start=pids.extend,
            grace_s=self.timeout_s,
        )
        return self


def launches(transport: str, endings: list[Ending]) -> list[Launch]:
    """Give every killed victim a process of its own, and those that are stopped one together, which is killed last."""
    killed = [ending for ending in endings if ending.how == signal.SIGKILL]
    killed = [replace(ending, victim=VICTIM + number) for number, ending in enumerate(killed)]
    stopped = [ending for ending in endings if ending.how == signal.SIGSTOP]
    stopped[-1:] = [replace(ending, resumes=False) for ending in stopped[-1:]]
    return [Launch(transport, group) for group in (killed, stopped) if group]


def run_all(launched: list[Launch]) -> list[Launch]:
    """At the same time: most of it is waiting."""
    with ThreadPoolExecutor(len(launched)) as pool:
        return list(pool.map(Launch.run, launched))


def check(launch: Launch, number: int) -> None:
    ending = launch.endings[number]
    told = "\n".join(outcome.trace or outcome.message for outcome in launch.outcomes[:2])
    for rank in (0, 1):
        assert (number, rank) in launch.results, f"rank {rank} did not come to its end: {told}"
        result = launch.results[number, rank]
        assert result["type"] in ("PeerLostError", "TransferTimeoutError"), result
        assert result["peers"] == (VICTIM,), result
        assert not result["usable"]
        assert result["seconds"] < TIMEOUT_S + PATIENCE_S, result
        assert result["unchanged"]
        assert result["later"] == ["CommunicatorClosedError"] * 2
        assert result["close_s"] < CLOSE_S
        assert result["goes on"]
    if ending.how == signal.SIGSTOP and ending.resumes:
        assert (number, VICTIM) in launch.results, f"it did not go on: {launch.outcomes[VICTIM]}"
        result = launch.results[number, VICTIM]
        assert result["type"] in {error.__name__ for error in (TransferError, *TransferError.__subclasses__())}, result
        assert result["unchanged"]


# --- exact moments ---------------------------------------------------------------------------------------------------

# Rank 1 has to do with rank 0 only. Rank 0 has no slot left for it, since the victim does not take what is in them.
CHAIN = ((0, 1), (0, 2), (2, 0))
BOTH = (signal.SIGKILL, signal.SIGSTOP)

EXACT = [
    ending
    for how in BOTH
    for ending in (
        Ending("before ready", how, MIXED),
        Ending("while packing", how, PACKED),
        Ending("while reading", how, DIRECT, nbytes=8 << 20),
        Ending("while being read", how, DIRECT, nbytes=32 << 20),
        Ending("before done", how, PACKED),
        Ending("idle", how, MIXED),
        Ending("idle", how, MIXED, trusted=False),
        Ending("while packing", how, PACKED, pairs=CHAIN),
    )
]


def _id(ending: Ending) -> str:
    more = (", compared by all" if not ending.trusted else "") + (", in a chain" if ending.pairs == CHAIN else "")
    return ending.name + more


@pytest.fixture(scope="module")
def exact() -> dict[tuple[str, str], tuple[Launch, int]]:
    launched = run_all([launch for transport in TRANSPORTS for launch in launches(transport, EXACT)])
    return {
        (launch.transport, _id(ending)): (launch, number)
        for launch in launched
        for number, ending in enumerate(launch.endings)
    }


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("ending", EXACT, ids=_id)
def test_survivors_name_the_rank_that_ended_in_time_and_go_on_without_it(
    exact: dict[tuple[str, str], tuple[Launch, int]], ending: Ending, transport: str
) -> None:
    check(*exact[transport, _id(ending)])


def test_survivors_exit_with_0(exact: dict[tuple[str, str], tuple[Launch, int]]) -> None:
    for launch, _ in exact.values():
        assert [(o.exit_code, o.message) for o in launch.outcomes[:2]] == [(0, "")] * 2, launch.outcomes


@pytest.mark.parametrize("how", BOTH, ids=lambda how: how.name)
def test_a_read_over_tcp_that_its_source_ended_is_said_to_be_that(
    exact: dict[tuple[str, str], tuple[Launch, int]], how: signal.Signals
) -> None:
    launch, number = exact["tcp", next(_id(e) for e in EXACT if e.phase == "while being read" and e.how == how)]
    assert "read" in {launch.results[number, rank]["phase"] for rank in (0, 1)}


# --- random moments --------------------------------------------------------------------------------------------------


def _random_endings(seed: int, count: int, phases_of: list[Ending]) -> list[Ending]:
    drawn = random.Random(seed)
    return [
        replace(phases_of[number % len(phases_of)], moment_s=drawn.uniform(0.0005, 0.2), phase="at random")
        for number in range(count)
    ]


def _seed() -> int:
    seed = int(os.environ.get("EPLB_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"EPLB_TEST_SEED={seed}", file=sys.stderr)
    return seed


KINDS = [Ending("", how, config) for config in (PACKED, MIXED, DIRECT) for how in BOTH]


def test_random_moments() -> None:
    """Five over each transport; the seed is printed, and EPLB_TEST_SEED repeats it."""
    seed = _seed()
    per_transport = {
        transport: _random_endings(seed + shift, 5, KINDS[shift:] + KINDS[:shift])
        for shift, transport in enumerate(TRANSPORTS)
    }
    launched = run_all(
        [launch for transport, endings in per_transport.items() for launch in launches(transport, endings)]
    )
    for launch in launched:
        for number in range(len(launch.endings)):
            check(launch, number)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("phase", [*TRAPS, "at random"])
def test_twenty_moments_of_each_phase(phase: str, transport: str) -> None:
    """Each phase twenty times, at another of its calls each time."""
    seed = _seed()
    drawn = random.Random(seed)
    kinds = [e for e in EXACT if e.phase == phase] or KINDS
    endings = [
        replace(drawn.choice(kinds), nbytes=drawn.choice((30_000, 300_000, 3_000_000)), how=how)
        for how in BOTH
        for _ in range(10)
    ]
    if phase == "at random":
        endings = [replace(e, phase=phase, moment_s=drawn.uniform(0.0005, 0.3)) for e in endings]
    launched = [replace(launch, timeout_s=600.0) for launch in launches(transport, endings)]
    for launch in run_all(launched):
        for number in range(len(launch.endings)):
            check(launch, number)
