"""The page about checkpoints, loads and placements lists what is tested, and no more."""

from __future__ import annotations

import re

from eplb_core.inputs.layouts import LAYOUTS
from eplb_core.inputs.placement_formats import FORMATS
from tests.support.pages import DOCS
from tests.support.tiny_models import FAMILIES

PAGE = (DOCS / "formats.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table below the line that begins with `heading`."""
    table = PAGE[PAGE.index(heading) :].partition("\n|---")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]


def test_every_family_stands_beside_the_tensors_that_its_experts_have() -> None:
    listed = {}
    for tensors, families in rows("| tensors of an expert |"):
        for family in re.split(r", (?![^(]*\))", families):
            name, _, parts = family.partition(" ")
            listed[name] = (tuple(re.findall(r"`([^`]+)`", tensors)), tuple(re.findall(r"--part (\w+)", parts)))
    assert listed == {name: (family.published, family.parts) for name, family in FAMILIES.items()}


def test_every_layout_is_listed_with_its_example() -> None:
    assert rows("| layout |") == [[layout.name, f"`{layout.example}`"] for layout in LAYOUTS]


def test_every_placement_format_is_listed() -> None:
    assert [row[0] for row in rows("| format |")] == [f"`{name}`" for name in FORMATS]
