"""Experts that move beside inference: live weights change only where the engine commits, and always as a whole."""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import pytest
import torch

from eplb_core.arrays import IntArray
from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.rearrange.rearranger import Rearranger
from tests.rearrange.test_rearrange import SLOTS, Weights, fill, mixed_layers, random_placement, wrong_slots
from tests.support.ranks import Member, Report, Scenario, error_of, run_scenarios

BACKENDS = ("torch_gloo?timeout=20s", "nixl?window=1MiB&timeout=20s")
ONE_EXPERT = 40_192


def _begin(member: Member, seed: int) -> tuple[Weights, IntArray, IntArray]:
    rng = np.random.default_rng(seed)
    weights = mixed_layers(member.device)
    old, new = (random_placement(rng, len(weights), member.world_size) for _ in range(2))
    fill(weights, old, member.rank)
    return weights, old, new


def _snapshot(weights: Weights) -> list[torch.Tensor]:
    return [tensor.detach().contiguous().view(torch.uint8).clone() for layer in weights for tensor in layer]


def _wait_for(done: Any) -> None:
    deadline = time.monotonic() + 20
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen")
        time.sleep(0.001)


def commits_where_it_likes(member: Member, config: str, window: int | None) -> dict[str, Any]:
    """Commit layers between "batches", ranks at different moments; compare all slots with the routing each time."""
    weights, old, new = _begin(member, 4)
    wrong, commits = [], 0
    chance = np.random.default_rng(member.rank)
    with member.communicator(config, weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights, window_bytes=window)
        job = rearranger.start(old, new)
        while not job.received:
            time.sleep(chance.uniform(0, 0.002))
            for layer in chance.permutation(job.ready_layers()).tolist():
                row = job.commit(layer)
                commits += 1
                wrong += wrong_slots(weights, job.placement, member.rank)
                assert np.array_equal(row, job.placement[layer])
        result = job.wait(20)
        assert job.wait() is result
        again = rearranger.run(new, old)
        return {
            "wrong": wrong + wrong_slots(weights, again.placement, member.rank),
            "reached": np.array_equal(result.placement, new),
            "progress": job.progress[0] == job.progress[1] > 0,
            "steps": result.steps,
            "commits": commits,
            "ended": job.ended and not result.cancelled,
        }


def touches_nothing_before(member: Member, config: str) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    weights = [[torch.zeros(SLOTS, 3001), torch.zeros(SLOTS, 9, dtype=torch.float16)] for _ in range(4)]
    old, new = (random_placement(rng, len(weights), member.world_size) for _ in range(2))
    fill(weights, old, member.rank)
    before = _snapshot(weights)
    with member.communicator(config, weights[0]) as communicator:
        job = Rearranger(communicator, weights).start(old, new, max_inflight_layers=len(weights))
        _wait_for(lambda: job.received)
        untouched = all(map(torch.equal, before, _snapshot(weights)))
        ready, placement = job.ready_layers(), job.placement
        error = error_of(lambda: job.commit(99))
        result = job.wait(20)
    return {
        "untouched": untouched,
        "ready": ready == sorted(np.flatnonzero((old != new).any(axis=1)).tolist()),
        "still_old": np.array_equal(placement, old),
        "refused": error["type"],
        "wrong": wrong_slots(weights, new, member.rank),
        "reached": np.array_equal(result.placement, new),
    }


def holds_no_more_than_allowed(member: Member, config: str) -> tuple[int, int]:
    """Return how many layers are ready at most when nobody commits, and how many could be."""
    weights, old, new = _begin(member, 6)
    with member.communicator(config, weights[0]) as communicator:
        job = Rearranger(communicator, weights).start(old, new, max_inflight_layers=2)
        _wait_for(lambda: len(job.ready_layers()) == 2)
        time.sleep(0.2)  # nothing more may come
        most = len(job.ready_layers())
        job.wait(20)
    return most, int((old != new).any(axis=1).sum())


