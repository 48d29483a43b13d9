"""Each promise that a campaign looks at is found broken where it is."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from eplb_core.launch.local_ranks import Outcome
from eplb_core.testing.campaign.episode import Episode
from eplb_core.testing.campaign.member import Next, Told
from eplb_core.testing.campaign.plan import KINDS, LEAVING, Fault, Trial, plan_trials
from eplb_core.testing.campaign.report import Report
from eplb_core.testing.campaign.verdict import judge

PLACEMENT = np.array([[0, 1, 2, 3]])
FINE = Told("", "", True, (), PLACEMENT, [], 0.1, 0.05, 0.0, False)
HURT = Told("PeerLostError", "rank 2 is gone", True, (2,), PLACEMENT, [], 0.1, 0.05, 0.0, False)


def episode_of(kind: str, told: dict[int, Told], after: dict[int, Next] | None = None) -> Episode:
    """Return one trial of three processes, of which process 2 has the fault."""
    trial = Trial(0, (0, 1, 2), (Fault(kind, 2, "time", 0.1),), False, "", False, 4)
    outcomes = [Outcome(rank, exit_code=0) for rank in range(3)]
    if kind == "kill":
        outcomes[2].exit_code = -signal.SIGKILL
    following = {process: Next([]) for process in trial.remaining} if after is None else after
    return Episode("torch_gloo", 7, 3, [trial], {0: told}, {0: following}, outcomes=outcomes)


def broken(episode: Episode) -> list[str]:
    (verdict,) = judge(episode, timeout_s=2.0)
    return sorted({promise for promise, _ in verdict.problems})


def test_a_kill_that_the_others_name_in_time_breaks_nothing() -> None:
    assert broken(episode_of("kill", {0: HURT, 1: HURT})) == []


@pytest.mark.parametrize(
    ("promise", "change"),
    [
        ("bytes", {"wrong": [(0, 1)]}),
        ("one placement", {"placement": np.array([[0, 1, 2, -1]])}),
        ("one placement", {"kind": "", "error": ""}),
        ("named", {"blamed": (0,)}),
        ("named", {"own": False}),
        ("in time", {"seconds": 4.1}),
    ],
)
def test_what_one_survivor_of_a_kill_says_breaks_the_promise(promise: str, change: dict[str, Any]) -> None:
    assert broken(episode_of("kill", {0: HURT, 1: replace(HURT, **change)})) == [promise]


def test_time_for_which_the_machine_stood_still_does_not_count() -> None:
    assert broken(episode_of("kill", {0: HURT, 1: replace(HURT, seconds=4.1, stalled_s=0.2)})) == []


def test_an_error_without_a_fault_is_a_finding_unless_the_machine_stood_still() -> None:
    told = dict.fromkeys(range(3), HURT)
    assert broken(episode_of("none", told)) == ["named"]
    assert broken(episode_of("none", dict.fromkeys(range(3), replace(HURT, stalled_s=1.0)))) == []


def test_ranks_that_lost_their_store_may_not_know_but_may_not_differ() -> None:
    lost = replace(HURT, error="the store is gone", blamed=())
    unknown = replace(lost, placement=np.array([[0, -1, 2, 3]]))
    assert broken(episode_of("store killed", {0: lost, 1: unknown, 2: FINE})) == []
    other = replace(lost, placement=np.array([[0, 3, 2, 3]]))
    assert broken(episode_of("store killed", {0: lost, 1: other, 2: FINE})) == ["one placement"]


def test_a_next_rearrangement_that_is_wrong_or_does_not_end_is_a_finding() -> None:
    told = {0: HURT, 1: HURT}
    assert broken(episode_of("kill", told, {0: Next([]), 1: Next([(0, 0)])})) == ["next"]
    assert broken(episode_of("kill", told, {0: Next([])})) == ["next"]
    assert broken(episode_of("kill", told, {0: Next([]), 1: Next([], wrong_later=[(0, 0)])})) == ["bytes"]


def test_processes_that_end_otherwise_and_what_they_leave_are_findings() -> None:
    episode = episode_of("kill", {0: HURT, 1: HURT})
    episode.outcomes[1].exit_code = -signal.SIGSEGV
    assert broken(episode) == ["ended"]
    episode = episode_of("kill", {0: HURT, 1: HURT})
    episode.left_behind = ["shared memory x"]
    assert broken(episode) == ["ended"]
    assert broken(episode_of("kill", {0: HURT})) == ["ended"]


def test_the_table_counts_trials_and_broken_promises_by_kind() -> None:
    report = Report(2.0)
    for kind in ("kill", "none"):
        episode = episode_of(kind, {0: HURT, 1: HURT, 2: HURT})
        report.episodes.append((episode, judge(episode, 2.0)))
    rows = {line.split("  ")[0]: line.split() for line in report.table().splitlines() if line}
    header = report.table().splitlines()[0].split("  ")
    assert [name.strip() for name in header if name.strip()][:4] == ["fault", "trials", "struck", "failed"]
    assert rows["none"][1:] == ["1", "0", "1", "0", "0", "1", "0", "0", "0"]
    assert rows["all"][1] == "2"
    assert all("--seed 7" in problem for problem in report.problems)
    assert report.document()["trials"] == 2


@pytest.mark.parametrize("seed", range(20))
def test_the_same_seed_plans_the_same_trials_and_each_has_somebody_left(seed: int) -> None:
    trials = plan_trials(seed, 4)
    assert trials == plan_trials(seed, 4)
    members: tuple[int, ...] = (0, 1, 2, 3)
    for trial in trials:
        assert trial.members == members
        assert {fault.kind for fault in trial.faults} <= set(KINDS)
        assert len({fault.victim for fault in trial.faults}) == len(trial.faults)
        assert set(trial.members) - set(trial.victims)
        members = tuple(m for m in members if not any(f.victim == m and f.kind in LEAVING for f in trial.faults))
        assert trial.remaining == members


def test_every_kind_every_pair_and_both_modes_are_drawn() -> None:
    trials = [trial for seed in range(60) for trial in plan_trials(seed, 4)]
    assert {fault.kind for trial in trials for fault in trial.faults} == set(KINDS)
    assert {trial.background for trial in trials} == {True, False}
    assert {trial.in_place for trial in trials} == {True, False}
    assert {len(trial.faults) for trial in trials} == {1, 2}
