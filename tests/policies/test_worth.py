"""Whether a rearrangement pays, by hand."""

from __future__ import annotations

import pytest

from eplb_core.contract.option_types import ByteSize, Duration
from eplb_core.errors import InputError
from eplb_core.policies.worth import CostModel, should_rebalance

OLD, NEW = [[0, 1, 2, 3]], [[0, 2, 1, 3]]
LOADS = [[3.0, 3, 1, 1]]  # ranks bear 6 and 2, and then 4 and 4
MODEL = CostModel(
    rate=ByteSize(1000), step=Duration(0.1), steps=100, moe_share=0.5, knee=1.25, blocked=1, overhead=Duration(1.01)
)


def test_the_numbers_are_those_of_the_model() -> None:
    found = should_rebalance(OLD, NEW, LOADS, 2, 500, MODEL)
    assert (found.imbalance_before, found.imbalance_after) == (1.5, 1.0)
    assert (found.bytes_moved, found.busiest_rank_bytes, found.moving_s, found.cost_s) == (1000, 500, 0.5, 1.51)
    # 1.0 counts as the knee: half of 0.1 s shrinks by 1 - 1.25 / 1.5.
    assert found.saved_s_per_step == pytest.approx(0.05 / 6)
    assert found.gain_s == pytest.approx(5 / 6)
    assert found.pays_after_steps == 182
    assert not found.worth_it
    assert str(found).startswith("not worth it: imbalance 1.500 -> 1.000 saves 8.333 ms a step")


@pytest.mark.parametrize(
    ("change", "worth_it"),
    [
        ({"steps": 181}, False),
        ({"steps": 182}, True),
        ({"steps": 182, "knee": 1.5}, False),
        ({"blocked": 0.0}, False),
        ({"blocked": 0.0, "steps": 122}, True),
    ],
)
def test_it_pays_once_what_is_saved_exceeds_what_moving_costs(change: dict[str, float], worth_it: bool) -> None:
    from dataclasses import replace

    assert should_rebalance(OLD, NEW, LOADS, 2, 500, replace(MODEL, **change)).worth_it is worth_it


def test_below_the_knee_nothing_is_gained() -> None:
    found = should_rebalance(OLD, NEW, [[11.0, 10, 9, 10]], 2, 500, MODEL)
    assert found.imbalance_after < found.imbalance_before
    assert (found.saved_s_per_step, found.pays_after_steps, found.worth_it) == (0.0, None, False)


def test_nothing_to_move_costs_nothing_and_is_not_worth_it() -> None:
    found = should_rebalance(OLD, OLD, LOADS, 2, 500, MODEL)
    assert (found.cost_s, found.gain_s, found.worth_it) == (0.0, 0.0, False)


def test_layers_may_differ_in_size() -> None:
    found = should_rebalance([OLD[0]] * 2, [NEW[0], OLD[0]], LOADS * 2, 2, [500, 9000], MODEL)
    assert found.busiest_rank_bytes == 500


def test_sizes_of_another_length_are_refused() -> None:
    with pytest.raises(InputError, match="one for each of the 1 layers"):
        should_rebalance(OLD, NEW, LOADS, 2, [1, 2], MODEL)
