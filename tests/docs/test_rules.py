"""Every rule for waits and failures names tests that exist, and has a row of its own."""

from __future__ import annotations

import ast
import functools
import itertools
import re

import pytest

from tests.support.pages import DOCS, REPOSITORY

PAGE = DOCS / "rules.md"
HEADING = "## Which test checks which rule"
_ROW = re.compile(r"^\| ([A-Z]\d+) \|", re.MULTILINE)
_ENTRY = re.compile(r"^- ([A-Z]\d+): (.+(?:\n  .+)*)", re.MULTILINE)
_TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


@functools.cache
def parts() -> tuple[str, str]:
    """Return the rules, and what names their tests."""
    rules, heading, tests = PAGE.read_text().partition(HEADING)
    assert heading
    return rules, tests


def entries() -> list[tuple[str, str]]:
    return _ENTRY.findall(parts()[1])


@functools.cache
def names_in(file: str) -> frozenset[str]:
    tree = ast.parse((REPOSITORY / "tests" / file).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_rules_are_numbered_one_after_the_other() -> None:
    numbers = _ROW.findall(parts()[0])
    by_letter = {letter: list(group) for letter, group in itertools.groupby(numbers, key=lambda number: number[0])}
    assert numbers == [f"{letter}{i}" for letter, group in by_letter.items() for i in range(1, len(group) + 1)]
    assert len(numbers) > 30


def test_every_rule_is_listed_with_its_tests_and_nothing_else_is() -> None:
    assert [number for number, _ in entries()] == _ROW.findall(parts()[0])


@pytest.mark.parametrize(("number", "named"), entries(), ids=[number for number, _ in entries()])
def test_the_tests_of_a_rule_exist(number: str, named: str) -> None:
    found = _TEST.findall(named)
    assert found, f"{number} names no test"
    assert len(found) == named.count("`") // 2, f"{number}: what is not file.py::test_name is not a test"
    for file, test in found:
        assert test.startswith("test_")
        assert test in names_in(file), f"{number}: there is no {test} in tests/{file}"
