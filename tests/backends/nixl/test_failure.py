"""What the nixl backend does when a rank dies or stops in the middle, over shared memory and over tcp.

Two ranks live through many endings of a third one; each ending has a communicator and a victim of its own. A victim
that was stopped goes on once the others have given it up, and has to raise an error then.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from eplb_backends.nixl.agent import Agent
from eplb_backends.nixl.messages import Writer
from eplb_backends.nixl.outbox import Outbox
from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.control.groups import StatelessGroup
from eplb_core.errors import TransferError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import Outcome, RankEnvironment, collect_local_ranks
from tests.support.ranks import content, error_of

TIMEOUT_S = 2.0
PATIENCE_S = 2.0  # what a rank may need beyond the timeout to notice
CLOSE_S = 3.0
VICTIM = 2
PR_SET_PDEATHSIG = 1
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
        number: of the call that ends it; 0 takes the one in `TRAPS`. For `idle` the transfers before it.
        resumes: whether a stopped victim goes on in the end; otherwise it is killed.
    """

    phase: str
    how: signal.Signals
    config: str
    nbytes: int = 300_000
    pairs: tuple[tuple[int, int], ...] = ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1))
    trusted: bool = True
    moment_s: float = 0.0
    number: int = 0
    resumes: bool = True

    @property
    def name(self) -> str:
        mode = self.config.partition("mode=")[2].partition("&")[0] or "mixed"
        return f"{self.how.name} {self.phase}, {mode}" + (f", at {self.moment_s * 1e3:.1f} ms" if self.moment_s else "")


End = Callable[[], None]


def _on_call(owner: type, method: str, end: End, *, number: int, after: bool) -> Any:
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


TRAPS: dict[str, tuple[type, str, int, bool]] = {
    "before ready": (Outbox, "announce", 1, False),
    "while packing": (Outbox, "_fill", 4, False),
    "while reading": (Agent, "read", 1, True),
    "while being read": (Agent, "notifications", 12, False),
    "before done": (Writer, "done", 1, False),
}
"""Phase -> the call that ends it: class, method, number of the call, and whether it is made first."""


@contextlib.contextmanager
def trap(ending: Ending, end: End) -> Iterator[None]:
    """Inside the victim: let the phase of its next transfer end it."""
    if ending.phase == "idle":
        yield
    elif ending.phase == "at random":
        timer = threading.Timer(ending.moment_s, end)
        timer.start()
        yield
        timer.join()
    else:
        owner, method, number, after = TRAPS[ending.phase]
        with _on_call(owner, method, end, number=ending.number or number, after=after):
            yield


# --- what every rank does --------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """The messages of one ending, as one rank sees them."""

    ending: Ending
    rank: int
    sends: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    recvs: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    expected: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for source, destination in self.ending.pairs:
            if source == self.rank:
                self.sends.append((self._message(source, destination).clone(), destination))
            if destination == self.rank:
                self.recvs.append((torch.full_like(self._message(source, destination), 0xEE), source))

    def _message(self, source: int, destination: int) -> torch.Tensor:
        if (source, destination) not in self.expected:
            raw = content(source, destination, 0, 0, self.ending.nbytes)
            self.expected[source, destination] = torch.from_numpy(raw)
        return self.expected[source, destination]

    def queue(self, communicator: EplbCommunicator) -> None:
        for tensor, destination in self.sends:
            communicator.add_send(tensor, destination)
        for tensor, source in self.recvs:
            communicator.add_recv(tensor, source)

    def all_arrived(self) -> bool:
        return all(torch.equal(tensor, self.expected[source, self.rank]) for tensor, source in self.recvs)

    def sent_are_unchanged(self) -> bool:
        return all(torch.equal(tensor, self.expected[self.rank, destination]) for tensor, destination in self.sends)


def live_through(environment: RankEnvironment, transports: str | None, endings: list[Ending]) -> None:
    """Run all endings one after the other; rank 2 lets a child of its own be the victim of each."""
    if transports is not None:
        os.environ["UCX_TLS"] = transports
    for number, ending in enumerate(endings):
        rank, name = environment.rank, f"ending {number}"
        store = dist.PrefixStore(name, environment.store)
        if rank == VICTIM:
            result = _bury(ending, environment.store, name)
        else:
            _meet(store, rank)
            result = _survivor(ending, rank, store)
            store.set(f"given up {rank}", "")
        environment.report((number, rank, result))


