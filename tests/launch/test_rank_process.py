"""A forked rank cannot be told from a new process: it has what its launcher has now, and never outlives it."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from eplb_core.errors import InputError
from eplb_core.launch.local_ranks import RankEnvironment, collect_local_ranks, run_local_ranks

TIMEOUT_S = 60.0


# --- what ranks may do ------------------------------------------------------------------------------------------------


def tells(environment: RankEnvironment, *names: str) -> dict[str, Any]:
    """What this rank is, and the variables of these names."""
    return {
        "parent": os.getppid(),
        "variables": [os.environ.get(name) for name in names],
        "folder": os.getcwd(),
        "path": list(sys.path),
        "argv": list(sys.argv),
        "name": multiprocessing.current_process().name,
        "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "drawn": np.random.random(),  # from the state that a fork would share
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def finds_nothing_begun(environment: RankEnvironment) -> dict[str, Any]:
    return {
        "cuda": torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork(),
        "transports": [name for name in sys.modules if name.split(".")[0] in ("nixl", "eplb_backends", "nccl")],
        "threads of the server": psutil.Process(os.getppid()).num_threads(),
        "children": psutil.Process().children(),
    }


def prints(environment: RankEnvironment) -> None:
    sys.stdout.write(f"rank {environment.rank} says this\n")  # in one piece: the ranks share it
    os.write(2, f"rank {environment.rank} complains".encode())


def prints_when_it_exits(environment: RankEnvironment) -> None:
    atexit.register(print, "the interpreter ends in order")


def launches_ranks_itself(environment: RankEnvironment) -> list[Any]:
    return [environment.rank, run_local_ranks(its_number, 2, timeout_s=TIMEOUT_S)]


def its_number(environment: RankEnvironment) -> int:
    return environment.rank


def kills_its_server(environment: RankEnvironment) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    threading.Event().wait(TIMEOUT_S)


def waits_for_ever(environment: RankEnvironment) -> None:
    environment.report(os.getpid())
    threading.Event().wait(TIMEOUT_S)


def server() -> int:
    """The process that forks the ranks of this one now."""
    return int(run_local_ranks(tells, 1, timeout_s=TIMEOUT_S)[0]["parent"])


# --- like the launcher -----------------------------------------------------------------------------------------------


def test_ranks_are_forked_by_one_server_that_is_kept() -> None:
    assert server() == server() != os.getpid()


def test_a_rank_has_the_environment_folder_path_and_arguments_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPLB_TEST_GONE", "before")
    before = server()
    monkeypatch.setenv("EPLB_TEST_SET", "now")
    monkeypatch.delenv("EPLB_TEST_GONE")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "argv", ["job", "--now"])
    (told,) = run_local_ranks(tells, 1, ("EPLB_TEST_SET", "EPLB_TEST_GONE"), timeout_s=TIMEOUT_S)
    assert told["variables"] == ["now", None]
    assert told["folder"] == str(tmp_path)
    assert told["path"] == sys.path
    assert told["argv"] == ["job", "--now"]
    assert told["name"] == "rank 0"
    assert told["parent"] == before


def test_a_variable_that_a_loaded_library_might_have_read_takes_a_new_server(monkeypatch: pytest.MonkeyPatch) -> None:
    before = server()
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    (told,) = run_local_ranks(tells, 1, ("OMP_WAIT_POLICY",), timeout_s=TIMEOUT_S)
    assert told["variables"] == ["passive"]
    assert told["parent"] != before
    assert _eventually(lambda: _gone(before))


def the_tunables_that_the_c_library_read(environment: RankEnvironment) -> str:
    started_with = Path("/proc/self/environ").read_bytes().split(b"\0")
    return next(value.decode() for value in started_with if value.startswith(b"GLIBC_TUNABLES="))


def test_ranks_copy_large_blocks_past_the_cache_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    (told,) = run_local_ranks(the_tunables_that_the_c_library_read, 1, timeout_s=TIMEOUT_S)
    assert "x86_non_temporal_threshold" in told
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=0")
    (told,) = run_local_ranks(the_tunables_that_the_c_library_read, 1, timeout_s=TIMEOUT_S)
    assert told == "GLIBC_TUNABLES=glibc.malloc.perturb=0"


def test_a_rank_writes_to_what_is_stdout_and_stderr_now(capfd: pytest.CaptureFixture[str]) -> None:
    server()
    capfd.readouterr()
    run_local_ranks(prints, 2, timeout_s=TIMEOUT_S)
    said, complained = capfd.readouterr()
    assert sorted(said.splitlines()) == ["rank 0 says this", "rank 1 says this"]
    assert "rank 0 complains" in complained
    assert "rank 1 complains" in complained


# --- like a new process ----------------------------------------------------------------------------------------------


def test_nothing_has_begun_in_a_rank() -> None:
    for found in run_local_ranks(finds_nothing_begun, 2, timeout_s=TIMEOUT_S):
        assert found == {"cuda": False, "transports": [], "threads of the server": 1, "children": []}


def test_ranks_differ_in_their_random_numbers_and_inherit_nothing_from_one_another() -> None:
    told = run_local_ranks(tells, 4, timeout_s=TIMEOUT_S)
    assert len({each["drawn"] for each in told}) == 4
    assert len({each["descriptors"] for each in told}) == 1
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as in a shell's background; children inherit that
    assert all(each["interrupt"] != ignored for each in told)


def test_a_rank_ends_as_an_interpreter_does(capfd: pytest.CaptureFixture[str]) -> None:
    run_local_ranks(prints_when_it_exits, 1, timeout_s=TIMEOUT_S)
    assert capfd.readouterr().out == "the interpreter ends in order\n"


def test_a_rank_may_launch_ranks_of_its_own() -> None:
    assert run_local_ranks(launches_ranks_itself, 1, timeout_s=TIMEOUT_S) == [[0, [0, 1]]]


def test_threads_may_launch_at_the_same_time() -> None:
    with ThreadPoolExecutor(3) as pool:
        launched = [pool.submit(run_local_ranks, its_number, 2, timeout_s=TIMEOUT_S) for _ in range(3)]
    assert [each.result() for each in launched] == [[0, 1]] * 3


def test_what_cannot_be_sent_to_a_rank_is_the_caller_s_error_and_leaves_no_process() -> None:
    before = psutil.Process(server()).children()
    with pytest.raises(TypeError, match="pickle"):
        run_local_ranks(tells, 2, (threading.Lock(),), timeout_s=TIMEOUT_S)
    assert psutil.Process(server()).children() == before == []


# --- how it ends -----------------------------------------------------------------------------------------------------


def test_ranks_end_with_their_server_and_the_next_ones_get_another() -> None:
    before = server()
    pids: list[int] = []
    killed = collect_local_ranks(kills_its_server, 2, timeout_s=TIMEOUT_S, on_start=pids.extend)
    assert [outcome.exit_code for outcome in killed] == [-signal.SIGKILL] * 2
    assert all(_eventually(lambda: _gone(pid)) for pid in pids)  # noqa: B023 - called at once
    assert server() != before


LAUNCHER = """
import os, sys
from tests.launch import test_rank_process
from eplb_core.launch.local_ranks import run_local_ranks

