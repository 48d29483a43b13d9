"""Background jobs that a rank leaves or dies in: every other rank hears of it in time, and of the right rank."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_core import errors
from eplb_core.control.groups import StatelessGroup
from eplb_core.errors import EplbError, TransferError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import Outcome, RankEnvironment, collect_local_ranks
from eplb_core.rearrange.job import RearrangeJob
from eplb_core.rearrange.rearranger import Rearranger
from eplb_core.rearrange.step_runner import StepRunner

TIMEOUT_S = 4.0
LIMIT_S = 60.0  # for a busy machine; far below commit_timeout_s, which would be waited for otherwise
NEVER_S = 3600.0
ROW = 50_000
RANKS = 3
BACKENDS = ("torch_gloo", "nixl?window=4MiB")


def begin(environment: RankEnvironment, config: str, old: Any, new: Any, **more: Any) -> tuple[Any, Rearranger, Any]:
    """Return a communicator, a rearranger with two slots of 50 kB a rank, and a function that starts a job."""
    from eplb_core.control.groups import TorchGroups

    environment.init_process_group()
    joined = "&" if "?" in config else "?"
    mine = old[:, 2 * environment.rank : 2 * environment.rank + 2]
    weights = [
        [torch.stack([torch.full((ROW,), expert, dtype=torch.uint8) for expert in layer])] for layer in mine.tolist()
    ]
    communicator = create_eplb_communicator(TorchGroups(), f"{config}{joined}timeout={TIMEOUT_S:g}s", weights[0])
    rearranger = Rearranger(communicator, weights)
    environment.store.add("ready", 1)
    environment.store.wait(["ready"])

    def start() -> RearrangeJob:
        return rearranger.start(old, new, commit_timeout_s=NEVER_S, **more)

    return communicator, rearranger, start


def outcome_of(call: Any) -> dict[str, Any]:
    began = time.monotonic()
    try:
        result = call()
    except EplbError as error:
        return {
            "error": type(error).__name__,
            "text": str(error),
            "peers": getattr(error, "peers", ()),
            "seconds": time.monotonic() - began,
            "placement": getattr(error, "placement", None),
        }
    return {"error": "", "result": result, "seconds": time.monotonic() - began}


OLD = np.arange(6).reshape(1, 6).repeat(6, axis=0)
ROUND = np.roll(OLD, 2, axis=1)
BETWEEN_1_AND_2 = OLD[:, [0, 1, 4, 5, 2, 3]]


def one_rank_leaves(environment: RankEnvironment, config: str) -> dict[str, Any]:
    """Rank 1's engine raises, which closes its communicator; it commits nothing before."""
    communicator, rearranger, start = begin(environment, config, OLD, ROUND, max_inflight_layers=1)
    job = start()
    if environment.rank == 1:
        try:
            with communicator:
                while not (job.ready_layers() or job.received):
                    time.sleep(0.001)
                raise ZeroDivisionError
        except ZeroDivisionError:
            told = outcome_of(job.wait)
    else:
        told = outcome_of(job.wait)
        communicator.close()
    return told | {"holds": rearranger.placement, "ready": job.ready_layers()}


@pytest.mark.parametrize("config", BACKENDS)
def test_where_one_rank_closes_its_communicator_the_others_do_not_wait_for_its_commits(config: str) -> None:
    told = [outcome.result for outcome in ended(one_rank_leaves, config)]
    for rank, one in enumerate(told):
        assert one["error"] == "TransferError", one
        assert "rank 1 closed its communicator while a background job was under way" in one["text"]
        assert one["peers"] == (() if rank == 1 else (1,))
        assert one["ready"] == []
        assert one["seconds"] < LIMIT_S
        assert np.array_equal(one["placement"], told[0]["placement"])
        assert np.array_equal(one["holds"], told[0]["placement"])


