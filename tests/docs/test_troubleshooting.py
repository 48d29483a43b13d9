"""The index of symptoms has every error class, and quotes what the code says."""

from __future__ import annotations

import re

import pytest

from eplb_core import errors
from tests.support.pages import DOCS, REPOSITORY

PAGE = (DOCS / "troubleshooting.md").read_text()
ROWS = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| ") and "you see" not in line]
QUOTED = sorted({text for row in ROWS for text in re.findall(r"`([^`]+)`", row[0]) if not text.startswith("eplb ")})
SOURCES = "".join(
    re.sub(r'"\s*\n\s*f?"', "", path.read_text())
    for folder in ("eplb_core", "eplb_backends")
    for path in (REPOSITORY / folder).rglob("*.py")
)
CLASSES = [
    name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.EplbError)
]


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_class_is_in_the_index(name: str) -> None:
    assert any(f"`{name}`" in row[1] for row in ROWS)


@pytest.mark.parametrize("text", QUOTED)
def test_what_the_index_quotes_is_what_the_code_says(text: str) -> None:
    assert text in SOURCES


def test_the_tree_of_errors_has_every_class() -> None:
    tree = (DOCS / "errors.md").read_text().partition("```text")[2].partition("```")[0]
    assert sorted(set(re.findall(r"\w+Error\b", tree))) == sorted(CLASSES)
