"""What a plan moves, from where, and that it is plain data."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_core.errors import InputError, LostExpertsError, PlacementError
from eplb_core.planning.plan import RearrangementPlan, plan_rearrangement
from eplb_core.planning.plan_json import decode_plan, encode_plan
from tests.support.examples import examples


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
        "4 of 4 slots change in 1 layer on 2 ranks: 1 expert crosses between ranks, 2 copied on their rank, "
        "1 out of a shared transfer; 0 slots are cleared"
    )
    assert "(2.0 MB)" in plan.summary(2_000_000)


def test_the_summary_tells_nodes_apart_and_says_what_is_lost() -> None:
    plan = plan_rearrangement([[5, 1, 2, 3]], [[5, 7, 5, 5]], 4, [0, 0, 1, 1], missing="leave_empty")
    assert plan.summary(1_000_000) == (
        "2 of 4 slots change in 1 layer on 4 ranks: 2 experts cross between ranks (2.0 MB), 1 of them between nodes "
        "(1.0 MB) and 1 relayed inside one, 0 copied on their rank, 0 out of a shared transfer; 1 slot is cleared; "
        "1 slot is left empty since no rank has the expert"
    )


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


def test_nodes_that_are_no_integers_are_refused() -> None:
    with pytest.raises(PlacementError, match="float64 values instead of integers"):
        plan_rearrangement([[0, 1]], [[1, 0]], 2, [0.0, 1.5])


# --- relays -----------------------------------------------------------------------------------------------------------

TWO_NODES = [0, 0, 0, 0, 1, 1, 1, 1]


def test_an_expert_that_a_node_lacks_crosses_once_and_is_relayed_inside() -> None:
    plan = plan_rearrangement([[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 1, 2, 3, 0, 5, 0, 0]], 8, TWO_NODES)
    (crossing,) = np.flatnonzero(plan.transfer_after < 0)
    assert plan.transfer_src_rank[crossing] == 0
    relayed = np.flatnonzero(plan.transfer_after >= 0)
    assert plan.transfer_after[relayed].tolist() == [crossing, crossing]
    assert plan.transfer_src_rank[relayed].tolist() == [plan.transfer_dst_rank[crossing]] * 2
    assert (plan.num_transfers, plan.num_between_nodes, plan.num_relayed) == (3, 1, 2)


def test_a_relay_reads_the_slot_that_the_first_receiver_commits_to() -> None:
    plan = plan_rearrangement([[0, 1, 2, 3, 4, 5]], [[0, 1, 2, 0, 4, 0]], 3, [0, 1, 1])
    (relayed,) = np.flatnonzero(plan.transfer_after >= 0)
    assert plan.transfer_src_slot[relayed] == 1  # both ranks of node 1 put it into their slot 1


@pytest.mark.parametrize("options", [{"relay": False}, {"relay": None, "node_of_rank": None}])
def test_without_relays_every_rank_reads_a_slot_of_the_old_placement(options: dict[str, Any]) -> None:
    nodes = options.pop("node_of_rank", TWO_NODES)
    plan = plan_rearrangement([[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 1, 2, 3, 0, 0, 0, 0]], 8, nodes, **options)
    assert plan.transfer_src_rank.tolist() == [0, 0, 0, 0]
    assert plan.num_relayed == 0


def test_an_expert_that_the_node_has_is_not_relayed() -> None:
    plan = plan_rearrangement([[0, 1, 2, 3, 0, 5, 6, 7]], [[0, 1, 2, 3, 0, 0, 0, 0]], 8, TWO_NODES)
    assert plan.transfer_src_rank.tolist() == [4, 4, 4]
    assert plan.num_between_nodes == 0


def test_relays_are_spread_over_the_ranks_of_a_node() -> None:
    old = [[0, 1, 2, 3, -1, -1, -1, -1]] * 8
    new = [[0, 1, 2, 3] + [layer % 4] * 4 for layer in range(8)]
    plan = plan_rearrangement(old, new, 8, TWO_NODES)
    relays = plan.transfer_src_rank[plan.transfer_after >= 0]
    assert np.bincount(relays, minlength=8).tolist() == [0, 0, 0, 0, 6, 6, 6, 6]


def test_relays_are_spread_within_a_layer_too() -> None:
    old = [[0, 1, 2, 3, 4, 5, 6, 7] + [-1] * 8]
    new = [[0, 1, 2, 3, 4, 5, 6, 7, 0, 2, 0, 2, 4, 6, 4, 6]]
    plan = plan_rearrangement(old, new, 8, TWO_NODES)
    relays = plan.transfer_src_rank[plan.transfer_after >= 0]
    assert sorted(relays.tolist()) == [4, 5, 6, 7]


def test_traffic_between_nodes_is_a_matrix_of_bytes_in_the_order_of_their_numbers() -> None:
    plan = plan_rearrangement([[0, 1, 2], [0, 1, 2]], [[0, 0, 0], [2, 1, 2]], 3, [9, 4, 4])
    assert plan.traffic_between_nodes([100, 7]).tolist() == [[0, 7], [100, 0]]
    assert plan.traffic([100, 7]).sum() == 207


# --- slots that are kept ----------------------------------------------------------------------------------------------


def test_an_expert_that_stays_on_its_rank_keeps_its_slot() -> None:
    plan = plan_rearrangement([[0, 1, 2, 3]], [[1, 3, 0, 2]], 2, keep_slots=True)
    assert plan.new.tolist() == [[3, 1, 2, 0]]
    assert plan.num_local_moves == 0


def test_what_arrives_takes_the_slot_that_it_was_given_if_that_is_free() -> None:
    plan = plan_rearrangement([[0, 1, 2, 9, 9, 9]], [[2, 9, 0, 9, 0, 1]], 2, keep_slots=True)
    assert plan.new.tolist() == [[0, 9, 2, 9, 0, 1]]


def test_an_empty_slot_stays_empty() -> None:
    plan = plan_rearrangement([[0, -1, 1, 2]], [[-1, 0, 1, 0]], 2, keep_slots=True)
    assert plan.new.tolist() == [[0, -1, 1, 0]]
    assert plan.num_cleared == 0


def test_slots_are_taken_as_given_unless_asked() -> None:
    assert plan_rearrangement([[0, 1]], [[1, 0]], 1).new.tolist() == [[1, 0]]


# --- experts without a copy -------------------------------------------------------------------------------------------


def test_an_expert_without_a_copy_is_an_error() -> None:
    with pytest.raises(LostExpertsError) as caught:
        plan_rearrangement([[0, -1], [0, 1]], [[1, 0], [0, 1]], 2)
    assert caught.value.experts == ((0, 1),)


@pytest.mark.parametrize("keep_slots", [False, True])
def test_slots_of_experts_without_a_copy_are_left_empty_and_listed(keep_slots: bool) -> None:
    plan = plan_rearrangement([[0, -1, 4, 2]], [[7, 0, 7, 2]], 2, keep_slots=keep_slots, missing="leave_empty")
    slot = 1 if keep_slots else 0
    assert plan.lost.tolist() == [[0, slot, 7], [0, 2, 7]]
    assert plan.new.tolist() == [[0, -1, -1, 2] if keep_slots else [-1, 0, -1, 2]]


def test_nothing_is_lost_where_every_expert_has_a_copy() -> None:
    assert plan_rearrangement([[0, 1]], [[1, 0]], 2, missing="leave_empty").lost.shape == (0, 3)


def test_another_word_for_missing_is_refused() -> None:
    with pytest.raises(InputError, match="'ignore' is neither 'raise' nor 'leave_empty'"):
        plan_rearrangement([[0, 1]], [[1, 0]], 2, missing="ignore")


# --- any two placements -----------------------------------------------------------------------------------------------


@st.composite
def pairs(draw):
    num_ranks, per_rank, num_layers = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_slots = num_ranks * per_rank
    old = random.integers(-1, num_slots, (num_layers, num_slots))
    new = np.stack([random.choice(np.append(row, -1), num_slots) for row in old])
    return old, new, num_ranks, random.integers(0, 3, num_ranks)


@examples(100)
@given(pairs())
def test_any_plan_is_complete_minimal_and_reads_the_right_holders(case) -> None:
    old, new, num_ranks, nodes = case
    per_rank = old.shape[1] // num_ranks
    plan = plan_rearrangement(old, new, num_ranks, nodes, relay=False)

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


@examples(100)
@given(pairs(), st.booleans(), st.booleans(), st.booleans())
def test_a_plan_survives_json_and_is_the_same_every_time(case, relay: bool, keep_slots: bool, loses: bool) -> None:
    old, new, num_ranks, nodes = case
    if loses:
        old = np.where(old == old.max(), -1, old)

    def planned() -> RearrangementPlan:
        return plan_rearrangement(old, new, num_ranks, nodes, relay=relay, keep_slots=keep_slots, missing="leave_empty")

    plan = planned()
    read = decode_plan(encode_plan(plan))
    assert read == plan == planned()
    assert encode_plan(read) == encode_plan(plan)
    assert str(read) == str(plan)


@examples(50)
@given(pairs())
def test_large_numbers_of_experts_are_planned_like_small_ones(case) -> None:
    old, new, num_ranks, nodes = case
    factor = 50_000_000

    def spread(placement):
        return np.where(placement < 0, -1, placement * factor)

    small = plan_rearrangement(old, new, num_ranks, nodes, keep_slots=True)
    large = plan_rearrangement(spread(old), spread(new), num_ranks, nodes, keep_slots=True)
    assert transfers_of(large) == [(layer, e * factor, *rest) for layer, e, *rest in transfers_of(small)]
    assert moves_of(large) == moves_of(small)
    assert large.new.tolist() == spread(small.new).tolist()


def test_different_plans_are_not_equal() -> None:
    assert plan_rearrangement([[0, 1]], [[1, 0]], 2) != plan_rearrangement([[0, 1]], [[1, 1]], 2)
    assert plan_rearrangement([[0, 1]], [[1, 0]], 2) != "a plan"


def tampered(**changes: object) -> str:
    """Return the text of a plan with a relay and a lost expert, with some of its fields replaced or left out."""
    plan = plan_rearrangement([[0, 1, 2, 3]], [[2, 9, 0, 0]], 4, [0, 0, 1, 1], missing="leave_empty")
    content = json.loads(encode_plan(plan))
    return json.dumps({key: value for key, value in (content | changes).items() if value is not None})


def test_the_plan_that_is_tampered_with_is_right_before() -> None:
    plan = decode_plan(tampered())
    assert transfers_of(plan) == [(0, 2, 2, 0, 0), (0, 0, 0, 0, 2), (0, 0, 2, 0, 3)]
    assert plan.transfer_after.tolist() == [-1, -1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        (b"\xff", "not JSON"),
        ("[]", "Expected `object`, got `array`"),
        (tampered(format="other/1"), "Invalid enum value 'other/1' - at `$.format`"),
        (tampered(move_slot=None), "missing required field `move_slot`"),
        (tampered(extra=1), "unknown field `extra`"),
        (tampered(num_ranks="2"), "Expected `int`, got `str` - at `$.num_ranks`"),
        (tampered(num_ranks=0), "Expected `int` >= 1 - at `$.num_ranks`"),
        (tampered(transfer_expert=[[1]]), "Expected `int`, got `array` - at `$.transfer_expert[0]`"),
        (tampered(move_layer=[2**63, 0, 0]), "at `$.move_layer[0]`"),
        (tampered(lost=[[0, 1]]), "at `$.lost[0]`"),
    ],
)
def test_text_that_is_no_plan_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        decode_plan(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transfer_src_slot": [0, 0, 9]}, "'transfer_src_slot' of the plan has a value outside of 0 to 0"),
        ({"transfer_layer": [0]}, "values instead of"),
        ({"new": [[2, -1, 0, 2]]}, "do not turn its old placement"),
        ({"new": [[2, -1, 9, 0]]}, "that no slot holds: 9"),
        ({"new": [[2, -1, 0]]}, "4 ranks cannot share evenly"),
        ({"move_source": [0, -1, -1]}, "do not turn its old placement"),
        ({"move_transfer": [0, 1, 1]}, "do not turn its old placement"),
        ({"move_slot": [0, 0, 1]}, "'move_slot' of the plan has a value outside of 0 to 0"),
        ({"transfer_src_rank": [2, 1, 2]}, "do not turn its old placement"),
        ({"transfer_after": [-1, -1, -1]}, "do not turn its old placement"),
        ({"transfer_after": [-1, -1, 0]}, "does not read what another transfer brought"),
        ({"transfer_after": [-1, 2, 1]}, "do not turn its old placement"),
        ({"node_of_rank": [0, 0, 1]}, "'node_of_rank' of the plan has 3 values instead of 4"),
        ({"lost": [[0, 0, 9]]}, "'lost' names a slot that is not left empty"),
        ({"lost": [[0, 1, 3]]}, "or an expert that has a copy"),
        ({"lost": [[0, 4, 9]]}, "'lost'"),
    ],
)
def test_a_plan_that_does_not_do_what_it_says_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlacementError, match=re.escape(message)):
        decode_plan(tampered(**changes))
