"""What an engine asks between rearrangements: refreshes of the weights, whether all slots are right, where a job is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from eplb_core.arrays import IntArray
from eplb_core.rearrange.rearranger import Rearranger
from tests.rearrange.test_job import _wait_for
from tests.rearrange.test_rearrange import SLOTS, fill, mixed_layers, random_placement, wrong_slots
from tests.support.ranks import Member, Report, Scenario, error_of, run_scenarios

CONFIG = "torch_gloo?timeout=20s"
LAST = SLOTS - 1


def placements(member: Member, count: int, seed: int) -> list[IntArray]:
    rng = np.random.default_rng(seed)
    return [random_placement(rng, 5, member.world_size) for _ in range(count)]


def a_loader_writes_where_experts_were_at_first(member: Member) -> dict[str, Any]:
    """A refresh writes all experts as the first placement says, while the router looks as the present one says."""
    weights = mixed_layers(member.device)
    initial, current = placements(member, 2, 11)
    with member.communicator(CONFIG, weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights)
        fill(weights, initial, member.rank)
        alone = wrong_slots(weights, current, member.rank)
        result = rearranger.refresh(initial, current, verify="full")
    return {
        "alone": len(alone),
        "repaired": wrong_slots(weights, current, member.rank),
        "placement": np.array_equal(result.placement, current),
    }


def a_loader_writes_some_experts(member: Member, fails: bool) -> dict[str, Any]:
    """Within `refreshing` one layer is written anew as the first placement says; all others stay as they were."""
    weights, written = mixed_layers(member.device), mixed_layers(member.device)
    initial, current = placements(member, 2, 12)
    fill(weights, current, member.rank)
    fill(written, initial, member.rank)
    within: list[Any] = []
    error = {}
    with member.communicator(CONFIG, weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights)

        def patch() -> None:
            with rearranger.refreshing(initial, current):
                within.extend(wrong_slots(weights, initial, member.rank))
                weights[3][0].copy_(written[3][0])
                if fails:
                    raise KeyError("the patch is damaged")

        if fails:
            error = error_of(patch)
        else:
            patch()
    return {"within": within, "after": wrong_slots(weights, current, member.rank), "error": error.get("type")}


def slots_are_looked_at(member: Member, thoroughness: Any) -> dict[str, Any]:
    weights = mixed_layers(member.device)
    [placement] = placements(member, 1, 13)
    placement[:, -1] = placement[:, 0]  # the last rank's last slot is a copy of the first one's first
    fill(weights, placement, member.rank)
    found = {}
    with member.communicator(CONFIG, weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights)
        found["without a placement"] = error_of(rearranger.verify_live)["type"]
        found["another shape"] = error_of(lambda: rearranger.verify_live(placement[:2]))["type"]
        found["right"] = rearranger.verify_live(placement, thoroughness=thoroughness)
        rearranger.remember(placement, thoroughness=thoroughness)
        found["right and remembered"] = rearranger.verify_live(placement)
        if member.rank == member.world_size - 1:
            weights[2][1][LAST] += 1  # the copy
        found["damaged copy"] = rearranger.verify_live(placement)
        found["remembering it"] = error_of(lambda: rearranger.remember(placement))["type"]
        other = Rearranger(communicator, weights)
        found["damaged copy, nothing remembered"] = other.verify_live(placement)
    return {name: (str(each), each.ok, each.unlike, each.wrong) if hasattr(each, "ok") else each
            for name, each in found.items()}  # fmt: skip


def experts_without_copies_change_places(member: Member) -> tuple[bool, list[tuple[int, int]]]:
    """Two slots of rank 0 are swapped behind everybody's back: no copy tells, what is remembered does."""
    weights = mixed_layers(member.device)
    placement = np.tile(np.arange(SLOTS * member.world_size), (5, 1))
    fill(weights, placement, member.rank)
    with member.communicator(CONFIG, weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights)
        fresh = Rearranger(communicator, weights)
        rearranger.remember(placement)
        if member.rank == 0:
            weights[3][0][[1, 2]] = weights[3][0][[2, 1]]
        return fresh.verify_live(placement).ok, list(rearranger.verify_live(placement).wrong)


