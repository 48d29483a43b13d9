"""The drawing of the rooms in docs/design.md is complete, and says what the code and import-linter say."""

from __future__ import annotations

import ast
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.pages import DOCS, REPOSITORY, blocks_of

CORE = REPOSITORY / "eplb_core"
ENTRANCE = {"__init__", "__main__"}  # modules of the house itself, which are not rooms


@dataclass
class Room:
    """A room as it is drawn."""

    purpose: str
    modules: list[str] = field(default_factory=list)


def drawing() -> list[dict[str, Room]]:
    """Return the floors from the top down, each with its rooms."""
    block = next(block for block in blocks_of(DOCS / "design.md") if "  cli " in block.code)
    floors: list[dict[str, Room]] = [{}]
    for line in block.code.splitlines():
        indent, text = len(line) - len(line.lstrip()), line.strip()
        if not text.strip("─"):
            floors.append({})
        elif indent == 2:
            name, _, purpose = text.partition(" ")
            floors[-1][name] = Room(purpose.strip())
        else:
            room = list(floors[-1].values())[-1]
            room.modules += [word.strip() for word in text.split(",") if word.strip()]
    return floors


ROOMS = {name: room for floor in drawing() for name, room in floor.items()}


def is_package(path: Path) -> bool:
    return (path / "__init__.py").exists()


def purpose_of(room: str) -> str:
    """Return the first sentence of the room's docstring."""
    path = CORE / room
    file = path / "__init__.py" if is_package(path) else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text()))
    assert text is not None
    return text.splitlines()[0].partition(". ")[0].rstrip(".")


def test_the_drawing_has_every_room_and_no_other() -> None:
    packages = {path.name for path in CORE.iterdir() if is_package(path)}
    modules = {path.stem for path in CORE.glob("*.py")} - ENTRANCE
    assert set(ROOMS) == packages | modules


@pytest.mark.parametrize("room", ROOMS)
def test_the_drawing_has_every_module_of_a_room_and_no_other(room: str) -> None:
    modules = [path.stem for path in (CORE / room).glob("*.py") if path.stem != "__init__"]
    packages = [f"{path.name}/" for path in (CORE / room).glob("*") if is_package(path)]
    assert ROOMS[room].modules == sorted(modules + packages)


@pytest.mark.parametrize("room", ROOMS)
def test_the_drawing_says_of_a_room_what_the_room_says(room: str) -> None:
    assert ROOMS[room].purpose == purpose_of(room)


def test_the_floors_are_those_that_import_linter_holds() -> None:
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    assert [set(floor) for floor in drawing()] == [set(layer.split(" | ")) for layer in layers]