def main():
    print(os.getpid(), test_rank_process.server(), flush=True)
    {then}

if __name__ == "__main__":
    main()
"""
WAITING = (
    "run_local_ranks(test_rank_process.waits_for_ever, 2, timeout_s=60, on_event=lambda _, pid: print(pid, flush=True))"
)


def _launcher(then: str, tmp_path: Path) -> subprocess.Popen[str]:
    script = tmp_path / "launcher.py"
    script.write_text(LAUNCHER.format(then=then))
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)


def _gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def _eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_neither_server_nor_ranks_outlive_a_launcher_that_is_killed(tmp_path: Path) -> None:
    with _launcher(WAITING, tmp_path) as launcher:
        assert launcher.stdout is not None
        _, started = launcher.stdout.readline().split()
        ranks = [launcher.stdout.readline() for _ in range(2)]
        launcher.kill()
    for pid in map(int, (started, *ranks)):
        assert _eventually(lambda: _gone(pid))  # noqa: B023 - called at once


def test_the_server_ends_with_the_launcher_and_so_does_a_launcher_that_was_forked(tmp_path: Path) -> None:
    forked = "pid = os.fork(); print(test_rank_process.server(), flush=True); pid and os.waitpid(pid, 0)"
    with _launcher(forked, tmp_path) as launcher:
        told, _ = launcher.communicate(timeout=TIMEOUT_S)
    _, first, *later = map(int, told.split())
    assert launcher.returncode == 0
    assert len(later) == 2
    assert first in later, "the parent keeps its server"
    assert set(later) != {first}, "the forked child has one of its own"
    assert all(_gone(pid) for pid in (first, *later))


# --- without a server ------------------------------------------------------------------------------------------------


def test_ranks_can_be_new_processes_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPLB_START_METHOD", "spawn")
    assert [told["parent"] for told in run_local_ranks(tells, 1, timeout_s=TIMEOUT_S)] == [os.getpid()]


def test_ranks_are_new_processes_where_no_server_comes_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eplb_core.launch.rank_process._SERVE", "raise SystemExit('{path}{control}{launcher}')")
    monkeypatch.setenv("A_VARIABLE_THAT_TAKES_A_NEW_SERVER", "yes")
    assert [told["parent"] for told in run_local_ranks(tells, 1, timeout_s=TIMEOUT_S)] == [os.getpid()]


def test_another_way_to_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPLB_START_METHOD", "fork")
    with pytest.raises(InputError, match="EPLB_START_METHOD is 'fork'"):
        run_local_ranks(tells, 1, timeout_s=TIMEOUT_S)
