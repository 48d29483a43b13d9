"""The first-party backends run the conformance kit, as any third party's would. All of them share their processes."""

from __future__ import annotations

import pytest
import torch

from eplb_core.testing import Report, Status, Subject, all_checks, run_conformance
from eplb_core.testing.catalogue import checks_named
from eplb_core.testing.checks import delivery, refusal
from eplb_core.testing.in_rank import Step
from eplb_core.testing.runner import run_steps

SUBJECTS = {
    subject.config: subject
    for subject in (
        Subject(config="torch_gloo", background=True),
        Subject(config="torch_nccl"),
        Subject(config="nixl?window=32MiB", stateless=True, background=True),
        Subject(config="nixl?mode=packed&window=32MiB", stateless=True, background=True),
        Subject(config="nixl?mode=direct&window=32MiB", stateless=True, background=True, must_register=True),
    )
}
"""The windows are an eighth of what is usual: making them is most of what `nixl` costs here."""

MODES = [config for config in SUBJECTS if "mode=" in config]
"""What differs between them and `nixl` is how bytes move; their lifetimes are looked at by night."""

LETHAL = [check for check in all_checks(thorough=False) if check.kills]
MOVING = [*delivery.CHECKS, *refusal.CHECKS]
STEPS = [
    Step(subject, check)
    for config, subject in SUBJECTS.items()
    for check in (MOVING if config in MODES else all_checks(thorough=False))
    if not check.kills
]


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.nightly), 3], ids=lambda ranks: f"{ranks} ranks"
)
def report(request: pytest.FixtureRequest) -> Report:
    return run_steps(STEPS, request.param)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("config", "check"), [(step.subject.config, step.check.name) for step in STEPS])
def test_contract(report: Report, config: str, check: str) -> None:
    result = report.of(check, config)
    if result.status is Status.SKIPPED:
        pytest.skip(result.detail)
    assert result.status is Status.PASSED, result.detail


# --- other numbers of ranks, smaller windows --------------------------------------------------------------------------

SMALL = [
    Subject(config="torch_gloo"),
    Subject(config="torch_nccl"),
    Subject(config="nixl?window=4MiB", stateless=True),
    Subject(config="nixl?mode=packed&window=1MiB", stateless=True),
    Subject(config="nixl?mode=direct&window=1MiB", stateless=True, must_register=True),
]
QUICK = checks_named(
    "messages_of_a_pair_keep_their_order",
    "nothing_queued_is_a_round_like_any_other",
    "every_dtype_arrives_bit_for_bit",
    "odd_sizes_arrive",
    "tensors_without_elements_are_sent",
    "tensors_of_any_shape_arrive",
    "every_rank_sends_to_every_other",
    "one_rank_feeds_all_and_is_fed_by_all",
    "uneven_traffic_arrives",
    "registered_tensors_serve_a_hundred_epochs",
    "what_is_sent_is_what_the_tensor_holds_at_execute",
    "no_reference_to_a_moved_tensor_is_kept",
    "closing_with_something_queued_is_fine",
)


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=pytest.mark.nightly), 4], ids=lambda ranks: f"{ranks} ranks"
)
def quick_report(request: pytest.FixtureRequest) -> Report:
    return run_steps([Step(subject, check) for subject in SMALL for check in QUICK], request.param)


@pytest.mark.parametrize("subject", SMALL, ids=lambda subject: subject.config)
@pytest.mark.parametrize("check", [check.name for check in QUICK])
def test_two_and_four_ranks_with_small_windows_keep_the_contract_too(
    quick_report: Report, subject: Subject, check: str
) -> None:
    result = quick_report.of(check, subject.config)
    if result.status is Status.SKIPPED:
        pytest.skip(result.detail)
    assert result.status is Status.PASSED, result.detail


# --- deaths, and by night ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [config for config in SUBJECTS if config not in MODES])
def test_a_killed_rank_is_named_by_every_survivor(config: str) -> None:
    report = run_conformance([SUBJECTS[config]], 3, LETHAL)
    assert report.conforms, [result.detail for result in report]


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("config", [*SUBJECTS, "nixl"])
def test_the_contract_with_more_ranks_and_thoroughly(config: str) -> None:
    subject = SUBJECTS.get(config) or Subject.declared(config)
    report = run_conformance([subject], 5, all_checks())
    assert report.conforms, [result.detail for result in report if result.status is not Status.PASSED]


def test_the_smallest_window_moves_everything_that_a_large_one_does() -> None:
    subject = Subject(config="nixl?mode=packed&window=64KiB", stateless=True, background=True)
    report = run_steps(
        [Step(subject, check) for check in checks_named("odd_sizes_arrive", "uneven_traffic_arrives")], 2
    )
    assert report.conforms, [result.detail for result in report]


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("config", [config for config in SUBJECTS if config != "torch_nccl"])
def test_the_contract_with_tensors_on_one_gpu(config: str) -> None:
    report = run_conformance([SUBJECTS[config].on("cuda")], 2)
    assert report.conforms, [result.detail for result in report if result.status is not Status.PASSED]
