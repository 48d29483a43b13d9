"""Ranks that would not build the same build nothing: every rank raises the same table, in time."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

import eplb_backends.nixl.communicator as nixl
from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.contract.context import BackendContext
from eplb_core.contract.option_types import CommonOptions
from eplb_core.control.groups import TorchGroups
from eplb_core.errors import BackendUnavailableError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.registry.config import BackendConfig
from eplb_core.registry.entry import BackendEntry
from eplb_core.registry.registry import Registry
from tests.support.ranks import Member, Report, Scenario, error_of, exchange, ring, run_scenarios

RANKS = 3
ODD = 1  # the rank that differs
PATIENCE_S = 8.0  # far below the timeouts that are configured, far above what any step takes


class ChangedRegistry(Registry):
    """The installed backends, with some fields of the selected entry replaced."""

    def __init__(self, spec: dict[str, Any] | None = None, **entry: Any) -> None:
        super().__init__()
        self._entry_fields = entry
        self._spec_fields = spec or {}

    def select(self, config: BackendConfig) -> BackendEntry:
        entry = super().select(config)
        spec = dataclasses.replace(entry.spec, **self._spec_fields)
        return dataclasses.replace(entry, spec=spec, **self._entry_fields)


class Refuses(EplbCommunicator):
    """The least that a factory may return."""

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        raise NotImplementedError

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        raise NotImplementedError

    def execute(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        CLOSED.append(self)


CLOSED: list[Refuses] = []


def fails_on_one_rank(context: BackendContext, options: CommonOptions, tensors: Sequence[torch.Tensor]) -> object:
    if context.rank == ODD:
        raise OSError("the fabric is on fire")
    return Refuses()


def fails_everywhere(context: BackendContext, options: CommonOptions, tensors: Sequence[torch.Tensor]) -> object:
    raise OSError("the fabric is on fire")


def returns_a_dict(context: BackendContext, options: CommonOptions, tensors: Sequence[torch.Tensor]) -> object:
    return {}


@contextlib.contextmanager
def without(module: str, where: bool) -> Iterator[None]:
    """Let importing `module` fail on the ranks for which `where` holds."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if where and name.split(".")[0] == module}
    if where:
        sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if where:
            del sys.modules[module]
        sys.modules.update(hidden)


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def differing(member: Member, usual: dict[str, Any], odd: dict[str, Any]) -> dict[str, Any]:
    """Ask for `usual`, on one rank for `odd`; return the error, and check that the group can be used afterwards."""
    asked = {**usual, **(odd if member.rank == ODD else {})}
    weights = asked.pop("weights", ())
    config = asked.pop("config", "torch_gloo?timeout=30s")
    error = error_of(lambda: member.communicator(config, weights, **asked))
    with member.shared("torch_gloo") as communicator:
        exchange(member, communicator, ring(RANKS, 100))
    return error


def differing_registry(member: Member, usual: dict[str, Any], odd: dict[str, Any]) -> dict[str, Any]:
    return differing(member, {"registry": ChangedRegistry(**(odd if member.rank == ODD else usual))}, {})


def without_the_package(member: Member) -> dict[str, Any]:
    with without("nixl", member.rank == ODD):
        return differing(member, {"config": "nixl?window=1MiB", "registry": Registry()}, {})


def without_a_part_of_the_package(member: Member) -> dict[str, Any]:
    """The package is there, but the part of it that does the work cannot be imported."""
    hidden = {}
    if member.rank == ODD:
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("nixl.")}
        sys.modules["nixl._api"] = None  # type: ignore[assignment]
    try:
        return differing(member, {"config": "nixl?window=1MiB&timeout=30s"}, {})
    finally:
        if member.rank == ODD:
            del sys.modules["nixl._api"]
        sys.modules.update(hidden)


def a_member_that_does_not_come(member: Member, missing: int) -> dict[str, Any]:
    group = dist.new_group(list(range(RANKS)))
    if member.rank == missing:
        return {}
    return error_of(lambda: create_eplb_communicator(TorchGroups(group), "torch_gloo?timeout=1s"))


