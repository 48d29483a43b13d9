"""Local ranks are started, heard, and ended, whatever they do."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from eplb_core.errors import InputError
from eplb_core.launch.local_ranks import LocalRankError, Outcome, RankEnvironment, collect_local_ranks, run_local_ranks
from eplb_core.launch.rank_devices import VISIBLE_GPUS_VARIABLE, limit_visible_gpus, own_gpus, rank_device

TIMEOUT_S = 60.0
SHORT_S = 2.5  # enough for a forked process to come up


# --- what ranks may do ------------------------------------------------------------------------------------------------


def returns(environment: RankEnvironment, factor: int) -> tuple[int, int, int, int]:
    key = "arrived"
    environment.store.add(key, 1)
    return (environment.rank * factor, environment.world_size, environment.local_rank, environment.local_world_size)


def reports(environment: RankEnvironment) -> None:
    for number in range(3):
        environment.report({"number": number})


def raises(environment: RankEnvironment) -> str:
    if environment.rank == 1:
        raise ValueError("no such expert")
    return "well"


def raises_while_others_wait(environment: RankEnvironment) -> None:
    if environment.rank == 1:
        raise ValueError("no such expert")
    threading.Event().wait(TIMEOUT_S)


def each_ends_in_its_own_way(environment: RankEnvironment) -> Any:
    match environment.rank:
        case 0:
            return "well"
        case 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case 2:
            os._exit(0)
        case 3:
            sys.exit(3)
        case 4:
            return threading.Lock()  # cannot be sent
    return None


def dies_after_its_result(environment: RankEnvironment) -> str:
    """As a library whose destructor crashes: the interpreter has ended, the process has not."""
    if environment.rank:
        atexit.register(os.kill, os.getpid(), signal.SIGSEGV if environment.rank == 1 else signal.SIGRTMIN)
    return "well"


def exits_with_3_after_its_result(environment: RankEnvironment) -> str:
    if environment.rank == 1:
        atexit.register(os._exit, 3)
    return "well"


def is_killed(environment: RankEnvironment) -> str:
    if environment.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return "well"


def hangs(environment: RankEnvironment) -> str:
    if environment.rank == 1:
        waiting_for_something_that_never_comes()
    return "well"


def waiting_for_something_that_never_comes() -> None:
    threading.Event().wait(TIMEOUT_S)


def does_not_exit(environment: RankEnvironment) -> str:
    if environment.rank == 0:
        threading.Thread(target=waiting_for_something_that_never_comes).start()
    return "well"


# --- the tests -------------------------------------------------------------------------------------------------------


class Watched:
    """Starts ranks and remembers their processes."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def collect(self, target: Any, num_ranks: int = 2, *, timeout_s: float = TIMEOUT_S, **more: Any) -> list[Outcome]:
        return collect_local_ranks(target, num_ranks, timeout_s=timeout_s, on_start=self.pids.extend, **more)


@pytest.fixture
def watched() -> Any:
    """Starts ranks; afterwards none of them is left."""
    ranks = Watched()
    yield ranks
    assert ranks.pids
    assert not [pid for pid in ranks.pids if psutil.pid_exists(pid)]


def test_local_ranks_meet_where_only_this_machine_can_connect(watched: Watched) -> None:
    own = psutil.Process()
    before = {each.laddr for each in own.net_connections("inet") if each.status == psutil.CONN_LISTEN}
    seen: list[tuple[str, int]] = []

    def look(rank: int, event: object) -> None:
        seen.extend(each.laddr for each in own.net_connections("inet") if each.status == psutil.CONN_LISTEN)

    watched.collect(reports, on_event=look)
    opened = {address for address in seen if address not in before}
    assert opened
    assert {ip for ip, _ in opened} == {"127.0.0.1"}


def test_results_come_in_rank_order() -> None:
    assert run_local_ranks(returns, 3, (10,), timeout_s=TIMEOUT_S) == [(0, 3, 0, 3), (10, 3, 1, 3), (20, 3, 2, 3)]


