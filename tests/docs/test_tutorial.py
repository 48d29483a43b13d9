"""The tutorial's code is the code of `eplb-shm`, and after each step it does what the page says."""

from __future__ import annotations

import re
import shlex
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_distributions import install, run_child, run_eplb
from tests.support.pages import DOCS, REPOSITORY, Block, blocks_of

PAGE = list(blocks_of(DOCS / "write-a-backend.md"))
PLUGIN = REPOSITORY / "plugins" / "eplb-shm"
MODULES = sorted(path.name for path in (PLUGIN / "src" / "eplb_shm").glob("[a-z]*.py"))
TRIALS = [index for index, block in enumerate(PAGE) if block.mark == "tutorial"]


def shown(file: str, before: int | None = None) -> str:
    """Return what the page has shown of a file, of all blocks or of those before one of them."""
    return "\n\n".join(block.code.strip("\n") for block in PAGE[:before] if block.caption == file)


def lines_of(code: str) -> list[str]:
    """Return the lines that are not blank: between two blocks nobody counts the others."""
    return [line for line in code.splitlines() if line.strip()]


def contains(whole: Any, part: Any) -> bool:
    """Whether everything that `part` says is in `whole`."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and contains(whole[key], part[key]) for key in part)
    return bool(whole == part)


@pytest.mark.parametrize("module", MODULES)
def test_the_blocks_of_a_module_are_the_module_of_the_plugin(module: str) -> None:
    assert lines_of(shown(f"eplb_shm/{module}")) == lines_of((PLUGIN / "src" / "eplb_shm" / module).read_text())


def test_the_tests_that_are_shown_are_those_of_the_plugin() -> None:
    assert lines_of(shown("tests/test_conformance.py")) == lines_of((PLUGIN / "tests/test_conformance.py").read_text())


def test_the_pyproject_that_is_shown_is_part_of_the_plugins() -> None:
    assert contains(tomllib.loads((PLUGIN / "pyproject.toml").read_text()), tomllib.loads(shown("pyproject.toml")))


def test_every_block_is_part_of_a_file_or_tried_or_a_command_that_is_tested_elsewhere() -> None:
    known = {"eplb new-backend acme", "eplb conformance shm --ranks 3"}
    assert [str(each) for each in PAGE if not each.caption and not each.mark and each.code.strip() not in known] == []


def test_how_many_lines_it_says_are_about_how_many_there_are() -> None:
    (said,) = re.findall(r"in five files and (\d+) lines", (DOCS / "write-a-backend.md").read_text())
    assert (
        abs(int(said) - sum(len((PLUGIN / "src/eplb_shm" / module).read_text().splitlines()) for module in MODULES))
        < 20
    )


def installed_before(trial: int, folder: Path) -> Path:
    """Install the plugin as far as the page has shown it before a block."""
    project = tomllib.loads(shown("pyproject.toml"))["project"]
    install(folder, project["name"], version=project["version"], backends=project["entry-points"]["eplb.backends"])
    package = folder / "eplb_shm"
    package.mkdir()
    (package / "__init__.py").touch()
    for module in MODULES:
        if code := shown(f"eplb_shm/{module}", trial):
            (package / module).write_text(code + "\n")
    return folder


def check_commands(block: Block, site: Path, cwd: Path) -> None:
    for session in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        line, _, expected = session.partition("\n")
        child = run_eplb(*shlex.split(line)[1:], path=[site], cwd=cwd, environment={"COLUMNS": "100"})
        assert (child.stdout + child.stderr).split() == expected.split(), line


def check_program(block: Block, site: Path, cwd: Path) -> None:
    child = run_child(["-c", textwrap.dedent(block.code)], path=[site], cwd=cwd)
    assert child.returncode == 0, child.stderr


def check_job(block: Block, site: Path, cwd: Path) -> None:
    (cwd / "published-loads.json").write_bytes((REPOSITORY / "examples/published-loads.json").read_bytes())
    for line in block.code.splitlines():
        child = run_eplb(*shlex.split(line)[1:], path=[site], cwd=cwd)
        assert child.returncode == 0, child.stderr
    assert re.search(r"verified +yes", child.stdout), child.stdout


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: str(PAGE[trial]))
def test_after_each_step_it_does_what_the_page_says(trial: int, tmp_path: Path) -> None:
    check = {"console": check_commands, "python": check_program, "sh": check_job}[PAGE[trial].language]
    check(PAGE[trial], installed_before(trial, tmp_path / "site"), tmp_path)


def test_every_kind_of_trial_is_there() -> None:
    assert {PAGE[trial].language for trial in TRIALS} == {"console", "python", "sh"}
