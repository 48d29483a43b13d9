"""Which backend is meant by vLLM's setting and the environment, without vLLM."""

from __future__ import annotations

import pytest
from eplb_vllm.choice import check, choose, patience

from eplb_core.errors import BackendUnavailableError, ConfigError, UnknownBackendError

ENGINE = {"torch_nccl", "torch_gloo", "torch_xccl", "nixl", "pynccl"}


@pytest.mark.parametrize(
    ("communicator", "variable", "expected"),
    [
        (None, None, None),
        ("nixl", None, None),
        ("nixl", "", None),
        ("nixl", "torch_gloo", "torch_gloo"),
        (None, "torch_gloo", "torch_gloo"),
        ("eplb:nixl", "torch_gloo", "nixl"),
        ("shm", "torch_gloo", "shm"),
        ("auto", None, "auto"),
    ],
)
def test_the_setting_comes_first_unless_it_names_vllm_s_own(
    communicator: str | None, variable: str | None, expected: str | None
) -> None:
    chosen = choose(communicator, ENGINE, {} if variable is None else {"EPLB_BACKEND": variable})
    assert (None if chosen is None else chosen.config) == expected


def checked(communicator: str, *, beside_inference: bool = False) -> None:
    chosen = choose(communicator, ENGINE, {})
    assert chosen is not None
    check(chosen, ENGINE, beside_inference=beside_inference)


@pytest.mark.parametrize("communicator", ["eplb:torch_gloo?timeout=5s", "eplb:auto", "auto?timeout=5s", "eplb:pynccl"])
def test_what_can_be_used_is_accepted(communicator: str) -> None:
    checked(communicator)


@pytest.mark.parametrize(
    ("communicator", "error", "said"),
    [
        ("torch_glo", ConfigError, "did you mean 'torch_gloo'"),
        ("eplb:torch_glo", UnknownBackendError, "did you mean 'torch_gloo'"),
        ("torch_gloo?timeout=5s", ConfigError, "write eplb:torch_gloo"),
        ("eplb:torch_gloo?timeot=5s", ConfigError, "did you mean 'timeout'"),
        ("eplb:", ConfigError, "missing"),
    ],
)
def test_what_cannot_is_refused_with_the_remedy(communicator: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        checked(communicator)


def test_a_backend_without_background_is_refused_beside_inference_only() -> None:
    checked("eplb:torch_nccl")
    with pytest.raises(BackendUnavailableError, match=r"set use_async to false, or choose one that can: .*torch_gloo"):
        checked("eplb:torch_nccl", beside_inference=True)


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