def a_job_is_asked(member: Member) -> dict[str, Any]:
    weights = [[torch.zeros(SLOTS, 3001), torch.zeros(SLOTS, 9, dtype=torch.float16)] for _ in range(5)]
    old, new = placements(member, 2, 14)
    fill(weights, old, member.rank)
    with member.communicator(CONFIG, weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights)
        rearranger.remember(old)
        job = rearranger.start(old, new, max_inflight_layers=len(weights))
        _wait_for(lambda: job.received)
        beside = rearranger.verify_live()
        received = job.status()
        layer = job.ready_layers()[member.rank % 2]  # ranks commit different layers
        job.commit(layer)
        partly = rearranger.verify_live()
        between = job.status()
        job.wait(20)
        finished = job.status()
        again = rearranger.start(new, old)
        again.cancel()
        again.wait(20)
        cancelled = again.status()
        still = rearranger.verify_live()
    states = [received, between, finished, cancelled]
    return {
        "live": [beside.ok, partly.ok, still.ok],
        "phases": [state["phase"] for state in states],
        "epochs": [state["epoch"] for state in states],
        "plain": json.loads(json.dumps(states)) == states,
        "effective": [
            np.array_equal(received["effective"], old),
            np.array_equal(np.flatnonzero((np.array(between["effective"]) != old).any(axis=1)), [layer]),
            np.array_equal(finished["effective"], new),
            cancelled["effective"] == again.placement.tolist(),
        ],
        "requested": np.array_equal(cancelled["requested"], old) and np.array_equal(received["requested"], new),
        "same": job.status() == finished,
        "errors": [state["error"] for state in states],
    }


@pytest.fixture(scope="module", params=(2, 3, 4), ids=("2 ranks", "3 ranks", "4 ranks"))
def report(request: pytest.FixtureRequest) -> Report:
    scenarios = [
        Scenario("refresh", a_loader_writes_where_experts_were_at_first),
        Scenario("patch", a_loader_writes_some_experts, (False,)),
        Scenario("failing patch", a_loader_writes_some_experts, (True,)),
        Scenario("swap", experts_without_copies_change_places),
        Scenario("job", a_job_is_asked),
    ]
    scenarios += [Scenario(f"look {each}", slots_are_looked_at, (each,)) for each in ("full", "sample")]
    return run_scenarios(request.param, scenarios)


def test_a_refresh_alone_is_wrong_and_put_right_after_it(report: Report) -> None:
    answers = report.returned("refresh")
    assert sum(answer["alone"] for answer in answers) > 0
    assert all(answer["repaired"] == [] and answer["placement"] for answer in answers)


@pytest.mark.parametrize(("name", "error"), [("patch", None), ("failing patch", "KeyError")])
def test_experts_are_where_the_loader_expects_them_within_a_refresh_and_back_after_it(
    report: Report, name: str, error: str | None
) -> None:
    for answer in report.returned(name):
        assert answer == {"within": [], "after": [], "error": error}


@pytest.mark.parametrize("thoroughness", ["full", "sample"])
def test_a_damaged_copy_is_found_on_every_rank(report: Report, thoroughness: str) -> None:
    answers = report.returned(f"look {thoroughness}")
    assert all(answer == answers[0] for answer in answers)
    answer = answers[0]
    assert answer["without a placement"] == answer["another shape"] == "InputError"
    assert answer["right"][1:] == answer["right and remembered"][1:] == (True, (), ())
    last = SLOTS * len(answers) - 1
    for name in ("damaged copy", "damaged copy, nothing remembered"):
        _, ok, unlike, wrong = answer[name]
        assert not ok
        assert [layer for layer, _ in unlike] == [2]
        assert wrong == (((2, last),) if name == "damaged copy" else ())
    assert f"slot {last} of layer 2" in answer["damaged copy"][0]
    assert answer["remembering it"] == "IntegrityError"


def test_only_what_is_remembered_tells_where_no_expert_has_a_copy(report: Report) -> None:
    assert all(answer == (True, [(3, 1), (3, 2)]) for answer in report.returned("swap"))


def test_a_job_says_where_it_stands_and_slots_can_be_looked_at_beside_it(report: Report) -> None:
    for answer in report.returned("job"):
        assert answer == {
            "live": [True, True, True],
            "phases": ["received", "received", "finished", "cancelled"],
            "epochs": [1, 1, 1, 2],
            "plain": True,
            "effective": [True, True, True, True],
            "requested": True,
            "same": True,
            "errors": [None] * 4,
        }


def test_every_rank_exits_in_order(report: Report) -> None:
    assert report.exit_codes == [0] * len(report.outcomes)