def one_rank_leaves_when_all_is_received(environment: RankEnvironment, config: str) -> dict[str, Any]:
    communicator, rearranger, start = begin(environment, config, OLD, ROUND, max_inflight_layers=len(OLD))
    job = start()
    while not job.received:
        time.sleep(0.001)
    if environment.rank == 1:
        communicator.close()
        environment.store.set("closed", "yes")
    environment.store.wait(["closed"])
    told = outcome_of(lambda: job.commit(0)) if environment.rank == 0 else {"error": "TransferError"}
    told["waited"] = outcome_of(job.wait)
    communicator.close()
    return told | {"holds": rearranger.placement}


def test_what_a_rank_left_uncommitted_is_committed_by_nobody_and_is_an_error_on_all() -> None:
    told = [outcome.result for outcome in ended(one_rank_leaves_when_all_is_received, BACKENDS[0])]
    for one in told:
        assert (one["error"], one["waited"]["error"]) == ("TransferError", "TransferError"), one
        assert "rank 1 closed its communicator" in one["waited"]["text"]
        assert np.array_equal(one["holds"], OLD)


def one_rank_dies(environment: RankEnvironment, config: str, pace: str | None) -> dict[str, Any]:
    """Ranks 1 and 2 exchange experts, rank 0 has nothing to do; rank 2 dies when it should send."""
    _, _, start = begin(environment, config, OLD, BETWEEN_1_AND_2, pace=pace)
    if environment.rank == 2:

        def die(*arguments: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        StepRunner.transfer_slices = die  # type: ignore[method-assign, assignment]
    return outcome_of(start().wait)


@pytest.mark.parametrize("pace", ["100kB/s", "20GB/s", None])
@pytest.mark.parametrize("config", BACKENDS)
def test_a_bystander_blames_the_rank_that_died_and_nobody_else(config: str, pace: str | None) -> None:
    bystander, peer, _ = ended(one_rank_dies, config, pace)
    for outcome in (bystander, peer):
        assert outcome.result is not None, outcome.message
        assert outcome.result["peers"] == (2,), outcome.result
        assert outcome.result["seconds"] < LIMIT_S


def one_rank_dies_in_a_run(environment: RankEnvironment, config: str) -> dict[str, Any]:
    """As above, without a job."""
    _, rearranger, _ = begin(environment, config, OLD, BETWEEN_1_AND_2)
    rearranger.run(OLD, OLD)
    if environment.rank == 2:

        def die(*arguments: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        StepRunner.transfer = die  # type: ignore[method-assign, assignment]
    return outcome_of(lambda: rearranger.run(OLD, BETWEEN_1_AND_2))


@pytest.mark.parametrize("config", BACKENDS)
def test_a_bystander_of_a_run_blames_the_rank_that_died_and_nobody_else(config: str) -> None:
    bystander, peer, _ = ended(one_rank_dies_in_a_run, config)
    for outcome in (bystander, peer):
        assert outcome.result is not None, outcome.message
        assert outcome.result["peers"] == (2,), outcome.result
        assert outcome.result["seconds"] < LIMIT_S


def one_rank_stops(environment: RankEnvironment, config: str) -> dict[str, Any]:
    """Rank 1's process stops, with a layer that it has not committed, and goes on once the others have failed."""
    _, rearranger, start = begin(environment, config, OLD, ROUND, max_inflight_layers=1)
    job = start()
    store = environment.store
    if environment.rank == 1:
        store.set("pid", str(os.getpid()))
        while not (job.ready_layers() or job.received):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGSTOP)
    told = outcome_of(job.wait)
    if environment.rank != 1 and store.add("failed", 1) == environment.world_size - 1:
        os.kill(int(store.get("pid")), signal.SIGCONT)
    return told | {"holds": rearranger.placement}


@pytest.mark.parametrize("config", BACKENDS)
def test_a_rank_that_shows_no_sign_of_life_beside_a_job_is_an_error_on_all_with_one_placement(config: str) -> None:
    told = [outcome.result for outcome in ended(one_rank_stops, config)]
    for rank, one in enumerate(told):
        assert issubclass(getattr(errors, one["error"]), TransferError), one
        assert one["peers"] == (1,) or rank == 1, one
        assert one["seconds"] < LIMIT_S
        assert np.array_equal(one["placement"], told[0]["placement"])
        assert np.array_equal(one["holds"], told[0]["placement"])


def leaves_without_waiting(environment: RankEnvironment, config: str) -> dict[str, Any]:
    """Rank 1's script ends in the middle of a job."""
    _, _, start = begin(environment, config, OLD, ROUND, max_inflight_layers=1)
    job = start()
    return {} if environment.rank == 1 else outcome_of(job.wait)


@pytest.mark.parametrize("config", BACKENDS)
def test_a_process_that_ends_beside_a_job_exits_in_order_and_tells_the_others(config: str) -> None:
    first, leaver, last = ended(leaves_without_waiting, config)
    assert leaver.exit_code == 0
    for outcome in (first, last):
        # Which of them depends on where the others are: in a transfer they notice by themselves.
        assert outcome.result["error"] in ("TransferError", "PeerLostError", "TransferTimeoutError"), outcome.result
        assert outcome.result["peers"] == (1,)
        assert outcome.result["seconds"] < LIMIT_S


def ended(target: Any, *arguments: Any) -> list[Outcome]:
    outcomes = collect_local_ranks(target, RANKS, arguments, timeout_s=100.0, grace_s=90.0)
    for outcome in outcomes:
        assert outcome.error is None, outcome.trace
    return outcomes


ALONE = """
import multiprocessing, sys
import numpy as np, torch, torch.distributed as dist
from eplb_core import Rearranger, StatelessGroup, create_eplb_communicator

def engine():
    global job
    old = np.arange(4).reshape(1, 4)
    weights = [[torch.zeros(4, 100)]]
    communicator = create_eplb_communicator(StatelessGroup(0, 1, dist.HashStore()), "nixl?window=1MiB", weights[0])
    job = Rearranger(communicator, weights).start(old, old[:, ::-1].copy())

"""
IN_A_CHILD = """
if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=engine)
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""


@pytest.mark.parametrize(
    "where", ["engine()", IN_A_CHILD, "engine()\nraise SystemExit(0)"], ids=["script", "child", "exit"]
)
def test_a_script_that_ends_beside_a_job_warns_and_exits_with_0(where: str) -> None:
    script = [sys.executable, "-c", ALONE + where]
    done = subprocess.run(script, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "a background job was not waited for" in done.stderr


def test_an_interrupt_beside_a_job_is_told_as_itself_and_ends_the_process_in_order() -> None:
    script = [sys.executable, "-c", ALONE + "engine()\nraise KeyboardInterrupt"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert "a background job was not waited for" in done.stderr
    assert "KeyboardInterrupt" in done.stderr


def test_a_job_that_an_engine_has_dropped_is_an_error_on_the_others() -> None:
    """As an exception in the engine that somebody above it catches: the objects are gone, the process goes on."""
    store = dist.HashStore()
    old = np.tile(np.arange(4), (6, 1))
    new = np.roll(old, 2, axis=1)

    def work(rank: int) -> str:
        weights = [[torch.zeros(2, 1000)] for _ in old]
        with create_eplb_communicator(StatelessGroup(rank, 2, store), "nixl?window=1MiB", weights[0]) as communicator:
            rearranger = Rearranger(communicator, weights)
            job = rearranger.start(old, new, max_inflight_layers=1, commit_timeout_s=NEVER_S)
            if rank == 1:
                del job, rearranger
                gc.collect()
                rank_0.result(100)
                return ""
            with pytest.raises(TransferError) as error:
                job.wait()
            return str(error.value)

    with ThreadPoolExecutor(2) as threads:
        rank_0 = threads.submit(work, 0)
        threads.submit(work, 1).result(100)
        assert "rank 1 dropped a background job that had not ended" in rank_0.result(100)