def one_rank_cancels(member: Member, config: str) -> dict[str, Any]:
    weights = [[torch.zeros(SLOTS, 10_001)] for _ in range(24)]
    old = np.tile(np.arange(SLOTS * member.world_size), (len(weights), 1))
    new = np.roll(old, SLOTS, axis=1)
    fill(weights, old, member.rank)
    with member.communicator(config, weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights, window_bytes=2 * 40_192)
        job = rearranger.start(old, new, pace="500kB/s")  # some seconds, if nobody cancels
        while job.progress[0] < 100_000:
            for layer in job.ready_layers():
                job.commit(layer)
            time.sleep(0.001)
        began = time.monotonic()
        if member.rank == 1:
            job.cancel()
        _wait_for(lambda: job.received)
        seconds = time.monotonic() - began
        result = job.wait(20)
        middle = wrong_slots(weights, result.placement, member.rank)
        following = rearranger.run(result.placement, new)
    return {
        "seconds": seconds,
        "cancelled": result.cancelled,
        "placement": result.placement.tobytes(),
        "wrong": middle + wrong_slots(weights, following.placement, member.rank),
        "reached": np.array_equal(following.placement, new),
    }


def keeps_its_pace(member: Member, config: str) -> float:
    """Return the bytes a second that the rank that receives most has received over one second, of those allowed."""
    rate, row = 2.4e6, 300_003
    weights = [[torch.full((4, row), member.rank, dtype=torch.uint8)] for _ in range(4)]
    slots = 4 * member.world_size
    old = np.tile(np.arange(slots), (4, 1))
    with member.communicator(config, weights[0]) as communicator:
        job = Rearranger(communicator, weights).start(old, np.roll(old, 4, axis=1), pace=rate)
        _wait_for(lambda: job.progress[0] > 0)
        began, first = time.monotonic(), job.progress[0]
        while time.monotonic() - began < 1:
            for layer in job.ready_layers():
                job.commit(layer)
            time.sleep(0.001)
        moved, seconds = job.progress[0] - first, time.monotonic() - began
        job.wait(20)
    return moved / seconds / rate


def is_waited_for_in_vain(member: Member) -> dict[str, Any]:
    weights, old, new = _begin(member, 8)
    with member.communicator(BACKENDS[0], weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights)
        job = rearranger.start(old, new, pace="400kB/s")
        late = error_of(lambda: job.wait(0.05))
        beside = error_of(lambda: rearranger.run(old, new))
        second = error_of(lambda: rearranger.start(old, new))
        job.cancel()
        job.wait(20)
        return {"late": late["type"], "beside": beside["type"], "second": second["type"], "ended": job.ended}


def never_commits(member: Member, config: str) -> dict[str, Any]:
    """Rank 1 commits nothing; the others cannot go on, and all learn it."""
    weights, old, new = _begin(member, 9)
    with member.communicator(config, weights[0]) as communicator:
        job = Rearranger(communicator, weights).start(old, new, max_inflight_layers=1, commit_timeout_s=0.7)
        committed = []
        while not job.received:
            for layer in job.ready_layers() if member.rank != 1 else []:
                job.commit(layer)
                committed.append(layer)
            time.sleep(0.001)
        late = error_of(lambda: job.commit(0))
        error = error_of(lambda: job.wait(20))
        placement = job.placement
    return {
        **error,
        "late": late["type"],
        "placement": placement.tobytes(),
        "committed": len(committed),
        "moved": not np.array_equal(placement, old),
        "wrong": wrong_slots(weights, placement, member.rank),
    }


def is_refused(member: Member) -> list[dict[str, Any]]:
    weights, old, new = _begin(member, 8)
    with member.communicator(BACKENDS[0], weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights)
        errors = [
            error_of(lambda: rearranger.start(old, new, pace=pace))  # noqa: B023 - called at once
            for pace in ("20", "fast", "1GB", "0MB/s", -3.0, "20 parsecs/s")
        ]
        errors.append(error_of(lambda: rearranger.start(old, new, max_inflight_layers=0)))
        _cannot_run_beside(communicator)
        errors.append(error_of(lambda: rearranger.start(old, new)))
        return errors


def _cannot_run_beside(communicator: EplbCommunicator) -> None:
    communicator.binding.background = False


WINDOWS = (None, ONE_EXPERT)


