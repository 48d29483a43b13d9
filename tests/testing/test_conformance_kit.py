"""The kit finds what is wrong: each broken transport fails exactly the check that is about its fault."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from eplb_core.errors import InputError
from eplb_core.testing import BackendConformance, Check, Report, Status, Subject, all_checks, run_conformance
from eplb_core.testing.catalogue import checks_named
from eplb_core.testing.in_rank import Step
from eplb_core.testing.runner import run_steps
from tests.support import fake_distributions
from tests.support.broken_transports import OWN_CHECK

SAMPLE = (
    "closing_returns",
    "messages_of_a_pair_keep_their_order",
    "odd_sizes_arrive",
    "the_queue_is_empty_after_a_transfer",
    "another_size_is_a_mismatch_everywhere",
    "two_communicators_do_not_disturb_one_another",
)
"""Checks that a transport passes which has a fault elsewhere."""

THREE_RANKS = ("takes_global_ranks", "names_nobody")
ALONE = ("dies_at_exit",)  # its processes end badly, and with them those of whoever shares them
STATELESS = ("declares_stateless_groups",)
BACKGROUND = ("only_on_the_main_thread", "hides_a_capability")
HANGS = ("waits_for_ever", "hangs_on_close")
HANG_S = 4.0  # what is not cut does not take that long
TOGETHER = [name for name in OWN_CHECK if name not in (*THREE_RANKS, *ALONE)]


def subject_of(name: str) -> Subject:
    return Subject(config=name, stateless=name in STATELESS, background=name in BACKGROUND)


def steps_of(name: str, others: Sequence[str] = SAMPLE) -> list[Step]:
    checks = checks_named(OWN_CHECK[name], *others)
    if name in HANGS:
        checks = tuple(dataclasses.replace(check, deadline_s=min(check.deadline_s, HANG_S)) for check in checks)
    return [Step(subject_of(name), check) for check in checks]


def problems(report: Report, name: str) -> dict[str, str]:
    return {
        result.check: result.detail
        for result in report
        if result.subject.config == name and result.status in (Status.FAILED, Status.NOT_RUN)
    }


@pytest.fixture(scope="module", autouse=True)
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All broken transports, as an installed distribution."""
    folder = tmp_path_factory.mktemp("broken")
    names = {
        "sound": "tests.support.broken_specs:sound",
        **{name: f"tests.support.broken_specs:{name}" for name in OWN_CHECK},
    }
    fake_distributions.install(folder, "broken-eplb", backends=names)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield
    for left in Path("/dev/shm").glob("eplb-broken-*"):
        left.unlink()


@pytest.fixture(scope="module")
def together() -> Report:
    """Most of them, one after the other in the same processes."""
    return run_steps([step for name in TOGETHER for step in steps_of(name)], 2)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TOGETHER)
def test_a_broken_transport_fails_its_own_check_only(together: Report, name: str) -> None:
    assert list(problems(together, name)) == [OWN_CHECK[name]], problems(together, name)


@pytest.mark.parametrize("name", ALONE)
def test_processes_that_end_badly_fail_their_own_check_only(name: str) -> None:
    report = run_steps(steps_of(name), 2)
    assert list(problems(report, name)) == [OWN_CHECK[name]], problems(report, name)


def test_faults_that_take_three_ranks_fail_their_own_check_only() -> None:
    report = run_steps([step for name in THREE_RANKS for step in steps_of(name)], 3)
    for name in THREE_RANKS:
        assert list(problems(report, name)) == [OWN_CHECK[name]], problems(report, name)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_every_broken_transport_passes_all_checks_but_its_own() -> None:
    everything = [check.name for check in all_checks(thorough=False) if not check.kills]
    failed = {}
    for names in (TOGETHER, *([name] for name in ALONE)):
        report = run_steps([step for name in names for step in steps_of(name, everything)], 3)
        failed |= {name: list(problems(report, name)) for name in names}
    assert failed == {name: [OWN_CHECK[name]] for name in failed}


