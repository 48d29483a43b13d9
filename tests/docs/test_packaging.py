"""What is published says the truth: one version, lower bounds that are tested, links that lead somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import eplb_core
from eplb_core.extras import EXTRAS

REPOSITORY = Path(__file__).parents[2]
PROJECTS = sorted(path.parent for path in [REPOSITORY / "pyproject.toml", *REPOSITORY.glob("plugins/*/pyproject.toml")])
LINK = "https://github.com/eplb-project/eplb"


def _pyproject(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text())


def _requirements(folder: Path) -> list[str]:
    project = _pyproject(folder)["project"]
    return [
        *project["dependencies"],
        *(text for extra in project.get("optional-dependencies", {}).values() for text in extra),
    ]


@pytest.mark.parametrize("folder", PROJECTS, ids=lambda folder: folder.name)
def test_the_version_of_a_distribution_is_written_once(folder: Path) -> None:
    document = _pyproject(folder)
    sources = [source for root in ("src", "eplb_core") for source in (folder / root).rglob("*.py")]
    written = [
        str(source.relative_to(folder)) for source in sources if re.search("^__version__ =", source.read_text(), re.M)
    ]
    if "version" in document["project"]:
        assert written == []
    else:
        assert document["project"]["dynamic"].count("version") == 1
        assert written == [document["tool"]["hatch"]["version"]["path"]]


def test_the_installed_metadata_has_the_version_of_the_package() -> None:
    from importlib.metadata import version

    assert version("eplb") == eplb_core.__version__


@pytest.mark.parametrize("folder", PROJECTS, ids=lambda folder: folder.name)
def test_the_metadata_of_a_distribution_says_where_its_source_is(folder: Path) -> None:
    urls = _pyproject(folder)["project"]["urls"]
    assert urls["Source"].startswith(LINK)
    assert urls["Issues"] == f"{LINK}/issues"


def test_the_core_depends_on_what_engines_need_and_no_more() -> None:
    names = {re.split("[^A-Za-z0-9-]", text)[0] for text in _pyproject(REPOSITORY)["project"]["dependencies"]}
    assert names == {"torch", "numpy", "pluggy", "importlib-metadata", "msgspec"}


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_the_modules_of_an_extra_are_what_it_installs(extra: str) -> None:
    texts = _pyproject(REPOSITORY)["project"]["optional-dependencies"][extra]
    names = {re.split("[^A-Za-z0-9-]", text)[0] for text in texts}
    assert {name.replace("-", "_") for name in names} == set(EXTRAS[extra])


def test_the_oldest_constraints_are_the_lower_bounds() -> None:
    pins = dict(
        line.split("==") for line in (REPOSITORY / "constraints-oldest.txt").read_text().splitlines() if "==" in line
    )
    bounds: dict[str, str] = {}
    for folder in (REPOSITORY, REPOSITORY / "plugins/eplb-prometheus"):
        for text in _requirements(folder):
            if match := re.fullmatch(r"([A-Za-z0-9-]+)>=([0-9.]+)", text):
                bounds[match[1]] = match[2]
    assert pins == {name: bounds[name] for name in pins}
    core = _pyproject(REPOSITORY)["project"]
    needed = {*core["dependencies"], *core["optional-dependencies"]["cli"], *core["optional-dependencies"]["testing"]}
    assert {re.split(">=", text)[0] for text in needed} <= set(pins)


def test_the_readme_has_no_relative_links_on_the_index() -> None:
    hook = _pyproject(REPOSITORY)["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = (REPOSITORY / "README.md").read_text()
    before = re.findall(r"!?\[[^\]]*\]\((?!https?:|#)[^)]+\)", text)

    for substitution in hook["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)

    assert len(before) > 10
    assert re.findall(r"!?\[[^\]]*\]\((?!https?:|#)[^)]+\)", text) == []
    targets = re.findall(rf"{LINK}/blob/main/([^)#]+)|raw\.githubusercontent\.com/eplb-project/eplb/main/([^)]+)", text)
    assert len(targets) >= len(before)
    assert [path for pair in targets for path in pair if path and not (REPOSITORY / path).exists()] == []


def test_a_workflow_runs_stages_that_there_are() -> None:
    script = (REPOSITORY / ".ci/run").read_text()
    stages = set(re.findall(r"^stage_(\w+)\(\)", script, re.MULTILINE))
    nightly = (REPOSITORY / ".github/workflows/nightly.yml").read_text()
    ci = (REPOSITORY / ".github/workflows/ci.yml").read_text()
    called = re.findall(r"stages: ([\w ]+),", nightly) + re.findall(r"\.ci/run ([\w ]+)$", ci, re.MULTILINE)
    assert len(called) >= 5
    assert {stage for text in called for stage in text.split()} <= stages