@functools.cache
def report_of(num_ranks: int) -> Report:
    scenarios = []
    for config in BACKENDS:
        scenarios += [Scenario(f"at will {config} {w}", commits_where_it_likes, (config, w)) for w in WINDOWS]
        scenarios.append(Scenario(f"untouched {config}", touches_nothing_before, (config,)))
        scenarios.append(Scenario(f"cancel {config}", one_rank_cancels, (config,)))
        if num_ranks == 3:
            scenarios.append(Scenario(f"in flight {config}", holds_no_more_than_allowed, (config,)))
            scenarios.append(Scenario(f"pace {config}", keeps_its_pace, (config,)))
            scenarios.append(Scenario(f"never {config}", never_commits, (config,)))
    if num_ranks == 3:
        scenarios.append(Scenario("in vain", is_waited_for_in_vain))
        scenarios.append(Scenario("refused", is_refused))
    return run_scenarios(num_ranks, scenarios)


@pytest.fixture(scope="module", params=(2, 3, 4), ids=("2 ranks", "3 ranks", "4 ranks"))
def report(request: pytest.FixtureRequest) -> Report:
    return report_of(request.param)


@pytest.fixture(scope="module")
def three() -> Report:
    return report_of(3)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("config", BACKENDS)
def test_after_every_commit_the_slots_hold_what_the_routing_says(report: Report, config: str, window: int) -> None:
    told = report.returned(f"at will {config} {window}")
    for one in told:
        assert one["wrong"] == []
        assert one["reached"]
        assert one["progress"]
        assert one["ended"]
    assert sum(one["commits"] for one in told) > 0


@pytest.mark.parametrize("config", BACKENDS)
def test_nothing_touches_live_weights_before_a_commit(report: Report, config: str) -> None:
    for one in report.returned(f"untouched {config}"):
        assert one["untouched"]
        assert one["still_old"]
        assert one["ready"]
        assert one["refused"] == "InputError"
        assert one["wrong"] == []
        assert one["reached"]


@pytest.mark.parametrize("config", BACKENDS)
def test_no_more_layers_than_allowed_are_in_flight(three: Report, config: str) -> None:
    for most, changing in three.returned(f"in flight {config}"):
        assert most == 2 < changing


@pytest.mark.parametrize("config", BACKENDS)
def test_one_rank_cancels_and_all_stop_soon_at_the_same_valid_placement(report: Report, config: str) -> None:
    told = report.returned(f"cancel {config}")
    assert len({one["placement"] for one in told}) == 1
    for one in told:
        assert one["cancelled"]
        assert one["seconds"] < 1.5
        assert one["wrong"] == []
        assert one["reached"]


@pytest.mark.parametrize("config", BACKENDS)
def test_the_pace_is_kept_within_a_tenth_over_a_second(three: Report, config: str) -> None:
    for share in three.returned(f"pace {config}"):
        assert share <= 1.1
    assert max(three.returned(f"pace {config}")) >= 0.9


def test_a_job_can_be_waited_for_again_and_nothing_else_runs_beside_it(three: Report) -> None:
    for one in three.returned("in vain"):
        assert one == {"late": "TimeoutError", "beside": "InputError", "second": "InputError", "ended": True}


@pytest.mark.parametrize("config", BACKENDS)
def test_a_rank_that_does_not_commit_ends_the_job_for_all_with_one_placement(three: Report, config: str) -> None:
    told = three.returned(f"never {config}")
    assert len({one["placement"] for one in told}) == 1
    for one in told:
        assert one["type"] == "TransferError"
        assert "rank 1 has not committed" in one["text"]
        assert one["late"] == "TransferError"
        assert one["wrong"] == []
    # What the others have committed, rank 1 had to commit in the end.
    assert told[0]["committed"] == 1
    assert told[1]["committed"] == 0
    assert told[1]["moved"]


def test_what_cannot_be_is_refused_before_anything_starts(three: Report) -> None:
    for errors in three.returned("refused"):
        assert [error["type"] for error in errors] == ["InputError"] * 7 + ["BackendUnavailableError"]
        assert "deadlock" in errors[-1]["text"]


def test_the_backends_of_nccl_declare_that_they_cannot_run_beside_inference() -> None:
    from eplb_backends.pynccl.spec import BACKEND as PYNCCL
    from eplb_backends.torch_nccl.spec import BACKEND as TORCH_NCCL

    assert not PYNCCL.capabilities.background
    assert not TORCH_NCCL.capabilities.background


def test_every_rank_exits_in_order(report: Report) -> None:
    assert report.exit_codes == [0] * len(report.outcomes)
