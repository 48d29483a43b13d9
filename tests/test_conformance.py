"""The first-party backends run the conformance kit, as any third party's would. All of them share their processes."""

from __future__ import annotations

import pytest

from eplb_core.testing import Report, Status, Subject, all_checks, run_conformance
from eplb_core.testing.contract import checks_named
from eplb_core.testing.in_rank import Step
from eplb_core.testing.runner import run_steps

SUBJECTS = {
    subject.config: subject
    for subject in (
        Subject(config="torch_gloo", background=True),
        Subject(config="torch_nccl"),
        Subject(config="nixl", stateless=True, background=True),
        Subject(config="nixl?mode=packed", stateless=True, background=True),
        Subject(config="nixl?mode=direct", stateless=True, background=True, must_register=True),
    )
}
LETHAL = [check for check in all_checks(thorough=False) if check.kills]
CHECKS = [check for check in all_checks(thorough=False) if not check.kills]
DIE_EVERY_DAY = ("torch_gloo", "nixl")  # processes of their own for each: the others do it by night


@pytest.fixture(scope="module", params=(2, 3), ids=("2 ranks", "3 ranks"))
def report(request: pytest.FixtureRequest) -> Report:
    return run_conformance(list(SUBJECTS.values()), request.param, CHECKS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("check", [check.name for check in CHECKS])
@pytest.mark.parametrize("config", SUBJECTS)
def test_contract(report: Report, config: str, check: str) -> None:
    result = report.of(check, config)
    if result.status is Status.SKIPPED:
        pytest.skip(result.detail)
    assert result.status is Status.PASSED, result.detail


@pytest.mark.parametrize(
    "config",
    [pytest.param(config, marks=() if config in DIE_EVERY_DAY else pytest.mark.nightly) for config in SUBJECTS],
)
def test_a_killed_rank_is_named_by_every_survivor(config: str) -> None:
    report = run_conformance([SUBJECTS[config]], 3, LETHAL)
    assert report.conforms, [result.detail for result in report]


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("config", SUBJECTS)
def test_the_contract_with_more_ranks_and_thoroughly(config: str) -> None:
    report = run_conformance([SUBJECTS[config]], 5, all_checks())
    assert report.conforms, [result.detail for result in report if result.status is not Status.PASSED]


def test_the_smallest_window_moves_everything_that_a_large_one_does() -> None:
    subject = Subject(config="nixl?mode=packed&window=64KiB", stateless=True, background=True)
    report = run_steps(
        [Step(subject, check) for check in checks_named("odd_sizes_arrive", "uneven_traffic_arrives")], 2
    )
    assert report.conforms, [result.detail for result in report]
