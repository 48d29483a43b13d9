"""How a plan is cut into steps. They are performed by the model in `tests/support/step_model.py`."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_core.bench.workload import make_workload
from eplb_core.errors import InputError, PlacementError
from eplb_core.planning.plan import plan_rearrangement
from eplb_core.scheduling import schedule
from eplb_core.scheduling.schedule import ALIGNMENT, Step, schedule_steps
from tests.support.examples import examples
from tests.support.step_model import Model


def run_schedule(old, new, num_ranks, sizes, window_bytes, **limits) -> tuple[list[Step], Model]:
    plan = plan_rearrangement(old, new, num_ranks)
    steps = schedule_steps(plan, sizes, window_bytes=window_bytes, **limits)
    model = Model(np.asarray(old), np.asarray(new), num_ranks, list(np.broadcast_to(sizes, len(old))), window_bytes)
    model.run(steps)
    placement = np.asarray(old)
    for step in steps:
        placement = step.apply(placement)
    assert placement.tolist() == np.asarray(new).tolist()
    finished = [layer for step in steps for layer in step.finished_layers.tolist()]
    assert sorted(finished) == [i for i in range(len(old)) if list(old[i]) != list(new[i])]
    planned = zip(plan.transfer_layer, plan.transfer_expert, plan.transfer_dst_rank, strict=True)
    assert Counter((layer, expert, dst) for layer, expert, _, dst in model.transfers) == Counter(
        (int(a), int(b), int(c)) for a, b, c in planned
    )
    return steps, model


@st.composite
def rearrangements(draw, max_ranks: int = 4):
    """Two placements of the same experts: permuted, with copies, empty slots, and experts that vanish."""
    num_ranks = draw(st.integers(1, max_ranks))
    per_rank = draw(st.integers(1, 6))
    num_slots = num_ranks * per_rank
    num_layers = draw(st.integers(1, 3))
    num_logical = draw(st.integers(max(1, num_slots // 2), num_slots))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["any", "permutation", "drift"]))
    old, new = [], []
    for _ in range(num_layers):
        extra = random.integers(-1, num_logical, num_slots - num_logical)
        row = random.permutation(np.concatenate([np.arange(num_logical), extra]))
        if kind == "permutation":
            target = random.permutation(row)
        elif kind == "drift":
            target = row.copy()
            for _ in range(draw(st.integers(0, 4))):
                a, b = random.integers(0, num_slots, 2)
                target[a], target[b] = target[b], target[a]
        else:
            kept = np.where(random.random(num_slots) < 0.15, -1, random.integers(-1, num_logical, num_slots))
            kept[: min(num_logical, num_slots)] = np.arange(num_logical)
            target = random.permutation(np.where(random.random(num_slots) < 0.1, -1, kept))
        old.append(row)
        new.append(target)
    return np.array(old), np.array(new), num_ranks


MANY = examples(100)


@MANY
@given(rearrangements(), st.data())
def test_any_rearrangement_ends_in_the_new_placement_within_any_limits(case, data) -> None:
    old, new, num_ranks = case
    sizes = data.draw(st.lists(st.integers(1, 2000), min_size=len(old), max_size=len(old)))
    largest = max(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    limit = st.integers(largest, largest * 8)
    window = data.draw(st.one_of(st.just(largest), limit, st.just(10**6)))
    send = data.draw(st.one_of(st.none(), st.just(largest), limit))
    receive = data.draw(st.one_of(st.none(), st.just(largest), limit))
    layers = data.draw(st.one_of(st.none(), st.integers(1, 3)))

    steps, model = run_schedule(
        old,
        new,
        num_ranks,
        sizes,
        window,
        send_limit_bytes=send,
        recv_limit_bytes=receive,
        max_layers_per_step=layers,
        in_place_from=data.draw(st.one_of(st.none(), st.integers(1, 4000))),
    )

    assert model.most_staged <= window
    assert send is None or model.most_sent <= send
    assert receive is None or model.most_received <= receive
    assert layers is None or all(len(step.layers) <= layers for step in steps)


@MANY
@given(rearrangements(max_ranks=8))
def test_one_expert_of_window_send_and_receive_is_always_enough(case) -> None:
    old, new, num_ranks = case
    run_schedule(old, new, num_ranks, 256, 256, send_limit_bytes=256, recv_limit_bytes=256)


@examples(50)
@given(rearrangements())
def test_a_window_that_holds_everything_needs_one_step(case) -> None:
    old, new, num_ranks = case
    steps, _ = run_schedule(old, new, num_ranks, 300, 10**6)
    assert len(steps) == (0 if np.array_equal(old, new) else 1)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_a_cycle_that_is_longer_than_the_window_is_turned_piece_by_piece(
    seed: int, num_ranks: int, window: int
) -> None:
    num_slots = num_ranks * 12
    ring = np.random.default_rng(seed).permutation(num_slots)
    old, new = np.empty((1, num_slots), dtype=int), np.empty((1, num_slots), dtype=int)
    old[0, ring] = np.arange(num_slots)
    new[0, np.roll(ring, 1)] = np.arange(num_slots)
    steps, _ = run_schedule(old, new, num_ranks, 256, window * 256)
    assert len(steps) < num_slots


@MANY
@given(rearrangements(max_ranks=8))
def test_in_place_one_expert_of_window_is_enough_too_and_nothing_crosses_twice(case) -> None:
    old, new, num_ranks = case
    run_schedule(old, new, num_ranks, 256, 256, in_place_from=1)


@MANY
@given(rearrangements(max_ranks=8), st.integers(1, 12))
def test_groups_of_layers_that_take_turns_with_the_window_stay_within_it_too(case, window) -> None:
    old, new, num_ranks = case
    copies = 4  # of the layers, so that there is one for each turn
    with mock.patch.object(schedule, "_WORTH_TURNS", 0):
        _, model = run_schedule(
            np.tile(old, (copies, 1)), np.tile(new, (copies, 1)), num_ranks, 256, window * 256, in_place_from=1
        )
    assert model.most_staged <= window * 256


def test_a_large_plan_is_cut_in_groups_also_where_the_window_holds_few_experts() -> None:
    workload = make_workload(ranks=8, layers=58, slots=36, redundant=32, steps=2)
    plan = plan_rearrangement(*workload.placements[1:], 8)
    asked = []

    def share(cut, groups):
        asked.append(groups)
        return schedule.in_turn(cut, groups)

    schedule_steps(plan, 10**6, window_bytes=2 * 10**6, in_place_from=1, share=share)
    assert asked == [4]


@MANY
@given(rearrangements(max_ranks=6), st.data())
def test_in_place_experts_cross_between_nodes_once_and_are_relayed_as_well(case, data) -> None:
    old, new, num_ranks = case
    nodes = data.draw(st.lists(st.integers(0, 2), min_size=num_ranks, max_size=num_ranks))
    plan = plan_rearrangement(old, new, num_ranks, nodes, relay=True)
    steps = schedule_steps(plan, 256, window_bytes=data.draw(st.integers(1, 8)) * 256, in_place_from=1)
    model = Model(old, new, num_ranks, [256] * len(old), 8 * 256)
    model.run(steps)
    between = [(nodes[src], nodes[dst]) for _, _, src, dst in model.transfers if nodes[src] != nodes[dst]]
    assert len(between) == plan.num_between_nodes
    assert len(model.transfers) == plan.num_transfers


def test_in_place_only_cycles_go_through_the_window() -> None:
    # Expert 0 has two copies; slots 2 .. 5 each hold what the slot before needs, and in one layer 6 and 7 swap.
    old, new = [[0, 0, 1, 2, 3, 4, 5, 6]] * 9, [[0, 1, 2, 3, 4, 4, 5, 6]] * 9
    new[0] = [0, 1, 2, 3, 4, 4, 6, 5]
    steps, model = run_schedule(old, new, 8, 256, 9 * 256, in_place_from=1)
    assert model.landed == 9 * 4
    assert [step.staged_bytes.max() for step in steps] == [256, 0, 0, 0, 0]
    assert [change for change in steps[0].changes.tolist() if change[0] == 0] == [[0, 6, 6], [0, 7, 5], [0, 1, -1]]
    assert [change for change in steps[1].changes.tolist() if change[0] == 3] == [[3, 1, 1], [3, 2, -1]]
    assert [row for row in steps[1].transfers.tolist() if row[0] == 3] == [[3, 1, 2, 0, 1, 0, 0]]
    assert [len(step.copies) for step in steps] == [2, 0, 0, 0, 0]


def test_slots_that_are_empty_at_first_are_received_into_at_once() -> None:
    steps, model = run_schedule([[0, 1, -1, -1]], [[0, 1, 1, 0]], 2, 10**6, 10**7, in_place_from=1)
    assert len(steps) == 1
    assert model.landed == 2


def test_what_lands_in_a_slot_is_copied_from_there_to_others_that_need_it() -> None:
    steps, _ = run_schedule([[0, 1, -1, -1]], [[0, 1, 1, 1]], 2, 10**6, 10**7, in_place_from=1)
    (step,) = steps
    assert len(step.transfers) == 1
    landed = int(step.transfers[0, 6])
    assert step.copies.tolist() == [[1, 0, 1, 0, landed, 0, 1 - landed]]


@pytest.mark.parametrize(
    ("ranks", "layers", "slots", "redundant", "mib", "staged", "in_place", "share"),
    [
        (4, 8, 16, 8, 42, 25, 8, 0.34),
        (4, 16, 32, 16, 4.5, 14, 6, 0.61),
        (32, 58, 9, 32, 42, 184, 22, 0.13),
        (256, 58, 2, 256, 42, 29, 7, 0.11),
    ],
)
def test_a_redraw_takes_as_many_steps_as_the_documentation_says(
    ranks: int, layers: int, slots: int, redundant: int, mib: float, staged: int, in_place: int, share: float
) -> None:
    workload = make_workload(ranks=ranks, layers=layers, slots=slots, redundant=redundant, steps=2)
    old, new = workload.placements[1:]
    plan = plan_rearrangement(old, new, ranks)
    size = int(mib * 2**20) + 64
    through_window = schedule_steps(plan, size, window_bytes=192 << 20)
    assert len(through_window) == staged
    steps = schedule_steps(plan, size, window_bytes=192 << 20, in_place_from=1 << 30)
    assert len(steps) == in_place
    kinds = np.concatenate([step.transfers[:, 5] for step in steps])
    assert round(float(kinds.mean()), 2) == share


def test_few_bytes_are_staged_since_steps_cost_too() -> None:
    old, new = [[0, 0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4, 4]]
    steps, model = run_schedule(old, new, 6, 256, 10**6, in_place_from=1000)
    assert (len(steps), model.landed) == (1, 0)


def test_a_swap_between_two_ranks_takes_one_step_and_one_expert_of_window() -> None:
    steps, model = run_schedule([[0, 1]], [[1, 0]], 2, 1000, 1024)
    assert len(steps) == 1
    assert steps[0].transfers.tolist() == [[0, 1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1, 0]]
    assert model.most_staged == 1024


def test_a_swap_within_a_rank_saves_one_slot_and_sends_nothing() -> None:
    steps, _ = run_schedule([[0, 1]], [[1, 0]], 1, 256, 256)
    assert len(steps) == 1
    assert len(steps[0].transfers) == 0
    assert [copy[2:] for copy in steps[0].copies.tolist()] == [
        [0, 0, 1, 1, 0],  # save slot 1 to the window
        [1, 0, 0, 0, 1],  # slot 0 -> slot 1
        [2, 1, 0, 0, 0],  # window -> slot 0
    ]


def test_a_chain_within_a_rank_needs_no_window() -> None:
    steps, _ = run_schedule([[0, 1, 2, -1]], [[-1, 0, 1, 2]], 1, 256, 0)
    assert [copy[2:] for copy in steps[0].copies.tolist()] == [[1, 0, 2, 0, 3], [2, 0, 1, 0, 2], [3, 0, 0, 0, 1]]


def test_an_expert_needed_twice_on_a_rank_crosses_once() -> None:
    steps, _ = run_schedule([[0, 1, 2, 3]], [[0, 1, 0, 0]], 2, 256, 256)
    assert len(steps) == 1
    assert steps[0].transfers.tolist() == [[0, 0, 0, 0, 1, 1, 0]]
    assert [copy[3:] for copy in steps[0].copies.tolist()] == [[1, 0, 0, 0], [1, 0, 0, 1]]


def test_emptied_slots_change_without_any_byte() -> None:
    steps, _ = run_schedule([[0, 1, 0, 1]], [[0, -1, -1, 1]], 2, 256, 0)
    assert len(steps) == 1
    assert steps[0].changes.tolist() == [[0, 1, -1], [0, 2, -1]]
    assert len(steps[0].transfers) == len(steps[0].copies) == 0


def test_what_is_relayed_follows_in_a_later_step_out_of_the_slot_that_it_was_committed_to() -> None:
    # Expert 5 is on node 0 only; ranks 2 and 3, on node 1, need it.
    plan = plan_rearrangement([[5, 1, 2, 3]], [[5, 1, 5, 5]], 4, [0, 0, 1, 1])
    first, second = schedule_steps(plan, 256, window_bytes=10**6)
    (received,) = first.transfers.tolist()
    (relayed,) = second.transfers.tolist()
    assert received[2] == 0
    assert (relayed[2], relayed[3]) == (received[4], 0)
    assert {received[4], relayed[4]} == {2, 3}
    assert (first.finished_layers.tolist(), second.finished_layers.tolist()) == ([], [0])


def test_layers_that_relay_share_their_steps() -> None:
    plan = plan_rearrangement([[5, 1, 2, 3]] * 7, [[5, 1, 5, 5]] * 7, 4, [0, 0, 1, 1])
    first, second = schedule_steps(plan, 256, window_bytes=10**6)
    assert (len(first.transfers), len(second.transfers)) == (7, 7)


def test_equal_placements_need_no_step() -> None:
    assert run_schedule([[0, 1]], [[0, 1]], 2, 256, 0)[0] == []


def test_whole_layers_share_steps_and_are_not_cut_when_they_fit() -> None:
    old, new = [[0, 1, 2, 3]] * 6, [[2, 3, 0, 1]] * 6
    steps, _ = run_schedule(old, new, 2, 256, 4 * 256)  # each layer: two experts each way
    assert [step.finished_layers.tolist() for step in steps] == [[0, 1], [2, 3], [4, 5]]


def test_fewer_layers_a_step_gives_more_steps() -> None:
    old, new = [[0, 1]] * 6, [[1, 0]] * 6
    steps, _ = run_schedule(old, new, 2, 256, 10**6, max_layers_per_step=2)
    assert [step.layers.tolist() for step in steps] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ({"window_bytes": 1000}, "window of 1000 bytes"),
        ({"window_bytes": 4096, "send_limit_bytes": 512}, "send limit of 512 bytes"),
        ({"window_bytes": 4096, "recv_limit_bytes": 0}, "receive limit of 0 bytes"),
    ],
)
def test_a_limit_below_one_expert_is_refused_with_both_figures(limits: dict[str, int], name: str) -> None:
    plan = plan_rearrangement([[0, 1], [0, 1]], [[0, 1], [1, 0]], 2)
    with pytest.raises(PlacementError, match=rf"{name} is smaller than one expert \(layer 1\).*1024 bytes"):
        schedule_steps(plan, [100, 1000], **limits)


def test_sizes_that_do_not_fit_the_layers_are_refused() -> None:
    plan = plan_rearrangement([[0, 1]], [[1, 0]], 2)
    with pytest.raises(InputError, match="1 layers"):
        schedule_steps(plan, [256, 256], window_bytes=256)


def test_a_step_without_layers_is_refused() -> None:
    plan = plan_rearrangement([[0, 1]], [[1, 0]], 2)
    with pytest.raises(PlacementError, match="at least one layer, not 0"):
        schedule_steps(plan, 256, window_bytes=256, max_layers_per_step=0)
