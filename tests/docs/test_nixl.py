"""docs/nixl.md says what the code does: its options, its errors, its environment."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from eplb_backends.nixl import agent
from eplb_backends.nixl.options import NixlOptions
from eplb_core.contract.options import option_types

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "nixl.md").read_text()
SOURCES = "".join(path.read_text() for path in sorted((REPOSITORY / "eplb_backends" / "nixl").glob("*.py")))


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading, without its head."""
    section = PAGE[PAGE.index(f"## {heading}\n") :].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_table_of_options_is_that_of_the_options_class() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(NixlOptions)}
    units = {"ByteSize": "bytes", "Duration": "time"}
    expected = {}
    for key, kind in option_types(NixlOptions).items():
        unit = "GB/s" if key.endswith("gbps") else units.get(getattr(kind.kind, "__name__", ""), "")
        expected[key] = (unit, kind.format(defaults[key]))
    assert {key.strip("`"): (unit, default.strip("`")) for key, unit, default, _ in rows("Options")} == expected


def test_every_value_that_an_option_takes_is_explained() -> None:
    meanings = {key.strip("`"): meaning for key, _, _, meaning in rows("Options")}
    defaults = {field.name: field.default for field in dataclasses.fields(NixlOptions)}
    for key, kind in option_types(NixlOptions).items():
        for choice in set(kind.choices) - {defaults[key]}:
            assert f"`{choice}`" in meanings[key], (key, choice)


@pytest.mark.parametrize("text", [row[0] for row in rows("Errors")])
def test_every_error_in_the_table_is_one_that_the_backend_raises(text: str) -> None:
    for part in re.findall(r"`([^`]+)`", text):
        assert part in SOURCES, part


def test_the_table_of_the_environment_is_what_is_set() -> None:
    shown = {name.strip("`"): value.strip("`") for name, value, _ in rows("Environment")}
    assert shown == agent.ENVIRONMENT | agent.CUDA_ENVIRONMENT