def _meet(store: dist.Store, rank: int) -> None:
    store.set(f"here {rank}", "")
    store.wait([f"here {each}" for each in range(3)], datetime.timedelta(seconds=LAUNCH_S))


def _bury(ending: Ending, shared: dist.Store, name: str) -> dict[str, Any]:
    """Start the victim, see it through, and return what it said, if it could."""
    pid = os.fork()  # everything is imported already; NIXL and its threads are not there yet
    store = dist.PrefixStore(name, shared.clone())  # type: ignore[attr-defined]  # a connection of its own
    if pid == 0:
        status = 1
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            _meet(store, VICTIM)
            store.set("result", json.dumps(_victim(ending, store)))
            status = 0
        except BaseException:  # noqa: BLE001 - this process must not come back to where it was forked
            traceback.print_exc()
        finally:
            os._exit(status)
    store.wait(["given up 0", "given up 1"], datetime.timedelta(seconds=LAUNCH_S))
    if ending.how == signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT if ending.resumes else signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    result: dict[str, Any] = json.loads(store.get("result")) if store.check(["result"]) else {}
    return result | {"exit_code": os.waitstatus_to_exitcode(status)}


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
            for number in range(ROUNDS):
                if ending.phase == "idle" and number == ending.number:
                    end()
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
    timeout_s: float = LAUNCH_S
    results: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self) -> Launch:
        def take(_: int, event: tuple[int, int, dict[str, Any]]) -> None:
            number, rank, result = event
            self.results[number, rank] = result

        self.outcomes = collect_local_ranks(
            live_through, 3, (TRANSPORTS[self.transport], self.endings), timeout_s=self.timeout_s, on_event=take
        )
        return self


def run_all(endings: list[tuple[str, Ending]], timeout_s: float = LAUNCH_S) -> list[Launch]:
    """Run pairs of transport and ending, in two sets of processes for each transport: most of it is waiting."""
    launched = []
    for transport in TRANSPORTS:
        mine = [ending for each, ending in endings if each == transport]
        launched += [Launch(transport, half, timeout_s) for half in (mine[::2], mine[1::2]) if half]
    with ThreadPoolExecutor(len(launched)) as pool:
        return list(pool.map(Launch.run, launched))


def check(launch: Launch, number: int) -> None:
    ending = launch.endings[number]
    for rank in (0, 1):
        outcome = launch.outcomes[rank]
        assert (number, rank) in launch.results, (
            f"{ending}: rank {rank} did not end: {outcome.trace or outcome.message}"
        )
        result = launch.results[number, rank]
        assert result["type"] in ("PeerLostError", "TransferTimeoutError"), (ending, result)
        assert result["peers"] == (VICTIM,), (ending, result)
        assert not result["usable"]
        assert result["seconds"] < TIMEOUT_S + PATIENCE_S, (ending, result)
        assert result["unchanged"]
        assert result["later"] == ["CommunicatorClosedError"] * 2
        assert result["close_s"] < CLOSE_S
        assert result["goes on"]
    result = launch.results[number, VICTIM]
    if ending.how == signal.SIGSTOP and ending.resumes:
        assert result["exit_code"] == 0, (ending, result)
        assert result["type"] in {error.__name__ for error in (TransferError, *TransferError.__subclasses__())}, result
        assert result["unchanged"]
    else:
        assert result["exit_code"] == -signal.SIGKILL, (ending, result)


def check_all(launched: list[Launch]) -> None:
    for launch in launched:
        for number in range(len(launch.endings)):
            check(launch, number)
        assert [(outcome.exit_code, outcome.message) for outcome in launch.outcomes] == [(0, "")] * 3


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
        Ending("while being read", how, DIRECT, nbytes=16 << 20),
        Ending("before done", how, PACKED),
        Ending("idle", how, MIXED),
        Ending("idle", how, MIXED, trusted=False),
        Ending("while packing", how, PACKED, pairs=CHAIN, resumes=False),
    )
]


