"""What the environment asks for, and what is refused, without SGLang."""

from __future__ import annotations

import pytest
from eplb_sglang.choice import Choice, check, patience, problem, read

from eplb_core.errors import ConfigError, EplbError, PolicyError, UnknownBackendError


def asked(**variables: str) -> Choice:
    return read({f"EPLB_{name}": value for name, value in variables.items()})


def test_nothing_is_asked_for_unless_a_variable_says_so() -> None:
    assert asked() == asked(BACKEND="", POLICY="") == Choice(None, None, "serve", "leave")


@pytest.mark.parametrize("backend", ["torch_gloo?timeout=5s", "auto", "auto?timeout=5s", "nixl?window=512MiB"])
def test_what_can_be_used_is_accepted(backend: str) -> None:
    check(asked(BACKEND=backend, POLICY="incremental?within=0.01", SGLANG_ON_FAILURE="raise"))


@pytest.mark.parametrize(
    ("variable", "value", "error", "said"),
    [
        ("BACKEND", "torch_glo", UnknownBackendError, "did you mean 'torch_gloo'"),
        ("BACKEND", "torch_gloo?timeot=5s", ConfigError, "did you mean 'timeout'"),
        ("BACKEND", "torch_gloo?timeout=5", ConfigError, "unit"),
        ("POLICY", "incrementl", PolicyError, "did you mean incremental"),
        ("POLICY", "incremental?group=keep", ConfigError, "did you mean 'groups'"),
        ("SGLANG_ON_FAILURE", "serv", ConfigError, "did you mean 'serve'"),
        ("SGLANG_ON_UNKNOWN", "ignore", ConfigError, "leave or refuse"),
    ],
)
def test_what_cannot_is_refused_with_the_remedy_and_the_variable(
    variable: str, value: str, error: type[EplbError], said: str
) -> None:
    choice = asked(**{"BACKEND": "torch_gloo", variable: value})
    with pytest.raises(error, match=said):
        check(choice)
    found = problem(choice)
    assert found is not None
    assert found[0] == f"EPLB_{variable}"
    assert isinstance(found[1], error)


def test_a_choice_without_faults_has_no_problem() -> None:
    assert problem(asked(BACKEND="nixl", POLICY="deepseek")) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("torch_gloo", {"start_timeout": 600.0}),
        ("auto", {"start_timeout": 600.0}),
        ("torch_gloo?start_timeout=5s", {}),
        ("no_such", {}),
    ],
)
def test_ranks_wait_longer_for_one_another_unless_the_string_says_how_long(
    config: str, expected: dict[str, object]
) -> None:
    assert patience(config, 600.0) == expected