def a_member_that_comes_late(member: Member) -> list[list[int]]:
    """The odd rank first waits in vain, in another group, for longer than the others' `timeout` is."""
    nobody, all_ranks = (dist.new_group(list(range(RANKS))) for _ in range(2))
    if member.rank == ODD:
        error_of(lambda: create_eplb_communicator(TorchGroups(nobody), "torch_gloo?timeout=2s"))
    with create_eplb_communicator(TorchGroups(all_ranks), "torch_gloo?timeout=1s&start_timeout=1min") as communicator:
        exchange(member, communicator, ring(RANKS, 100))
        return [[round(communicator.binding.timeout_s)]]


def what_was_closed(member: Member) -> dict[str, Any]:
    error = differing_registry(member, {"spec": {"factory": "tests.factory.test_handshake:fails_on_one_rank"}}, FAILING)
    return {**error, "closed": len(CLOSED)}


FAILING: dict[str, Any] = {"spec": {"factory": "tests.factory.test_handshake:fails_on_one_rank"}}
F32, F16 = torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.float16)

# scenario: arguments, row of the table, word in the odd rank's cell, word in the others' cells
DIFFERENCES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str, str, str]] = {
    "another backend": (differing, ({}, {"config": "torch_nccl"}), "backend", "torch_nccl", "torch_gloo"),
    "auto on one rank": (differing, ({}, {"config": "auto"}), "backend", "auto", "torch_gloo"),
    "auto on all but one": (
        differing,
        ({"config": "auto"}, {"config": "torch_gloo"}),
        "backend",
        "torch_gloo",
        "auto",
    ),
    "another option": (
        differing,
        ({"config": "nixl?window=1MiB"}, {"config": "nixl?window=2MiB"}),
        "options",
        "window=2MiB",
        "window=1MiB",
    ),
    "another timeout": (differing, ({}, {"config": "torch_gloo?timeout=31s"}), "options", "timeout=31s", "timeout=30s"),
    "another shape": (
        differing,
        ({"weights": [F32]}, {"weights": [F32.reshape(4, 2)]}),
        "expert layout",
        "float32[4, 2]",
        "float32[2, 4]",
    ),
    "another dtype": (
        differing,
        ({"weights": [F32]}, {"weights": [F16]}),
        "expert layout",
        "float16[2, 4]",
        "float32[2, 4]",
    ),
    "another number of tensors": (
        differing,
        ({"weights": [F32]}, {"weights": [F32, F16]}),
        "expert layout",
        "float32[2, 4] + float16[2, 4]",
        "float32[2, 4]",
    ),
    "another device": (differing, ({"weights": [F32]}, {"weights": [F32.to("meta")]}), "device", "meta", "cpu"),
    "another version": (differing_registry, ({}, {"version": "9.9"}), "distribution", "eplb 9.9", "eplb 0."),
    "another distribution": (
        differing_registry,
        ({}, {"distribution": "acme"}),
        "distribution",
        "acme 0.",
        "eplb 0.",
    ),
    "another plugin API": (differing_registry, ({}, {"spec": {"api_version": (0, 7)}}), "plugin API", "0.7", "1."),
    "no package": (without_the_package, (), "cannot build", 'pip install "eplb[nixl]"', "-"),
    "a part of the package is missing": (without_a_part_of_the_package, (), "problem", "nixl._api", ""),
    "an unknown option": (differing, ({}, {"config": "torch_gloo?windwo=1MiB"}), "cannot build", "window", "-"),
    "an unknown backend": (differing, ({}, {"config": "torch_glooo"}), "cannot build", "torch_gloo", "-"),
    "a factory that fails": (
        differing_registry,
        (FAILING, FAILING),
        "problem",
        "OSError: the fabric is on fire",
        "-",
    ),
    "a factory that returns something else": (
        differing_registry,
        (FAILING, {"spec": {"factory": "tests.factory.test_handshake:returns_a_dict"}}),
        "problem",
        "dict, which is not an EplbCommunicator",
        "-",
    ),
}

