"""The pages about hooks: their plugin works as they say, their code runs, and no hook or event is left out."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from eplb_core.hooks import HookSpecifications
from eplb_core.hooks.host import hook_summaries
from tests.support.fake_distributions import install, run_child, run_eplb
from tests.support.pages import DOCS, blocks_of

GUIDE, REFERENCE = DOCS / "observe.md", DOCS / "api" / "hooks.md"
FILES = {block.caption: block.code for block in blocks_of(GUIDE) if block.caption and not block.mark}


@pytest.fixture
def acme(tmp_path: Path) -> Path:
    """The folder into which the guide's plugin is installed, with the entry point of its pyproject.toml."""
    project = tomllib.loads(FILES["pyproject.toml"])["project"]
    site = tmp_path / "site"
    install(site, project["name"], version=project["version"], plugins=project["entry-points"]["eplb.plugins"])
    (site / "acme_alerts.py").write_text(FILES["acme_alerts.py"])
    return site


def test_the_plugin_of_the_guide_is_found_with_its_hooks(acme: Path) -> None:
    child = run_eplb("plugins", "--json", "-", path=[acme])
    alerts = next(each for each in json.loads(child.stdout)["plugins"] if each["name"] == "alerts")
    assert (alerts["distribution"], alerts["version"], alerts["state"]) == ("acme-alerts", "1.0", "ready")
    assert alerts["hooks"] == ["eplb_transfer_failed", "eplb_rearrange_failed"]


def test_its_own_test_passes(acme: Path, tmp_path: Path) -> None:
    (tmp_path / "test_alerts.py").write_text(FILES["test_alerts.py"])
    child = run_child(["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_alerts.py"], [acme], cwd=tmp_path)
    assert child.returncode == 0, child.stdout
    assert "1 passed" in child.stdout


def test_all_python_of_both_pages_is_run_by_a_test() -> None:
    code = [block for page in (GUIDE, REFERENCE) for block in blocks_of(page) if block.language == "python"]
    here = {"acme_alerts.py", "test_alerts.py"}
    assert [str(block) for block in code if block.mark not in ("run", "two-ranks") and block.caption not in here] == []


@pytest.mark.parametrize("hook", hook_summaries())
def test_every_hook_is_in_the_reference_and_in_an_example_there(hook: str) -> None:
    assert re.search(rf"^\| `{hook}` \|", REFERENCE.read_text(), re.MULTILINE)
    assert any(f"def {hook}(" in block.code for block in blocks_of(REFERENCE))


@pytest.mark.parametrize(
    "event",
    [
        spec.__annotations__["event"]
        for spec in vars(HookSpecifications).values()
        if "event" in getattr(spec, "__annotations__", {})
    ],
)
def test_every_event_is_in_the_guide_and_in_the_reference(event: str) -> None:
    assert f"| `{event}` |" in GUIDE.read_text()
    assert f"autoclass:: eplb_core.hooks.events.{event}\n" in REFERENCE.read_text()
