"""What counts as a valid placement, how loads fall on ranks, and the placement to start from."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_core.errors import InputError, LostExpertsError, PlacementError
from eplb_core.planning.placement import check_pair, check_placement, contiguous_placement, imbalance, load_per_rank


def test_a_valid_placement_becomes_a_contiguous_int64_array() -> None:
    array = check_placement(np.array([[0, 1], [-1, 2]], dtype=np.int32).T, 2)
    assert array.dtype == np.int64
    assert array.flags.c_contiguous
    assert array.tolist() == [[0, -1], [1, 2]]


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ([0, 1], "1 dimensions"),
        ([[[0, 1]]], "3 dimensions"),
        ([[0, 1], [0]], "not an array"),
        ([[0.0, 1.0]], "holds float64 values"),
        ([[True, False]], "holds bool values"),
        ([["0", "1"]], "holds <U1 values"),
        ([[0, 1, 2]], "3 slots, which 2 ranks cannot share evenly"),
        (np.zeros((3, 0), dtype=int), "0 slots"),
    ],
)
def test_an_array_of_another_form_is_refused(placement: object, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        check_placement(placement, 2)


@pytest.mark.parametrize("expert", [-2, 4, 2**63 - 1])
def test_an_expert_that_does_not_exist_is_refused_with_its_layer_slot_and_rank(expert: int) -> None:
    with pytest.raises(PlacementError, match=rf"start .*expert {expert}, .*layer 1, slot 3 of rank 1.*0 to 3"):
        check_placement([[0, 1, 2, 3], [0, 1, 2, expert]], 2, num_logical=4, name="start")


def test_an_unsigned_value_beyond_int64_is_refused() -> None:
    with pytest.raises(PlacementError, match="18446744073709551615"):
        check_placement(np.array([[2**64 - 1]], dtype=np.uint64), 1)


def test_no_ranks_are_refused() -> None:
    with pytest.raises(PlacementError, match="number of ranks is 0"):
        check_placement([[0]], 0)


def test_placements_of_different_shapes_are_no_pair() -> None:
    with pytest.raises(PlacementError, match=r"shape \[1, 2\], the new one \[1, 4\]"):
        check_pair([[0, 1]], [[0, 1, 0, 1]], 2)


def test_a_needed_expert_without_a_copy_is_named_with_its_layer() -> None:
    old = [[0, 1, 2, 3], [0, 1, 1, 0], [0, 1, 1, 0]]
    new = [[3, 2, 1, 0], [0, 1, 2, 3], [0, 1, 2, 0]]
    with pytest.raises(LostExpertsError, match=r"needs 3 logical experts that no slot holds: 2 in layer 1, 3 in") as e:
        check_pair(old, new, 2)
    assert e.value.experts == ((1, 2), (1, 3), (2, 2))


def test_of_many_experts_without_a_copy_the_first_eight_are_named_and_the_loader_is_the_remedy() -> None:
    with pytest.raises(LostExpertsError) as e:
        check_pair([[-1] * 12], [list(range(11, -1, -1))], 2)
    assert len(e.value.experts) == 12
    assert "6 in layer 0, 7 in layer 0, and 4 more" in str(e.value)
    assert "give Rearranger.run a loader that reads these experts from a checkpoint" in str(e.value.remedy)


def test_an_expert_may_vanish() -> None:
    old, new = check_pair([[0, 1]], [[0, -1]], 2)
    assert (old.tolist(), new.tolist()) == ([[0, 1]], [[0, -1]])


def test_an_experts_load_is_split_evenly_over_its_copies() -> None:
    per_rank = load_per_rank([[0, 1, 0, 2, 0, -1]], [[30, 5, 7]], 3)
    assert per_rank.tolist() == [[15.0, 17.0, 10.0]]


def test_imbalance_is_the_largest_load_over_the_mean() -> None:
    result = imbalance([[0, 1, 0, 2, 0, -1]] * 2, [[30, 5, 7], [0, 0, 0]], 3)
    assert result.tolist() == [17 / 14, 1.0]


def test_a_loaded_expert_without_a_copy_is_refused() -> None:
    with pytest.raises(PlacementError, match=r"expert 2 has a load, but no copy.*layer 1"):
        load_per_rank([[0, 2], [0, 1]], [[1, 0, 1], [1, 0, 1]], 2)


@pytest.mark.parametrize("load", [float("nan"), float("inf"), -1.0])
def test_a_load_that_is_no_finite_number_is_refused_with_its_place(load: float) -> None:
    with pytest.raises(InputError, match=r"layer 1, expert 0"):
        load_per_rank([[0, 1]] * 2, [[1, 1], [load, 1]], 2)


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        ([1, 2], "1 dimensions"),
        ([["a", "b"]], "not an array of numbers"),
        ([[1, 2], [3]], "not an array of numbers"),
        ([[1, 2], [3, 4]], "2 layers, the placement 1"),
        ([[1e308, 1e308]], "too large"),
    ],
)
def test_loads_of_another_form_are_refused(loads: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_per_rank([[0, 1]], loads, 2)


def test_the_start_placement_without_redundancy_is_in_expert_order() -> None:
    assert contiguous_placement(2, 6, 6, 3).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_the_start_placement_puts_second_copies_half_of_the_ranks_away() -> None:
    assert contiguous_placement(1, 8, 12, 4).tolist() == [[0, 1, 4, 2, 3, 6, 4, 5, 0, 6, 7, 2]]


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_the_start_placement_has_every_expert_and_no_needless_second_copy_on_a_rank(
    num_ranks: int, per_rank: int, data: st.DataObject
) -> None:
    num_slots = num_ranks * per_rank
    num_logical = data.draw(st.integers(1, num_slots))
    placement = check_placement(
        contiguous_placement(3, num_logical, num_slots, num_ranks), num_ranks, num_logical=num_logical
    )
    assert placement.shape == (3, num_slots)
    assert set(placement[2].tolist()) == set(range(num_logical))
    if per_rank <= num_logical:
        for rank in placement[0].reshape(num_ranks, per_rank).tolist():
            assert max(Counter(rank).values()) == 1


@pytest.mark.parametrize(
    ("num_logical", "num_slots", "num_ranks", "message"),
    [
        (8, 6, 2, "6 slots cannot hold 8 logical experts"),
        (8, 9, 2, "9 slots cannot be shared evenly by 2 ranks"),
        (0, 4, 2, "cannot place 0 logical experts"),
        (4, 4, 0, "on 0 ranks"),
    ],
)
def test_a_start_placement_that_cannot_be_is_refused(
    num_logical: int, num_slots: int, num_ranks: int, message: str
) -> None:
    with pytest.raises(PlacementError, match=message):
        contiguous_placement(1, num_logical, num_slots, num_ranks)
