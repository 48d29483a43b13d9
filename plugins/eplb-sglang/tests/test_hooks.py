"""Which hooks are registered, and how those that SGLang has not put in place are noticed; with a made-up SGLang."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from eplb_sglang import choice, plugin, signatures
from eplb_sglang.hooks import Hooks, is_live
from made_up_sglang import write_package

from eplb_core.errors import UnknownBackendError

ASKED = choice.Choice("torch_gloo", "deepseek", "serve", "leave")
REGISTRY = """
import enum
class HookType(enum.Enum):
    BEFORE, AFTER, AROUND, REPLACE = range(4)
class HookRegistry:
    registered = []
    @classmethod
    def register(cls, target, hook, hook_type=HookType.AFTER, *, source=None):
        cls.registered.append((target, hook_type.name))
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `sglang` that can be imported and has what is expected; forgotten afterwards."""
    made = write_package(tmp_path)
    (made / "srt/plugins/hook_registry.py").write_text(REGISTRY)
    monkeypatch.syspath_prepend(tmp_path)
    for variable in (choice.BACKEND, choice.POLICY, choice.ON_FAILURE, choice.ON_UNKNOWN):
        monkeypatch.delenv(variable, raising=False)
    importlib.invalidate_caches()
    plugin.installed.cache_clear()
    yield made
    plugin.installed.cache_clear()
    for name in [name for name in sys.modules if name == "sglang" or name.startswith("sglang.")]:
        del sys.modules[name]


def registered() -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = importlib.import_module(signatures.REGISTRY).HookRegistry.registered
    return found


def test_nothing_of_sglang_is_touched_unless_something_is_asked_for(package: Path) -> None:
    plugin.register()
    assert not [name for name in sys.modules if name.startswith("sglang")]


def test_hooks_are_registered_once_and_only_those_that_are_needed(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(choice.POLICY, "incremental")
    plugin.register()
    plugin.register()
    assert registered() == [(signatures.START, "BEFORE"), (signatures.REBALANCE, "AROUND")]
    registered().clear()
    plugin.installed.cache_clear()
    monkeypatch.delenv(choice.POLICY)
    monkeypatch.setenv(choice.BACKEND, "nixl")
    plugin.register()
    assert registered() == [
        (signatures.START, "BEFORE"),
        (signatures.LOADED, "AFTER"),
        (signatures.SLEEP, "BEFORE"),
        (signatures.MOVE, "REPLACE"),
    ]


def test_an_sglang_that_is_not_as_expected_is_left_alone_with_one_line_or_refused(
    package: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = package / "srt/eplb/expert_location_updater.py"
    file.write_text(file.read_text().replace("nnodes, ", "nnodes, tenant, ", 1))
    monkeypatch.setenv(choice.BACKEND, "nixl")
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert registered() == []
    assert len(caplog.messages) == 1
    assert "leaves SGLang" in caplog.messages[0]
    assert "_update_expert_weights_raw has (" in caplog.messages[0]
    plugin.installed.cache_clear()
    monkeypatch.setenv(choice.ON_UNKNOWN, "refuse")
    with pytest.raises(SystemExit, match="EPLB_SGLANG_ON_UNKNOWN=refuse"):
        plugin.register()


@pytest.mark.parametrize(("tags", "closed"), [(None, True), ([], True), (["weights"], True), (["kv_cache"], False)])
def test_weights_whose_memory_is_released_are_let_go_of(tags: list[str] | None, closed: bool) -> None:
    calls: list[str] = []
    hooks = Hooks(ASKED)
    hooks.mover = SimpleNamespace(close=lambda: calls.append("close"))  # type: ignore[assignment]
    hooks.before_sleep(None, SimpleNamespace(tags=tags))
    assert calls == (["close"] if closed else [])
    assert (hooks.mover is None) is closed


# --- hooks that are live, and others ---------------------------------------------------------------------------------


def wrap(path: str, hook: Callable[..., Any], kind: str) -> None:
    """Put a hook in place as SGLang does: a wrapper that says what it wraps."""
    owner_path, _, name = path.rpartition(".")
    module_name, _, class_name = owner_path.rpartition(".")
    try:
        owner: Any = importlib.import_module(owner_path)
    except ImportError:
        owner = getattr(importlib.import_module(module_name), class_name)
    original = getattr(owner, name)

    @functools.wraps(original)
    def replacing(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs)

    @functools.wraps(original)
    def around(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    @functools.wraps(original)
    def beside(*args: Any, **kwargs: Any) -> Any:
        hook(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, {"REPLACE": replacing, "AROUND": around}.get(kind, beside))


def in_place(hooks: Hooks, but: str = "") -> None:
    for path, hook, kind in hooks.table():
        if path != but:
            wrap(path, hook, kind)


def test_hooks_that_are_in_place_let_sglang_start(package: Path) -> None:
    hooks = Hooks(ASKED)
    assert not any(is_live(path, hook) for path, hook, _ in hooks.table())
    in_place(hooks)
    assert all(is_live(path, hook) for path, hook, _ in hooks.table())
    hooks.before_start()


@pytest.mark.parametrize(
    "path", [signatures.START, signatures.LOADED, signatures.SLEEP, signatures.MOVE, signatures.REBALANCE]
)
def test_a_hook_that_is_not_in_place_is_named_at_the_start(package: Path, path: str) -> None:
    hooks = Hooks(ASKED)
    in_place(hooks, but=path)
    with pytest.raises(RuntimeError, match=f"EPLB_BACKEND=torch_gloo and EPLB_POLICY=deepseek.* {path}: see"):
        hooks.before_start()


def test_a_hook_that_another_plugin_replaces_is_not_live_and_one_that_it_wraps_is(package: Path) -> None:
    hooks = Hooks(ASKED)
    in_place(hooks)
    wrap(signatures.MOVE, lambda original, **kwargs: original(**kwargs), "AROUND")
    assert is_live(signatures.MOVE, hooks.move)
    wrap(signatures.MOVE, lambda **_: {}, "REPLACE")
    assert not is_live(signatures.MOVE, hooks.move)


def test_a_typo_is_refused_before_anything_else(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UnknownBackendError, match="did you mean 'torch_gloo'"):
        Hooks(choice.Choice("torch_glo", None, "serve", "leave")).before_start()
    assert "from environment variable EPLB_BACKEND" in caplog.text
