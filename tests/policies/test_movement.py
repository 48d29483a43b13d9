"""The same plan with fewer moves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_core.errors import PlacementError
from eplb_core.planning.placement import load_per_rank
from eplb_core.policies import minimize_movement, slots_anew
from eplb_core.policies.assignment import _exact_arrays, _exact_loops, _greedy, assign
from tests.support.examples import examples

values = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=n, max_size=n)
)


@examples(100)
@given(values)
def test_no_other_assignment_has_a_higher_value(rows) -> None:
    value = np.array(rows)
    column = assign(value)
    best = max(sum(value[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(len(value))))
    assert sorted(column.tolist()) == list(range(len(value)))
    assert value[np.arange(len(value)), column].sum() == best


@examples(50)
@given(st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_loops_and_arrays_assign_alike(n: int, seed: int) -> None:
    value = np.random.default_rng(seed).integers(0, 5, (n, n))
    assert _exact_loops(value).tolist() == _exact_arrays(value).tolist()
    assert sorted(_greedy(value).tolist()) == list(range(n))


def test_ranks_that_only_changed_their_numbers_move_nothing() -> None:
    old = np.array([[0, 1, 2, 3, 4, 5]])
    assert minimize_movement(old, np.array([[5, 4, 1, 0, 3, 2]]), 3).tolist() == old.tolist()


def test_without_relabelling_only_slots_are_kept() -> None:
    old, new = np.array([[0, 1, 2, 3]]), np.array([[1, 2, 3, 0]])
    assert minimize_movement(old, new, 2, relabel=False).tolist() == [[2, 1, 0, 3]]


def test_ranks_stay_on_their_node_and_nodes_change_as_a_whole() -> None:
    old = np.array([[0, 1, 2, 3, 4, 5, 6, 7]])
    new = np.array([[6, 0, 5, 4, 3, 2, 1, 7]])  # node 0 holds two of node 1's, and the other way round
    placed = minimize_movement(old, new, 8, num_nodes=2)
    assert {frozenset(row) for row in placed.reshape(2, 4).tolist()} == {
        frozenset({0, 4, 5, 6}),
        frozenset({1, 2, 3, 7}),
    }
    assert placed.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]] or slots_anew(old, placed, 8).sum() == 2
    assert slots_anew(old, minimize_movement(old, new, 8), 8).sum() == 0


@examples(50)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_ranks_bear_the_same_and_receive_no_more(nodes: int, inside: int, per_rank: int, seed: int) -> None:
    num_ranks, random = nodes * inside, np.random.default_rng(seed)
    num_slots = num_ranks * per_rank
    num_logical = max(1, num_slots - int(random.integers(0, num_slots)))
    rest = random.integers(0, num_logical, (2, 2, num_slots - num_logical))
    both = np.concatenate([np.broadcast_to(np.arange(num_logical), (2, 2, num_logical)), rest], axis=2)
    old, new = random.permuted(both, axis=2)
    loads = random.integers(1, 100, (2, num_logical))
    placed = minimize_movement(old, new, num_ranks, num_nodes=nodes)
    before, after = (np.sort(load_per_rank(each, loads, num_ranks), axis=1) for each in (new, placed))
    assert np.allclose(before, after)
    assert (slots_anew(old, placed, num_ranks).sum(axis=1) <= slots_anew(old, new, num_ranks).sum(axis=1)).all()
    # What changes is received anew: nothing moves inside a rank.
    assert int((old != placed).sum()) == int(slots_anew(old, placed, num_ranks).sum())
    for one, other in zip(new, placed, strict=True):
        blocks = [sorted(sorted(rank) for rank in node) for node in one.reshape(nodes, inside, -1).tolist()]
        placed_blocks = [sorted(sorted(rank) for rank in node) for node in other.reshape(nodes, inside, -1).tolist()]
        assert sorted(blocks) == sorted(placed_blocks)


def test_nodes_that_cannot_share_the_ranks_are_refused() -> None:
    with pytest.raises(PlacementError, match="4 ranks cannot be shared evenly by 3 nodes"):
        minimize_movement([[0, 1, 2, 3]], [[0, 1, 2, 3]], 4, num_nodes=3)
