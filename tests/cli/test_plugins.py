"""`eplb plugins` shows every hook plugin, what it listens to, where it came from, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_distributions import install, run_eplb

_LISTENER = """
from eplb_core.hooks import hookimpl
print("noise")
@hookimpl
def eplb_rearrange_failed(event): ...
@hookimpl
def eplb_transfer_started(event): ...
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site-packages folder with a plugin of each kind of health."""
    install(tmp_path, "aa-metrics", version="2.5", plugins={"metrics": "aa"}, modules={"aa": _LISTENER})
    misspelt = _LISTENER.replace("transfer_started", "transfer_startet")
    install(tmp_path, "bb", plugins={"typo": "bb_plugin"}, modules={"bb_plugin": misspelt})
    install(tmp_path, "cc", version="0.3", plugins={"raises": "cc_plugin"}, modules={"cc_plugin": "import [red]"})
    return tmp_path


def document(path: Path) -> dict[str, Any]:
    done = run_eplb("plugins", "--json", "-", path=[path])
    assert done.returncode == 0, done.stderr
    return {plugin["name"]: plugin for plugin in json.loads(done.stdout)["plugins"]}


def rows(table: str) -> dict[str, list[str]]:
    """Return the cells of a printed table by their first, without its head; a cell of several lines is joined."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in table.splitlines():
        if line.startswith("│"):
            first, *rest = (cell.strip() for cell in line.split("│")[1:-1])
            name = first or name
            found[name] = [f"{a} {b}".strip() for a, b in zip(found.get(name, [""] * len(rest)), rest, strict=True)]
    return found


def test_each_plugin_is_listed_with_its_origin_its_hooks_and_what_is_wrong(site: Path) -> None:
    found = document(site)
    assert found["metrics"] == {
        "name": "metrics",
        "distribution": "aa-metrics",
        "version": "2.5",
        "location": str(site),
        "entry_point": "aa",
        "state": "ready",
        "hooks": ["eplb_transfer_started", "eplb_rearrange_failed"],
        "problem": "",
    }
    assert (found["typo"]["state"], found["typo"]["hooks"]) == ("misspelt hook", ["eplb_rearrange_failed"])
    assert found["typo"]["problem"].startswith("there is no hook 'eplb_transfer_startet', did you mean")
    assert (found["raises"]["state"], found["raises"]["hooks"]) == ("broken", [])
    assert found["raises"]["problem"].startswith("SyntaxError: ")


def test_the_table_shows_the_same(site: Path) -> None:
    done = run_eplb("plugins", path=[site])
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert found["metrics"] == ["aa-metrics", "2.5", "ready", "eplb_transfer_started eplb_rearrange_failed", ""]
    assert found["typo"][:4] == ["bb", "1.0", "misspelt hook", "eplb_rearrange_failed"]
    assert found["raises"][:4] == ["cc", "0.3", "broken", ""]
    assert f"metrics@aa-metrics: aa, installed in {site}" in done.stdout


def test_every_hook_is_listed_with_the_plugins_that_implement_it(site: Path) -> None:
    done = run_eplb("plugins", "--hooks", path=[site])
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    when, plugins = found["eplb_rearrange_failed"]
    assert when == "A rearrangement failed on this rank."
    assert {"metrics@aa-metrics", "typo@bb"} <= set(plugins.split())
    assert "metrics@aa-metrics" not in found["eplb_choose_backend"][1]


def test_all_backends_are_listed_with_the_versions_of_their_distributions() -> None:
    done = run_eplb("backends", "--json", "-")
    assert all(backend["version"] for backend in json.loads(done.stdout)["backends"])