def test_a_sound_transport_passes_everything() -> None:
    report = run_conformance([Subject(config="sound")], 2)
    assert not problems(report, "sound"), problems(report, "sound")
    assert report.conforms


def test_a_check_that_hangs_shows_where_every_rank_was(together: Report) -> None:
    detail = together.of(OWN_CHECK["waits_for_ever"], "waits_for_ever").detail
    assert detail.count("it did not come to an end; it was at") == 2
    assert "in check_match" in detail
    assert "a_rank_that_does_not_execute_is_named_within_the_timeout" in detail


def test_a_crash_names_the_rank_and_the_signal(together: Report) -> None:
    detail = together.of(OWN_CHECK["dies_of_large_messages"], "dies_of_large_messages").detail
    assert "rank 1: it was killed by SIGSEGV" in detail


def test_wrong_bytes_are_counted_and_placed(together: Report) -> None:
    detail = together.of("odd_sizes_arrive", "drops_the_last_byte").detail
    assert "1 of 1 bytes of a torch.uint8 tensor are wrong, the first at 0, the last at 0" in detail
    assert "1 of them were never written" in detail


def test_the_report_can_be_written_as_json(together: Report) -> None:
    document = json.loads(json.dumps(together.document()))
    assert document["conforms"] is False
    assert document["counts"]["failed"] == len(TOGETHER)
    assert {"check", "promise", "status", "detail", "ranks", "seconds", "subject", "page"} == set(
        document["results"][0]
    )


# --- the pytest front ------------------------------------------------------------------------------------------------


def test_a_class_that_names_no_config_cannot_be_defined() -> None:
    with pytest.raises(TypeError, match="TestNothing names no config"):
        type("TestNothing", (BackendConformance,), {})


@pytest.mark.parametrize("empty", ["devices", "ranks"])
def test_a_class_that_checks_nothing_cannot_be_defined(empty: str) -> None:
    with pytest.raises(TypeError, match="checks nothing"):
        type("TestNothing", (BackendConformance,), {"config": "sound", empty: ()})


def test_a_class_with_an_init_which_pytest_would_pass_over_cannot_be_defined() -> None:
    with pytest.raises(TypeError, match="__init__"):
        type("TestNothing", (BackendConformance,), {"config": "sound", "__init__": lambda self: None})


def test_a_check_that_does_not_exist_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean 'odd_sizes_arrive'"):
        checks_named("odd_size_arrives")


def test_nothing_to_check_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing to check"):
        run_conformance([Subject(config="sound")], 2, [])


CLASS_FILE = """
from eplb_core.testing import BackendConformance

class AnyName(BackendConformance):
    config = {config!r}
    ranks = (2,)
    checks = ("messages_of_a_pair_keep_their_order", "odd_sizes_arrive", "a_sub_group_has_ranks_of_its_own")
"""


def test_a_class_gets_a_test_for_each_check_whatever_it_is_called(tmp_path: Path) -> None:
    file = tmp_path / "test_mine.py"
    file.write_text(CLASS_FILE.format(config="torch_gloo"))
    child = fake_distributions.run_child(["-m", "pytest", "-rs", "-p", "no:cacheprovider", str(file)], [tmp_path])
    assert child.returncode == 0, child.stdout
    assert "2 passed, 1 skipped" in child.stdout
    assert "it takes 3 ranks" in child.stdout


def test_a_failed_check_tells_what_was_promised_and_what_was_seen(tmp_path: Path) -> None:
    fake_distributions.install(
        tmp_path, "broken-eplb", backends={"drops_the_last_byte": "tests.support.broken_specs:drops_the_last_byte"}
    )
    file = tmp_path / "test_mine.py"
    file.write_text(CLASS_FILE.format(config="drops_the_last_byte"))
    path = [tmp_path, Path(__file__).parents[2]]
    child = fake_distributions.run_child(["-m", "pytest", "-p", "no:cacheprovider", str(file), "-k", "odd_sizes"], path)
    assert child.returncode == 1
    assert "Sizes that are no multiple of anything arrive to the last byte." in child.stdout
    assert "1 of 1 bytes of a torch.uint8 tensor are wrong" in child.stdout