SAME_PROBLEM: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "unknown backend": (differing, ({"config": "torch_glooo"}, {}), "UnknownBackendError"),
    "unknown option": (differing, ({"config": "nixl?rails=2"}, {}), "ConfigError"),
    "bad grammar": (differing, ({"config": "nixl?window"}, {}), "ConfigError"),
    "wrong device": (differing, ({"weights": [F32.to("meta")]}, {}), "BackendUnavailableError"),
    "factory fails": (
        differing_registry,
        ({"spec": {"factory": "tests.factory.test_handshake:fails_everywhere"}},) * 2,
        "BackendBrokenError",
    ),
    "not a communicator": (
        differing_registry,
        ({"spec": {"factory": "tests.factory.test_handshake:returns_a_dict"}},) * 2,
        "NotACommunicatorError",
    ),
}


# --- what is chosen --------------------------------------------------------------------------------------------------


class Listener(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def chosen(member: Member, config: str | None, **more: Any) -> dict[str, Any]:
    """Return the canonical config of the communicator that is made, and what was logged."""
    listener, log = Listener(), logging.getLogger("eplb_core")
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    try:
        with member.communicator(config, **more) as communicator:
            exchange(member, communicator, ring(RANKS, 1000))
            return {"config": communicator.binding.config, "log": listener.lines}
    finally:
        log.removeHandler(listener)


def chosen_with_environment(member: Member, config: str | None, variables: dict[str, str], **more: Any) -> Any:
    with environment(**variables):
        return chosen(member, config, **more)


def auto_without_nixl_on_one_rank(member: Member) -> dict[str, Any]:
    with without("nixl", member.rank == ODD):
        return chosen(member, "auto?timeout=20s", registry=Registry())


def auto_that_cannot_build_nixl(member: Member, failing: Sequence[int]) -> dict[str, Any]:
    """Each rank's probe works, and yet the ranks cannot build it: they do not reach one another."""

    def refuse(*_: object) -> EplbCommunicator:
        raise BackendUnavailableError("the ranks cannot map each other's memory", name="nixl")

    create = nixl.create
    if member.rank in failing:
        nixl.create = refuse
    try:
        return chosen(member, "auto?timeout=4s", registry=Registry())
    finally:
        nixl.create = create


CHOICES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "nothing": (chosen, (None,), "torch_nccl"),
    "environment": (
        chosen_with_environment,
        (None, {"EPLB_BACKEND": "torch_gloo?timeout=9s"}),
        "torch_gloo?timeout=9s",
    ),
    "argument over environment": (
        chosen_with_environment,
        ("torch_gloo", {"EPLB_BACKEND": "torch_nccl"}),
        "torch_gloo",
    ),
    "option from the environment": (
        chosen_with_environment,
        ("torch_gloo", {"EPLB_BACKEND__TORCH_GLOO__TIMEOUT": "8s"}),
        "torch_gloo?timeout=8s",
    ),
    "string over environment": (
        chosen_with_environment,
        ("torch_gloo?timeout=7s", {"EPLB_BACKEND__TORCH_GLOO__TIMEOUT": "8s"}),
        "torch_gloo?timeout=7s",
    ),
    "auto": (chosen, ("auto",), "nixl"),
    "auto without nixl on one rank": (auto_without_nixl_on_one_rank, (), "torch_nccl?timeout=20s"),
    "auto where all fail to build nixl": (auto_that_cannot_build_nixl, (range(RANKS),), "torch_nccl?timeout=4s"),
    "auto where one fails to build nixl": (auto_that_cannot_build_nixl, ((ODD,),), "torch_nccl?timeout=4s"),
}


