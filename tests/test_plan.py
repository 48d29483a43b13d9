"""What a plan moves, from where, and that it is plain data."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_core.errors import InputError, PlacementError
from eplb_core.plan import RearrangementPlan, plan_rearrangement


def transfers_of(plan: RearrangementPlan) -> list[tuple[int, ...]]:
    """Return `(layer, expert, source rank, source slot, destination rank)` of each transfer."""
    columns = (
        plan.transfer_layer,
        plan.transfer_expert,
        plan.transfer_src_rank,
        plan.transfer_src_slot,
        plan.transfer_dst_rank,
    )
    return [tuple(row) for row in np.stack(columns, axis=1).tolist()]


def moves_of(plan: RearrangementPlan) -> list[tuple[int, ...]]:
    """Return `(layer, rank, slot, transfer, source slot)` of each move."""
    columns = (plan.move_layer, plan.move_rank, plan.move_slot, plan.move_transfer, plan.move_source)
    return [tuple(row) for row in np.stack(columns, axis=1).tolist()]


def test_slots_that_hold_the_right_expert_do_nothing() -> None:
    plan = plan_rearrangement([[0, 1, 2, 3]], [[0, 1, 2, 3]], 2)
    assert (plan.num_moves, plan.num_transfers, plan.num_cleared) == (0, 0, 0)


def test_a_missing_expert_comes_from_its_only_holder() -> None:
    plan = plan_rearrangement([[0, 1, 2, 3]], [[0, 3, 2, 3]], 2)
    assert transfers_of(plan) == [(0, 3, 1, 1, 0)]
    assert moves_of(plan) == [(0, 0, 1, 0, -1)]


def test_an_expert_needed_by_two_slots_of_a_rank_crosses_once() -> None:
    plan = plan_rearrangement([[0, 1, 2, 3]], [[3, 3, 2, 3]], 2)
    assert transfers_of(plan) == [(0, 3, 1, 1, 0)]
    assert moves_of(plan) == [(0, 0, 0, 0, -1), (0, 0, 1, 0, -1)]
    assert plan.num_duplicates == 1


def test_a_copy_on_the_same_rank_is_preferred_to_any_other() -> None:
    plan = plan_rearrangement([[0, 1, 0, 2]], [[0, 1, 0, 0]], 2)
    assert transfers_of(plan) == []
    assert moves_of(plan) == [(0, 1, 1, -1, 0)]
    assert plan.num_local_moves == 1


def test_a_local_copy_that_stays_is_preferred_to_one_that_is_overwritten() -> None:
    plan = plan_rearrangement([[0, 0, 1]], [[1, 0, 0]], 1)
    assert moves_of(plan) == [(0, 0, 0, -1, 2), (0, 0, 2, -1, 1)]


@pytest.mark.parametrize(("nodes", "source"), [([0, 0, 1, 1], 2), ([0, 1, 0, 1], 1)])
def test_a_holder_on_the_same_node_is_preferred(nodes: list[int], source: int) -> None:
    plan = plan_rearrangement([[9, 7, 7, 1]], [[9, 7, 7, 7]], 4, nodes)
    assert transfers_of(plan) == [(0, 7, source, 0, 3)]


def test_sends_are_spread_evenly_over_equal_holders() -> None:
    old = [[0] * 4 + [-1] * 12]
    plan = plan_rearrangement(old, [[0] * 16], 16)
    assert np.bincount(plan.transfer_src_rank).tolist() == [3, 3, 3, 3]


def test_a_holder_that_must_send_other_experts_sends_less_of_a_shared_one() -> None:
    # Ranks 0 and 1 both hold expert 0; only rank 0 holds 1 and 2, which ranks 2 and 3 need as well.
    old = [[0, 1, 2, 0, -1, -1, -1, -1, -1, -1, -1, -1]]
    new = [[0, 1, 2, 0, -1, -1, 0, 1, -1, 0, 2, -1]]
    plan = plan_rearrangement(old, new, 4)
    assert {(expert, src) for _, expert, src, _, _ in transfers_of(plan)} == {(0, 1), (1, 0), (2, 0)}


def test_an_emptied_slot_is_counted_and_moves_nothing() -> None:
    plan = plan_rearrangement([[0, 1, 0, 1]], [[0, 1, -1, 1]], 2)
    assert (plan.num_moves, plan.num_cleared) == (0, 1)


def test_traffic_is_a_matrix_of_bytes_from_source_to_destination() -> None:
    plan = plan_rearrangement([[0, 1], [0, 1]], [[1, 1], [1, 0]], 2)
    assert plan.traffic([100, 7]).tolist() == [[0, 7], [107, 0]]
    assert plan.bytes_moved([100, 7]) == 114
    assert plan.bytes_moved(10) == 30


@pytest.mark.parametrize("sizes", [[1, 2, 3], [-1, 2], 1.5, [[1, 2]]])
def test_sizes_that_do_not_fit_the_layers_are_refused(sizes: object) -> None:
    plan = plan_rearrangement([[0, 1], [0, 1]], [[1, 1], [1, 0]], 2)
    with pytest.raises(InputError, match="each of the 2 layers"):
        plan.bytes_moved(sizes)


def test_the_summary_says_what_moves() -> None:
    plan = plan_rearrangement([[0, 1, 0, 2]], [[1, 0, 1, 1]], 2)
    assert str(plan) == (
        "4 of 4 slots change in 1 layers on 2 ranks: 1 experts cross between ranks, 2 are copied on their rank, "
        "1 share a transfer; 0 slots are cleared"
    )
    assert "(2.0 MB)" in plan.summary(2_000_000)


def test_the_given_placements_stay_writable_and_the_plans_own_do_not() -> None:
    old, new = np.array([[0, 1]]), np.array([[1, 0]])
    plan = plan_rearrangement(old, new, 2)
    old[0, 0] = 5
    assert plan.old.tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="read-only"):
        plan.new[0, 0] = 5


def test_nodes_for_another_number_of_ranks_are_refused() -> None:
    with pytest.raises(PlacementError, match=r"nodes of 2 ranks were given with shape \[3\]"):
        plan_rearrangement([[0, 1]], [[1, 0]], 2, [0, 0, 1])


@st.composite
def pairs(draw):
    num_ranks, per_rank, num_layers = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_slots = num_ranks * per_rank
    old = random.integers(-1, num_slots, (num_layers, num_slots))
    new = np.stack([random.choice(np.append(row, -1), num_slots) for row in old])
    return old, new, num_ranks, random.integers(0, 3, num_ranks)


@settings(max_examples=300, deadline=None)
@given(pairs())
def test_any_plan_is_complete_minimal_and_reads_the_right_holders(case) -> None:
    old, new, num_ranks, nodes = case
    per_rank = old.shape[1] // num_ranks
    plan = plan_rearrangement(old, new, num_ranks, nodes)

    holders: dict[tuple[int, int], set[int]] = {}
    for (layer, slot), expert in np.ndenumerate(old):
        holders.setdefault((layer, int(expert)), set()).add(slot // per_rank)
    expected = set()
    changed = set()
    for (layer, slot), expert in np.ndenumerate(new):
        if expert >= 0 and old[layer, slot] != expert:
            changed.add((layer, *divmod(slot, per_rank)))
            if slot // per_rank not in holders[layer, int(expert)]:
                expected.add((layer, int(expert), slot // per_rank))

    transfers = transfers_of(plan)
    assert sorted(expected) == sorted((layer, expert, dst) for layer, expert, _, _, dst in transfers)
    for layer, expert, src, slot, dst in transfers:
        assert old[layer, src * per_rank + slot] == expert
        near = {rank for rank in holders[layer, expert] if nodes[rank] == nodes[dst]}
        assert not near or src in near
    moves = moves_of(plan)
    assert len(moves) == len(changed)
    assert {move[:3] for move in moves} == changed
    for layer, rank, slot, transfer, source in moves:
        wanted = new[layer, rank * per_rank + slot]
        if transfer >= 0:
            assert source == -1
            assert (transfers[transfer][:2], transfers[transfer][4]) == ((layer, wanted), rank)
        else:
            assert old[layer, rank * per_rank + source] == wanted


@settings(max_examples=50, deadline=None)
@given(pairs())
def test_a_plan_survives_json_and_is_the_same_every_time(case) -> None:
    plan = plan_rearrangement(*case)
    assert RearrangementPlan.from_json(plan.to_json()) == plan
    assert plan_rearrangement(*case) == plan


def test_different_plans_are_not_equal() -> None:
    assert plan_rearrangement([[0, 1]], [[1, 0]], 2) != plan_rearrangement([[0, 1]], [[1, 1]], 2)
    assert plan_rearrangement([[0, 1]], [[1, 0]], 2) != "a plan"


def tampered(**changes: object) -> str:
    content = json.loads(plan_rearrangement([[0, 1, 2, 3]], [[2, 3, 3, 0]], 2).to_json())
    return json.dumps({key: value for key, value in (content | changes).items() if value is not None})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no format 'eplb-plan/1'"),
        (tampered(format="other/1"), "no format"),
        (tampered(move_slot=None), "not complete: no move_slot"),
        (tampered(num_ranks="2"), "for '2' ranks"),
        (tampered(transfer_expert=[[1]]), "'transfer_expert' of a rearrangement plan is not a list of integers"),
    ],
)
def test_text_that_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        RearrangementPlan.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transfer_src_slot": [0, 0, 0]}, "do not turn its old placement"),
        ({"transfer_src_slot": [0, 1, 9]}, "'transfer_src_slot' of the plan has a value outside of 0 to 2"),
        ({"transfer_layer": [0]}, "values instead of"),
        ({"new": [[2, 3, 0, 0]]}, "do not turn its old placement"),
        ({"new": [[2, 3, 9, 0]]}, "no rank has a copy: 9"),
        ({"move_source": [-1, -1, -1, -1]}, "do not turn its old placement"),
    ],
)
def test_a_plan_that_does_not_do_what_it_says_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlacementError, match=re.escape(message)):
        RearrangementPlan.from_json(tampered(**changes))
