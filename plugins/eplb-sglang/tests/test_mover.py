"""Experts move between real ranks in SGLang's numbering: some layers, without ranks that died, and half-way."""

from __future__ import annotations

import mover_ranks
import numpy as np
import pytest
from eplb_sglang.survivors import columns, every_expert_remains, without_lost

from eplb_core.launch.local_ranks import run_local_ranks

LIMIT_S = 90.0


@pytest.mark.parametrize(("ranks", "backend"), [(2, "nixl"), (3, "shm"), (4, "nixl?mode=packed")])
def test_only_the_layers_that_are_asked_for_move(ranks: int, backend: str) -> None:
    assert run_local_ranks(mover_ranks.moves_layers_apart, ranks, (backend,), timeout_s=LIMIT_S) == [[]] * ranks


def test_an_expert_that_a_dead_rank_held_comes_from_a_copy_that_is_alive() -> None:
    first, dead, last = run_local_ranks(mover_ranks.outlives_a_rank, 3, ("nixl?timeout=30s",), timeout_s=LIMIT_S)
    assert dead is None
    assert first["wrong"] == last["wrong"] == []
    assert first["missing"] == {1: [3]}
    assert last["missing"] == {5: [3]}


def test_ranks_that_sglang_says_are_dead_are_left_out_and_what_they_held_is_asked_of_sglang() -> None:
    config = "nixl?timeout=30s"
    first, dead, last = run_local_ranks(mover_ranks.outlives_a_rank_inside_sglang, 3, (config,), timeout_s=LIMIT_S)
    assert dead is None
    assert first == {"before": {}, "missing": {1: [3]}, "wrong": []}
    assert last == {"before": {}, "missing": {}, "wrong": []}


@pytest.mark.parametrize(("ranks", "backend"), [(2, "failing"), (3, "failing"), (3, "failing_in_place")])
def test_after_a_failure_all_ranks_know_what_their_slots_hold_and_can_go_on_from_there(
    ranks: int, backend: str
) -> None:
    answers = run_local_ranks(mover_ranks.fails_half_way, ranks, (backend,), timeout_s=LIMIT_S)
    assert [answer["wrong"] for answer in answers] == [[]] * ranks
    assert all(answer["halfway"] for answer in answers)
    assert all(answer["empty"] == (backend == "failing_in_place") for answer in answers)
    assert all(answer["held"] == answers[0]["held"] for answer in answers)


# --- placements of ranks that are alive ------------------------------------------------------------------------------


def test_slots_of_ranks_that_are_alive_are_counted_over_all_ranks() -> None:
    assert columns((0, 2), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_what_no_slot_holds_is_left_out_and_named() -> None:
    old = np.array([[0, 1, -1, 2], [3, 3, 1, 0]])
    new = np.array([[2, 5, 1, 5], [-1, 0, 2, 1]])
    reachable, lost = without_lost(old, new)
    assert reachable.tolist() == [[2, -1, 1, -1], [-1, 0, -1, 1]]
    assert lost.tolist() == [[0, 1, 5], [0, 3, 5], [1, 2, 2]]


def test_an_expert_without_a_copy_is_noticed() -> None:
    before = np.array([[0, 1, 1, -1]])
    assert every_expert_remains(before, np.array([[1, 0, -1, -1]]))
    assert not every_expert_remains(before, np.array([[1, 1, -1, 2]]))
