"""vLLM's own transfer and rearrangement functions, with the worlds, layers and experts of its tests, on CPU ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cpu_engine.cases import SHAPES
from engine_process import run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

BACKENDS = ("torch_gloo", "nixl?window=8MiB", "shm")


@pytest.fixture(scope="module")
def answers(python: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Case and rank -> what was wrong."""
    folder = tmp_path_factory.mktemp("cases")
    command = [str(python), "-m", "cpu_engine.cases", "result.json", *BACKENDS]
    ran = run(command, environment, 300, folder)
    assert (folder / "result.json").exists(), ran.stdout[-4000:]
    result: dict[str, str] = json.loads((folder / "result.json").read_text())
    return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", ["all layers", "one layer", "batched"])
def test_every_slot_is_right_in_the_cases_of_vllm_s_own_tests(answers: dict[str, str], backend: str, path: str) -> None:
    mine = {name: wrong for name, wrong in answers.items() if name.startswith(f"{backend}, {path}, world")}
    assert len(mine) == sum(world * len(shapes) for world, shapes in SHAPES.items())
    assert {name: wrong for name, wrong in mine.items() if wrong} == {}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("what", "ranks"),
    [
        ("no change", 2 + 3 + 4),
        ("profile", 2 + 3 + 4),
        ("sub-groups", 2 * 4),
        ("group grows", 4),
        ("group shrinks", 4),
        ("error", 2),
    ],
)
def test_what_else_vllm_asks_for_is_right(answers: dict[str, str], backend: str, what: str, ranks: int) -> None:
    mine = {name: wrong for name, wrong in answers.items() if name.startswith(f"{backend}, {what}")}
    assert len(mine) == ranks
    assert {name: wrong for name, wrong in mine.items() if wrong} == {}


def test_vllm_s_elastic_coordinator_is_accepted_and_communicators_may_be_dropped(answers: dict[str, str]) -> None:
    mine = {name: wrong for name, wrong in answers.items() if "elastic coordinator" in name}
    assert len(mine) == 2
    assert {name: wrong for name, wrong in mine.items() if wrong} == {}