def _id(ending: Ending) -> str:
    more = (", compared by all" if not ending.trusted else "") + (", in a chain" if ending.pairs == CHAIN else "")
    return ending.name + more


def _by_day(transport: str) -> list[Ending]:
    """Every ending over one transport or the other; over both where the transport is what matters."""
    parity = list(TRANSPORTS).index(transport)
    return [e for at, e in enumerate(EXACT) if e.phase == "while being read" or (at // 8 + at) % 2 == parity]


KINDS = [Ending("", how, config) for config in (PACKED, MIXED, DIRECT) for how in BOTH]


def _random_endings(drawn: random.Random, count: int) -> list[Ending]:
    return [
        replace(KINDS[number % len(KINDS)], phase="at random", moment_s=drawn.uniform(0.0005, 0.2))
        for number in range(count)
    ]


def _random() -> random.Random:
    seed = int(os.environ.get("EPLB_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"EPLB_TEST_SEED={seed} repeats the random moments", file=sys.stderr)
    return random.Random(seed)


@pytest.fixture(scope="module")
def launched() -> list[Launch]:
    """The endings by day, and two at random moments over each transport."""
    drawn = _random()
    return run_all(
        [(transport, ending) for transport in TRANSPORTS for ending in _by_day(transport) + _random_endings(drawn, 2)]
    )


def _find(launched: list[Launch], transport: str, ending: Ending) -> tuple[Launch, int]:
    launch = next(each for each in launched if each.transport == transport and ending in each.endings)
    return launch, launch.endings.index(ending)


@pytest.mark.parametrize(
    ("transport", "ending"),
    [
        pytest.param(transport, ending, id=f"{_id(ending)}, {transport}")
        for transport in TRANSPORTS
        for ending in _by_day(transport)
    ],
)
def test_survivors_name_the_rank_that_ended_in_time_and_go_on_without_it(
    launched: list[Launch], ending: Ending, transport: str
) -> None:
    check(*_find(launched, transport, ending))


def test_at_random_moments_too(launched: list[Launch]) -> None:
    checked = 0
    for launch in launched:
        for number, ending in enumerate(launch.endings):
            if ending.phase == "at random":
                check(launch, number)
                checked += 1
    assert checked == 4


def test_survivors_exit_with_0(launched: list[Launch]) -> None:
    for launch in launched:
        assert [(outcome.exit_code, outcome.message) for outcome in launch.outcomes] == [(0, "")] * 3


def test_a_read_over_tcp_from_a_rank_that_stopped_is_said_to_be_that(launched: list[Launch]) -> None:
    ending = next(e for e in EXACT if e.phase == "while being read" and e.how == signal.SIGSTOP)
    launch, number = _find(launched, "tcp", ending)
    own = [launch.results[number, rank] for rank in (0, 1) if launch.results[number, rank]["type"] != "PeerLostError"]
    assert own, "nobody found out by itself"
    for result in own:
        assert result["phase"] == "read"
        assert "a READ from rank 2 did not end" in result["why"]


# --- by night --------------------------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_every_ending_over_every_transport() -> None:
    check_all(run_all([(transport, ending) for transport in TRANSPORTS for ending in EXACT], 800.0))


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", [*TRAPS, "idle", "at random"])
def test_twenty_moments_of_each_phase(phase: str) -> None:
    """Over each transport; each at another call of what ends it, with other sizes."""
    drawn = _random()
    kinds = [ending for ending in EXACT if ending.phase == phase] or KINDS
    endings = [
        replace(
            drawn.choice(kinds),
            phase=phase,
            how=how,
            number=drawn.randrange(1, 40),
            nbytes=drawn.choice((30_000, 300_000, 3_000_000)),
            moment_s=drawn.uniform(0.0005, 0.3) if phase == "at random" else 0.0,
        )
        for how in BOTH
        for _ in range(10)
    ]
    check_all(run_all([(transport, ending) for transport in TRANSPORTS for ending in endings], 800.0))