def test_a_check_of_ones_own_runs_like_all_others() -> None:
    report = run_conformance([Subject(config="sound")], 2, [Check(ranks_differ)])
    assert report.of("ranks_differ").status is Status.FAILED
    assert "rank 1: " in report.of("ranks_differ").detail
    assert "rank 0" not in report.of("ranks_differ").detail


def ranks_differ(context: object) -> None:
    """Rank 1 has something to say."""
    assert getattr(context, "rank", 0) == 0


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_that_a_backend_conforms_and_writes_json(tmp_path: Path) -> None:
    arguments = ("conformance", "torch_gloo", "--ranks", "2", "--check", "odd_sizes_arrive", "--json", "report.json")
    child = fake_distributions.run_eplb(*arguments, cwd=tmp_path)
    assert child.returncode == 0, child.stderr
    assert "passed   odd_sizes_arrive" in child.stdout
    assert "torch_gloo with 2 ranks on cpu conforms: 1 passed" in child.stdout
    assert json.loads((tmp_path / "report.json").read_text())["conforms"] is True


def test_the_command_exits_with_1_and_shows_what_was_promised(tmp_path: Path) -> None:
    fake_distributions.install(
        tmp_path, "broken-eplb", backends={"drops_the_last_byte": "tests.support.broken_specs:drops_the_last_byte"}
    )
    child = fake_distributions.run_eplb(
        "conformance",
        "drops_the_last_byte",
        "--ranks",
        "2",
        "--check",
        "odd_sizes_arrive",
        path=[tmp_path, Path(__file__).parents[2]],
    )
    assert child.returncode == 1
    assert "promised: Sizes that are no multiple of anything" in child.stdout
    assert "came:     rank" in child.stdout
    assert "contract: https://eplb.readthedocs.io/en/stable/contract.html#odd-sizes-arrive" in child.stdout
    assert "drops_the_last_byte with 2 ranks on cpu does not conform: 1 failed" in child.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no_such_thing",), "there is no backend 'no_such_thing'"),
        (("torch_gloo", "--check", "odd"), "there is no check 'odd'"),
        (("pynccl",), "does not move tensors on cpu"),
        ((), "Missing argument 'CONFIG'"),
    ],
)
def test_the_command_exits_with_2_when_there_is_nothing_it_could_check(arguments: tuple[str, ...], words: str) -> None:
    child = fake_distributions.run_eplb("conformance", *arguments)
    assert child.returncode == 2
    assert words in child.stderr


def test_the_list_is_json_too() -> None:
    child = fake_distributions.run_eplb("conformance", "--list", "--json", "-")
    assert [each["name"] for each in json.loads(child.stdout)["checks"]] == [check.name for check in all_checks()]


def test_names_of_checks_are_never_cut_to_fit_a_terminal() -> None:
    child = fake_distributions.run_eplb("conformance", "--list", environment={"COLUMNS": "80"})
    for check in all_checks():
        assert check.name in child.stdout


def test_a_backend_of_which_nothing_can_be_checked_here_neither_conforms_nor_fails() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    child = fake_distributions.run_eplb("conformance", "torch_gloo", "--device", "cuda", "--ranks", "2")
    assert child.returncode == 2
    assert "nothing could be checked" in child.stderr
    assert "does not conform" not in child.stdout


def test_the_command_lists_the_checks() -> None:
    child = fake_distributions.run_eplb("conformance", "--list")
    assert child.returncode == 0
    for check in all_checks():
        assert check.name in child.stdout
        assert check.promise in child.stdout
