"""How functions of vLLM are replaced: everywhere, once, only where they are as expected; modules made up for it."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from eplb_vllm import engine_log, seams, signatures
from eplb_vllm.after_import import when_imported
from test_doctor import write_package


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `vllm` that can be imported and has the functions that are expected; forgotten afterwards."""
    made = write_package(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield made
    for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
        del sys.modules[name]


def communicator_module() -> ModuleType:
    return importlib.import_module(signatures.COMMUNICATOR)


def test_the_factory_is_replaced_wherever_it_was_imported_and_only_once(package: Path) -> None:
    module = communicator_module()
    original = module.create_eplb_communicator
    user: Any = ModuleType("vllm.user")
    user.create_eplb_communicator = original
    stranger: Any = ModuleType("stranger")
    stranger.create_eplb_communicator = original
    sys.modules |= {"vllm.user": user, "stranger": stranger}
    try:
        seams.install_factory(module)
        first = module.create_eplb_communicator
        seams.install_factory(module)
    finally:
        del sys.modules["stranger"]
    assert first is not original
    assert module.create_eplb_communicator is first is user.create_eplb_communicator
    assert stranger.create_eplb_communicator is original
    assert seams.expected(module)  # as it was before it was replaced


def test_vllm_s_own_names_go_to_its_own_factory(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EPLB_BACKEND", raising=False)
    module = communicator_module()
    asked: list[Any] = []
    module.create_eplb_communicator = lambda *arguments: asked.append(arguments) or "vLLM's own"  # type: ignore[attr-defined]
    seams.install_factory(module)
    assert module.create_eplb_communicator("group", "nixl", [["weights"]], ["buffer"]) == "vLLM's own"
    assert asked == [("group", "nixl", [["weights"]], ["buffer"])]


def test_an_unknown_vllm_is_left_alone_with_one_line(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = package / "distributed/eplb/eplb_communicator.py"
    file.write_text(file.read_text().replace("expert_buffer", "landing"))
    with caplog.at_level(logging.WARNING, engine_log.NAME):
        assert not seams.expected(communicator_module())
    (line,) = [record.getMessage() for record in caplog.records]
    assert "leaves vLLM" in line
    assert "create_eplb_communicator takes (group_coordinator, backend, expert_weights, landing)" in line


def test_an_unknown_vllm_is_refused_where_that_is_asked_for(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = package / "distributed/eplb/eplb_communicator.py"
    file.write_text(file.read_text().replace("expert_id", "expert"))
    monkeypatch.setenv("EPLB_VLLM_ON_UNKNOWN", "refuse")
    with pytest.raises(RuntimeError, match=r"add_send takes \(self, tensors, dst_rank, expert\).*refuse"):
        seams.expected(communicator_module())


def test_a_module_is_reported_when_it_is_imported_and_at_once_if_it_is_already(package: Path) -> None:
    seen: list[str] = []
    when_imported(signatures.COMMUNICATOR, lambda module: seen.append(f"first {module.__name__}"))
    when_imported(signatures.COMMUNICATOR, lambda module: seen.append("second"))
    assert seen == []
    module = communicator_module()
    assert seen == [f"first {signatures.COMMUNICATOR}", "second"]
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"  # type: ignore[union-attr]
    when_imported(signatures.COMMUNICATOR, lambda _: seen.append("third"))
    assert seen[2:] == ["third"]