@pytest.fixture(scope="module")
def report() -> Report:
    """Everything in this file, in one set of three processes."""
    scenarios = [
        Scenario(name, function, arguments)
        for table in (DIFFERENCES, SAME_PROBLEM, CHOICES)
        for name, (function, arguments, *_) in table.items()
    ]
    scenarios.append(Scenario("closed", what_was_closed))
    scenarios += [Scenario("late", a_member_that_comes_late)]
    scenarios += [Scenario(f"rank {rank} missing", a_member_that_does_not_come, (rank,)) for rank in range(RANKS)]
    return run_scenarios(RANKS, scenarios)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_is_told_on_every_rank_with_the_value_of_each(report: Report, name: str) -> None:
    errors = report.returned(name)
    _, _, row, odd, usual = DIFFERENCES[name]
    assert {error["type"] for error in errors} == {"HandshakeError"}
    assert len({error["text"] for error in errors}) == 1, "the ranks tell different things"
    values = errors[0]["table"][row]
    assert len(values) == RANKS
    for rank, value in enumerate(values):
        assert (odd if rank == ODD else usual) in value


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_is_told_at_once(report: Report, name: str) -> None:
    assert max(error["seconds"] for error in report.returned(name)) < PATIENCE_S


@pytest.mark.parametrize("name", SAME_PROBLEM)
def test_a_problem_of_all_ranks_is_raised_as_itself(report: Report, name: str) -> None:
    assert [error["type"] for error in report.returned(name)] == [SAME_PROBLEM[name][2]] * RANKS


@pytest.mark.parametrize("missing", range(RANKS))
def test_a_rank_that_does_not_come_is_named_within_the_timeout(report: Report, missing: int) -> None:
    errors = [error for error in report.returned(f"rank {missing} missing") if error]
    expected = ["no" if rank == missing else "yes" for rank in range(RANKS)]
    assert len(errors) == RANKS - 1
    for error in errors:
        assert error["type"] == "HandshakeError"
        assert error["table"] == {"answered": expected}
        assert 1.0 <= error["seconds"] < 1.0 + PATIENCE_S


def test_ranks_may_meet_later_than_the_timeout_of_transfers(report: Report) -> None:
    assert report.returned("late") == [[[1]]] * RANKS


def test_what_the_other_ranks_have_built_is_closed_when_one_fails(report: Report) -> None:
    before = sum("factory" in name for name in DIFFERENCES)
    assert [error["closed"] for error in report.returned("closed")] == [
        0 if rank == ODD else before + 1 for rank in range(RANKS)
    ]


@pytest.mark.parametrize("name", CHOICES)
def test_every_rank_takes_the_same_backend_with_the_same_options(report: Report, name: str) -> None:
    assert [made["config"] for made in report.returned(name)] == [CHOICES[name][2]] * RANKS


def test_auto_says_once_what_it_chose_and_why_not_the_others(report: Report) -> None:
    with_reasons = [[line for line in made["log"] if "auto chose" in line] for made in report.returned("auto")]
    assert [len(lines) for lines in with_reasons] == [1, 0, 0]
    line = with_reasons[0][0]
    assert "nixl" in line
    assert "every byte right" in line
    assert "torch_gloo: " in line
    assert "torch_nccl: " in line


def test_auto_says_which_package_a_rank_lacks(report: Report) -> None:
    made = report.returned("auto without nixl on one rank")
    assert any("auto chose torch_nccl" in line and "not installed" in line for line in made[0]["log"])


@pytest.mark.parametrize("name", ["auto where all fail to build nixl", "auto where one fails to build nixl"])
def test_auto_says_why_it_passed_over_a_backend_that_the_ranks_could_not_build(report: Report, name: str) -> None:
    log = report.returned(name)[0]["log"]
    assert any("auto cannot take nixl" in line and "map each other's memory" in line for line in log)
    assert any("auto chose torch_nccl" in line and "nixl: the ranks could not build it" in line for line in log)


def test_every_rank_exits_in_order(report: Report) -> None:
    assert report.exit_codes == [0] * RANKS
