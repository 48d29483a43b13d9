"""What can be used after an error: the same rearranger and communicator, on all ranks, wherever the docs say so."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from eplb_core.rearrange.job import RearrangeJob
from tests.support.experts import Experts
from tests.support.ranks import Member, Report, Scenario, error_of, run_scenarios

RANKS, WHO = 3, 1
BACKENDS = ("torch_gloo?timeout=10s", "nixl?window=1MiB&timeout=10s")


def does_not_commit(member: Member, config: str) -> dict[str, Any]:
    """One rank's engine is too slow to commit; the job ends, and all rearrange again."""
    experts = Experts(member, config)
    job = experts.rearranger.start(experts.first, experts.second, max_inflight_layers=1, commit_timeout_s=0.5)
    error = outcome(job, commits=member.rank != WHO)
    return {**error, **rearranges_again(experts)}


def cancels(member: Member, config: str) -> dict[str, Any]:
    experts = Experts(member, config)
    job = experts.rearranger.start(experts.first, experts.second, max_inflight_layers=1)
    if member.rank == WHO:
        job.cancel()
    result = job.wait(60)
    return {"type": "", "cancelled": result.cancelled, **rearranges_again(experts)}


def outcome(job: RearrangeJob, *, commits: bool) -> dict[str, Any]:
    while not job.received:
        for layer in job.ready_layers() if commits else []:
            job.commit(layer)
        time.sleep(0.001)
    return error_of(lambda: job.wait(60))


def loader_fails(member: Member, config: str) -> dict[str, Any]:
    """The loader of one rank fails; what it should have brought is empty, and can be brought by the next call."""
    experts = Experts(member, config)
    lost = experts.first.copy()
    lost[0, :] = np.where(lost[0] // 2 == WHO, -1, lost[0])

    def load(layer: int, expert: int) -> list[torch.Tensor]:
        if member.rank == WHO and not repaired:
            raise OSError("the checkpoint is gone")
        return [torch.full((1000,), expert, dtype=torch.int32)]

    repaired = False
    error = error_of(lambda: experts.rearranger.run(lost, experts.first, loader=load))
    repaired = True
    again = experts.rearranger.run(None, experts.first, loader=load)
    return {**error, "again": np.array_equal(again.placement, experts.first), **rearranges_again(experts)}


def breaks_a_byte(member: Member, config: str) -> dict[str, Any]:
    """A byte changes in memory while experts move; the check after it says so."""
    experts = Experts(member, config)
    rearranger = experts.rearranger
    inner, asked = rearranger._checksums, []

    def spoilt(*arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) == 2 and member.rank == WHO:
            experts.weights[0][0][0, 17] += 1
        return inner(*arguments)

    rearranger._checksums = spoilt  # type: ignore[method-assign]
    error = error_of(lambda: rearranger.run(experts.first, experts.second, verify="full"))
    rearranger._checksums = inner  # type: ignore[method-assign]
    held = rearranger.placement
    assert held is not None
    experts.fill(experts.second)
    rearranger.run(experts.second, experts.first, weights_changed=True)
    return {**error, "emptied": int((held < 0).sum()), **rearranges_again(experts)}


def rearranges_again(experts: Experts) -> dict[str, Any]:
    result = experts.rearranger.run(None, experts.first)
    wrong = experts.wrong(experts.first)
    return {"reached": np.array_equal(result.placement, experts.first), "first": wrong, **experts.goes_on()}


SCENARIOS = {
    "does not commit": (does_not_commit, "TransferError"),
    "cancels": (cancels, ""),
    "loader fails": (loader_fails, "LoaderError"),
    "breaks a byte": (breaks_a_byte, "IntegrityError"),
}


@pytest.fixture(scope="module")
def report() -> Report:
    return run_scenarios(
        RANKS,
        [Scenario(f"{kind} {config}", SCENARIOS[kind][0], (config,)) for kind in SCENARIOS for config in BACKENDS],
    )


@pytest.mark.parametrize("config", BACKENDS)
@pytest.mark.parametrize("kind", SCENARIOS)
def test_the_same_rearranger_moves_every_byte_right_after(report: Report, kind: str, config: str) -> None:
    for one in report.returned(f"{kind} {config}"):
        assert one["type"] == SCENARIOS[kind][1], one
        assert one["reached"]
        assert (one["first"], one["wrong"], one["moved"] > 0) == ([], [], True)
        assert one.get("cancelled", True)
        assert one.get("again", True)
        assert one.get("emptied", 1) == 1


def test_every_rank_exits_in_order(report: Report) -> None:
    assert report.exit_codes == [0] * RANKS
