"""Nothing is left over by hundreds of transfers, by making and closing communicators, or by leaving without closing."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from eplb_backends.nixl.agent import Agent
from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.control.groups import StatelessGroup
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import Outcome, RankEnvironment, collect_local_ranks
from tests.support.ranks import Member, Report, Scenario, error_of, exchange, ring, run_scenarios

RANKS = 3
EXECUTES = 250  # by night four times as many
CYCLES = 20
MIB = 1 << 20


@dataclass(frozen=True)
class Usage:
    """What this process holds."""

    rss: int
    descriptors: int
    threads: int
    shared: int  # mappings of shared memory

    @classmethod
    def now(cls) -> Usage:
        gc.collect()
        mappings = Path("/proc/self/maps").read_text().splitlines()
        return cls(
            psutil.Process().memory_info().rss,
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
            sum("/dev/shm" in line or "/SYSV" in line for line in mappings),
        )

    def without_rss(self) -> tuple[int, int, int]:
        return self.descriptors, self.threads, self.shared


def executing(member: Member, config: str, times: int) -> tuple[Usage, Usage, float]:
    after, before = (member.rank + 1) % RANKS, (member.rank - 1) % RANKS
    small, landing = torch.ones(100), torch.zeros(100)
    large, far = torch.ones(50_000), torch.zeros(50_000)
    with member.communicator(config) as communicator:
        communicator.register([small, large])
        if "mode=direct" in config:  # by number, from prepared lists
            communicator.register([landing, far], landing=True)
        communicator.trust_matching(True)

        def execute(count: int) -> None:
            for _ in range(count):
                for tensor in (small, large):
                    communicator.add_send(tensor, after)
                for tensor in (landing, far):
                    communicator.add_recv(tensor, before)
                communicator.execute()

        execute(times // 5)
        first = Usage.now()
        began = time.monotonic()
        execute(times)
        return first, Usage.now(), time.monotonic() - began


def making_and_closing(member: Member) -> list[Usage]:
    usages = []
    for _ in range(CYCLES):
        with member.communicator("nixl?window=1MiB") as communicator:
            exchange(member, communicator, ring(RANKS, 100_000))
        usages.append(Usage.now())
    return usages


TIMES = {
    "nixl?window=1MiB": EXECUTES,
    "nixl?mode=direct&window=1MiB": EXECUTES,
    "nixl?mode=packed&window=1MiB&verify=full": EXECUTES // 5,
}


@pytest.fixture(scope="module")
def report() -> Report:
    return run_scenarios(
        RANKS,
        [
            *(Scenario(config, executing, (config, times)) for config, times in TIMES.items()),
            Scenario("making and closing", making_and_closing),
        ],
    )


def check_leaves_nothing(report: Report, config: str) -> None:
    for first, last, seconds in report.returned(config):
        assert last.without_rss() == first.without_rss()
        assert last.rss - first.rss < 4 * MIB
        assert seconds < 30


@pytest.mark.parametrize("config", TIMES)
def test_hundreds_of_transfers_leave_nothing(report: Report, config: str) -> None:
    check_leaves_nothing(report, config)


@pytest.mark.nightly
@pytest.mark.parametrize("config", TIMES)
def test_a_thousand_transfers_leave_nothing(config: str) -> None:
    check_leaves_nothing(run_scenarios(RANKS, [Scenario(config, executing, (config, 4 * TIMES[config]))]), config)


def test_a_closed_communicator_holds_nothing(report: Report) -> None:
    for usages in report.returned("making and closing"):
        settled, last = usages[4], usages[-1]
        assert last.without_rss() == settled.without_rss()
        assert last.rss - settled.rss < (CYCLES - 5) * MIB


# --- leaving while a READ is in flight -------------------------------------------------------------------------------

KEPT: list[EplbCommunicator] = []


def leaves_with_a_read_in_flight(environment: RankEnvironment, progress: str, closes: bool) -> dict[str, Any]:
    """Rank 0 stops rank 1 while it reads from it over tcp, gives it up, and leaves."""
    os.environ["UCX_TLS"] = "tcp,self"
    store = environment.store
    group = StatelessGroup(environment.rank, 2, dist.PrefixStore("group", store))
    communicator = create_eplb_communicator(group, f"nixl?mode=direct&window=1MiB&timeout=2s&progress={progress}")
    KEPT.append(communicator)
    tensor = torch.zeros(64 * MIB, dtype=torch.uint8)
    communicator.register([tensor], landing=True)
    communicator.trust_matching(True)
    if environment.rank == 1:
        store.set("pid", str(os.getpid()))
        communicator.add_send(tensor, 0)
    else:
        pid = int(store.get("pid"))
        communicator.add_recv(tensor, 1)
        read = Agent.read

        def read_and_stop(*arguments: Any) -> Any:
            posted = read(*arguments)
            os.kill(pid, signal.SIGSTOP)
            return posted

        Agent.read = read_and_stop  # type: ignore[method-assign]
    error = error_of(communicator.execute)
    if closes:
        communicator.close()
    return error


def _leave(progress: str, closes: bool) -> list[Outcome]:
    def see_through(pids: list[int]) -> None:
        reader = psutil.Process(pids[0])
        while time.monotonic() < deadline:
            try:
                if reader.status() == psutil.STATUS_ZOMBIE:
                    break
            except psutil.NoSuchProcess:
                break
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[1], signal.SIGCONT)

    def watch(pids: list[int]) -> None:
        threading.Thread(target=see_through, args=(pids,)).start()

    deadline = time.monotonic() + 40
    return collect_local_ranks(leaves_with_a_read_in_flight, 2, (progress, closes), timeout_s=60, on_start=watch)


UCX_ABORTS = re.compile(r"^\[[^]]+\] +ucp_request\.inl:\d+ +Fatal: unexpected error: Endpoint timeout$", re.MULTILINE)
"""How UCX may end a source whose reader left while it was stopped: a race inside UCX, which no caller can prevent."""


@pytest.mark.parametrize("closes", [False, True], ids=["without closing", "after closing"])
def test_who_leaves_while_it_reads_exits_with_0_and_its_source_gets_an_error_unless_ucx_aborts_it(
    closes: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda progress: _leave(progress, closes), ("off", "on")))
    printed = capfd.readouterr().err
    aborted = 0
    for reader, source in both:
        assert reader.succeeded, (reader, printed)
        assert (reader.result["type"], reader.result["peers"]) == ("TransferTimeoutError", (1,))
        if source.exit_code == -signal.SIGABRT:
            aborted += 1
            continue
        assert source.succeeded, (source, printed)
        assert source.result["type"] in ("TransferError", "TransferTimeoutError", "PeerLostError"), source
        assert source.result["peers"] == (0,)
    assert printed.count("in flight when the communicator was closed") == 2
    assert len(UCX_ABORTS.findall(printed)) == aborted, printed
    for word in ("Traceback", "Assertion", "Fatal", "Exception ignored"):
        assert word not in UCX_ABORTS.sub("", printed)