def test_events_arrive_in_the_order_in_which_each_rank_sent_them(watched: Watched) -> None:
    events: list[tuple[int, Any]] = []
    watched.collect(reports, on_event=lambda rank, event: events.append((rank, event)))
    for rank in range(2):
        assert [event for source, event in events if source == rank] == [{"number": n} for n in range(3)]


def test_a_rank_that_raises_is_named_with_its_traceback() -> None:
    with pytest.raises(LocalRankError, match="rank 1 failed with ValueError") as error:
        run_local_ranks(raises, 2, timeout_s=TIMEOUT_S)
    assert error.value.rank == 1
    assert "in raises" in str(error.value)
    assert "no such expert" in str(error.value)


def test_the_others_are_ended_soon_after_a_rank_has_failed(watched: Watched) -> None:
    waiting, failed = watched.collect(raises_while_others_wait, grace_s=0.2)
    assert (failed.error, failed.message) == ("ValueError", "no such expert")
    assert not waiting.succeeded
    assert waiting.message == "terminated because another rank failed"


@pytest.fixture(scope="module")
def ended() -> list[Outcome]:
    """Five ranks, of which only the first ends as it should."""
    return collect_local_ranks(each_ends_in_its_own_way, 5, timeout_s=TIMEOUT_S, grace_s=20)


def test_a_rank_that_ends_well_is_told_from_those_that_do_not(ended: list[Outcome]) -> None:
    assert [outcome.succeeded for outcome in ended] == [True, False, False, False, False]
    assert (ended[0].result, ended[0].exit_code) == ("well", 0)


def test_a_rank_that_was_killed_tells_the_signal(ended: list[Outcome]) -> None:
    assert (ended[1].exit_code, ended[1].reported) == (-signal.SIGKILL, False)
    assert "was killed by SIGKILL (signal 9)" in ended[1].message
    assert "memory" in ended[1].message


def test_a_rank_that_exits_without_a_word_has_failed(ended: list[Outcome]) -> None:
    assert (ended[2].exit_code, ended[2].reported) == (0, False)
    assert ended[2].message == "its process exited with code 0 and reported nothing"


def test_a_signal_after_the_result_is_a_warning_that_names_it(caplog: pytest.LogCaptureFixture) -> None:
    assert run_local_ranks(dies_after_its_result, 3, timeout_s=TIMEOUT_S) == ["well"] * 3
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 2
    assert "rank 1: its process was killed by SIGSEGV (signal 11) after handing over its result" in warned
    assert f"(signal {int(signal.SIGRTMIN)})" in " ".join(warned)


def test_an_exit_code_after_the_result_is_an_error_that_tells_it() -> None:
    well, failed = collect_local_ranks(exits_with_3_after_its_result, 2, timeout_s=TIMEOUT_S)
    assert well.succeeded
    assert not failed.succeeded
    assert failed.message == "its process exited with code 3 after handing over its result"


def test_a_rank_that_calls_exit_has_failed(ended: list[Outcome]) -> None:
    assert (ended[3].error, ended[3].message) == ("SystemExit", "3")


def test_a_result_that_cannot_be_sent_is_an_error_and_no_hang(ended: list[Outcome]) -> None:
    assert ended[4].error == "TypeError"
    assert "pickle" in ended[4].message


def test_the_rank_that_was_killed_is_the_one_that_is_named() -> None:
    with pytest.raises(LocalRankError, match="rank 0 failed") as error:
        run_local_ranks(is_killed, 2, timeout_s=TIMEOUT_S)
    assert error.value.rank == 0
    assert "-9" in str(error.value) or "SIGKILL" in str(error.value)


def test_a_rank_that_hangs_is_ended_at_the_deadline_and_shows_where_it_hung(
    watched: Watched, capfd: pytest.CaptureFixture[str]
) -> None:
    well, hung = watched.collect(hangs, timeout_s=SHORT_S)
    assert well.succeeded
    assert (hung.exit_code, hung.reported) == (None, False)
    assert f"did not end within {SHORT_S:g} s" in hung.message
    assert "waiting_for_something_that_never_comes" in capfd.readouterr().err


