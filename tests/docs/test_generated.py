"""What the pages take from the code, and the output that they show, is what the code says now."""

from __future__ import annotations

import html
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.fake_distributions import run_eplb
from tests.support.pages import DOCS, REPOSITORY

STATIC = DOCS / "_static"
VARIES = re.compile(r"(time +)[\d.]+ s|(peak staging +)[\d.]+ \w+")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_contract_is_that_of_the_checks(generate: ModuleType) -> None:
    assert (DOCS / "contract.md").read_text() == generate.contract_page(), "run python docs/generate.py contract"


def test_every_diagram_is_drawn_for_light_and_for_dark_pages(generate: ModuleType) -> None:
    drawn = {path.stem for path in STATIC.glob("*-light.svg")} | {path.stem for path in STATIC.glob("*-dark.svg")}
    assert drawn == {f"{name}-{theme}" for name in generate.DIAGRAMS for theme in ("light", "dark")}


def test_a_diagram_has_the_words_of_its_source(generate: ModuleType) -> None:
    for name, source in generate.DIAGRAMS.items():
        labels = re.findall(r'label="([^"]+)"', source)
        words = {word for label in labels for word in re.split(r"\\[nl]|\s+", label) if word.isalpha()}
        for theme in ("light", "dark"):
            text = html.unescape(re.sub(r"<[^>]+>", " ", (STATIC / f"{name}-{theme}.svg").read_text()))
            assert words <= set(text.split()), (name, theme, words - set(text.split()))


def words_of(output: str) -> list[str]:
    """Return what a report says, with what varies from run to run left out."""
    return VARIES.sub(r"\1\2", output).split()


def test_the_report_in_the_readme_and_in_commands_is_what_the_job_prints(tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    shown = readme.partition("```text\n")[2].partition("```")[0]
    (job,) = re.findall(r"\.venv/bin/eplb (rebalance .*?) --plot", readme)
    assert run_eplb("make-checkpoint", "demo-checkpoint", cwd=tmp_path).returncode == 0
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")

    done = run_eplb(*shlex.split(job), cwd=tmp_path, timeout_s=110)

    assert done.returncode == 0, done.stderr
    printed = words_of(done.stdout)
    assert printed == words_of(shown)
    commands = (DOCS / "commands.md").read_text().partition(f"$ eplb {job}\n")[2].partition("```")[0]
    assert printed == words_of(commands)


def test_the_recording_on_the_first_page_shows_the_same_report() -> None:
    readme = (REPOSITORY / "README.md").read_text().partition("```text\n")[2].partition("```")[0]
    recorded = html.unescape(re.sub(r"<[^>]+>", " ", (STATIC / "demo.svg").read_text())).replace("\xa0", " ")
    for row in ("mean over layers", "worst layer", "between ranks (remote)", "within a rank (local)", "verified"):
        (line,) = [line for line in readme.splitlines() if line.strip().startswith(row)]
        assert set(line.replace(":", " ").split()) <= set(recorded.replace(":", " ").split()), row
