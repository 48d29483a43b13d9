"""The guides on rearranging and on elastic groups: what they show runs, and the toy engine sees whatever is wrong."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eplb_core.launch.local_ranks import RankEnvironment
from eplb_core.rearrange.job import RearrangeJob
from eplb_core.rearrange.step_runner import PreparedStep, StepRunner
from tests.support.pages import DOCS, REPOSITORY, Block, blocks_of, marked
from tests.support.programs import run_program

TOY_ENGINE = REPOSITORY / "examples" / "toy_engine.py"
ELASTIC = "elastic.py"
GUIDES = (DOCS / "rearranging.md", DOCS / "elastic.md")


@pytest.mark.parametrize("backend", ["nixl", "torch_gloo"])
def test_the_toy_engine_answers_rightly_while_experts_move(backend: str) -> None:
    outcomes = run_program(TOY_ENGINE, 3, [backend])
    assert [outcome.trace for outcome in outcomes if not outcome.succeeded] == []


# --- the toy engine would see it if it were otherwise -----------------------------------------------------------------


def one_wrong_bit(environment: RankEnvironment) -> None:
    """Flip one bit of the first expert that rank 1 commits."""
    commit = StepRunner.commit

    def commit_and_flip(runner: StepRunner, prepared: PreparedStep, stream: Any) -> None:
        commit(runner, prepared, stream)
        changes = prepared.step.changes
        mine = changes[changes[:, 1] // runner._weights.num_slots == 1]
        if len(mine):
            layer, slot = mine[0, :2].tolist()
            runner._weights.slot(layer, slot % runner._weights.num_slots)[0][1000] ^= 1
            StepRunner.commit = commit  # type: ignore[method-assign]

    if environment.rank == 1:
        StepRunner.commit = commit_and_flip  # type: ignore[assignment, method-assign]


def routing_of_another_expert(environment: RankEnvironment) -> None:
    """Let two slots change places in what every rank is told of a layer."""
    commit = RearrangeJob.commit

    def commit_and_mix(job: RearrangeJob, layer: int) -> Any:
        row = commit(job, layer)
        first, other = 0, int(np.flatnonzero(row != row[0])[0])
        row[[first, other]] = row[[other, first]]
        return row

    RearrangeJob.commit = commit_and_mix  # type: ignore[method-assign]


def a_rank_that_commits_a_batch_late(environment: RankEnvironment) -> None:
    """Let rank 1 go on with the routing from before each commit."""
    commit = RearrangeJob.commit

    def commit_and_forget(job: RearrangeJob, layer: int) -> Any:
        before = job.placement[layer]
        commit(job, layer)
        return before

    if environment.rank == 1:
        RearrangeJob.commit = commit_and_forget  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "disturb", [one_wrong_bit, routing_of_another_expert, a_rank_that_commits_a_batch_late], ids=lambda f: f.__name__
)
def test_the_toy_engine_sees(disturb: Callable[[RankEnvironment], None]) -> None:
    outcomes = run_program(TOY_ENGINE, 3, ["torch_gloo?timeout=5s"], disturb)
    assert any("is wrong" in outcome.message for outcome in outcomes)


# --- what the pages show ----------------------------------------------------------------------------------------------


def test_the_guide_shows_the_toy_engine_as_it_is() -> None:
    assert TOY_ENGINE.read_text() in [block.code for block in blocks_of(DOCS / "rearranging.md")]


@pytest.mark.parametrize("block", marked("three-ranks"), ids=str)
def test_a_program_for_three_ranks_in_the_guides_runs(block: Block, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(block.code)
    outcomes = run_program(program, 3)
    assert [outcome.trace or outcome.message for outcome in outcomes if not outcome.succeeded] == []


def test_the_program_of_the_elastic_guide_loses_nothing_while_ranks_come_and_go(tmp_path: Path) -> None:
    parts = [block.code for block in blocks_of(DOCS / "elastic.md") if block.caption == ELASTIC]
    program = tmp_path / ELASTIC
    program.write_text("\n".join(parts))
    outcomes = run_program(program, 4)
    assert [outcome.trace or outcome.message for outcome in outcomes[:3] if not outcome.succeeded] == []
    assert outcomes[3].exit_code == -signal.SIGKILL


def test_all_python_of_the_guides_is_run_by_a_test() -> None:
    code = [block for page in GUIDES for block in blocks_of(page) if block.language == "python"]
    marks, captions = ("run", "two-ranks", "three-ranks"), ("examples/toy_engine.py", ELASTIC)
    assert [str(block) for block in code if block.mark not in marks and block.caption not in captions] == []