def test_a_rank_that_reported_but_does_not_exit_is_ended_and_has_failed(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eplb_core.launch.local_ranks._JOIN_S", 1.0)
    stuck, well = watched.collect(does_not_exit)
    assert well.succeeded
    assert (stuck.result, stuck.succeeded) == ("well", False)
    assert "did not exit" in stuck.message


def test_the_ranks_do_not_outlive_an_error_of_the_caller() -> None:
    pids: list[int] = []

    def complain(rank: int, event: Any) -> None:
        raise RuntimeError("the caller's own fault")

    with pytest.raises(RuntimeError, match="the caller's own fault"):
        collect_local_ranks(reports, 2, timeout_s=TIMEOUT_S, on_event=complain, on_start=pids.extend)
    assert len(pids) == 2
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_torchrun_s_environment_has_to_be_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match="WORLD_SIZE"):
        RankEnvironment.from_torchrun()


def test_nothing_is_left_open_in_this_process() -> None:
    open_before = set(os.listdir("/proc/self/fd"))
    run_local_ranks(returns, 2, (1,), timeout_s=TIMEOUT_S)
    assert len(set(os.listdir("/proc/self/fd")) - open_before) <= 1
    assert not [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]


# --- what ranks see of the GPUs --------------------------------------------------------------------------------------


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that counts its GPUs as NVML does: as CUDA_VISIBLE_DEVICES stands now."""

    def count() -> int:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return 4 if visible is None else len(visible.split(","))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", count)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("choice", "given", "rank", "seen", "own_first"),
    [
        ("", None, 1, None, False),
        ("all", "2,3", 1, "2,3", False),
        ("own", None, 1, "1", True),
        ("own", "GPU-a,GPU-b", 1, "GPU-b", True),
        ("own", "2,3", 2, "2", True),
        ("own_first", None, 0, "0,3,2,1", True),
        ("own_first", "0,1", 0, "0,1", True),
        ("own_first", "0,1", 1, "1,0", True),
    ],
)
def test_a_rank_sees_the_gpus_that_it_is_to_see(
    monkeypatch: pytest.MonkeyPatch, choice: str, given: str | None, rank: int, seen: str | None, own_first: bool
) -> None:
    monkeypatch.setenv(VISIBLE_GPUS_VARIABLE, choice)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert limit_visible_gpus(rank) is own_first
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen


@pytest.mark.usefixtures("four_gpus")
def test_another_choice_of_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE_GPUS_VARIABLE, "mine")
    with pytest.raises(InputError, match=f"{VISIBLE_GPUS_VARIABLE} is 'mine'"):
        limit_visible_gpus(0)


def test_gpus_that_were_counted_before_are_not_silently_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE_GPUS_VARIABLE, "own")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="has no effect"):
        limit_visible_gpus(0)


def test_a_rank_whose_own_gpu_is_the_first_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    store = dist.HashStore()
    used = [
        rank_device("cuda", RankEnvironment(rank, 4, rank, 4, store, own_gpu_first=first))
        for first in (False, True)
        for rank in range(4)
    ]
    assert [device.index for device in used] == [0, 1, 0, 1, 0, 0, 0, 0]
    assert current == used


def test_ranks_have_gpus_of_their_own_if_no_two_use_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, expected in ((["a", "b", "c"], True), (["a", "b", "a"], False)):
        store = dist.HashStore()
        environments = [RankEnvironment(rank, 3, rank, 3, store) for rank in range(3)]
        with ThreadPoolExecutor(3) as ranks:
            monkeypatch.setattr(
                torch.cuda, "get_device_properties", lambda device, gpus=gpus: SimpleNamespace(uuid=gpus[device.index])
            )
            found = ranks.map(lambda each: own_gpus(each, torch.device("cuda", each.rank), TIMEOUT_S), environments)
            assert list(found) == [expected] * 3
    cpu = RankEnvironment(0, 1, 0, 1, dist.HashStore())
    assert not own_gpus(cpu, torch.device("cpu"), TIMEOUT_S)
