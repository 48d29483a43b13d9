"""SGLang's own account of where experts are, after a rearrangement that stopped half-way, or a policy of eplb."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from eplb_sglang.locations import hold, logical_to_physical
from eplb_sglang.policy import place

from eplb_core.errors import PolicyError

SLOTS, EXPERTS = 4, 3


def metadata(*, dispatch: bool) -> SimpleNamespace:
    """Return what SGLang keeps, for three layers, with numbers that no placement has."""
    numbers = {
        "physical_to_logical_map": torch.full((3, SLOTS), 77),
        "physical_to_logical_map_cpu": torch.full((3, SLOTS), 77),
        "logical_to_all_physical_map": torch.full((3, EXPERTS, SLOTS), 77),
        "logical_to_all_physical_map_cpu": torch.full((3, EXPERTS, SLOTS), 77),
        "logical_to_all_physical_map_num_valid": torch.full((3, EXPERTS), 77),
        "logical_to_rank_dispatch_physical_map": torch.full((3, EXPERTS), 77) if dispatch else None,
    }
    return SimpleNamespace(num_logical_experts=EXPERTS, **numbers)


def first_of_each(where: torch.Tensor) -> torch.Tensor:
    return where[..., 0]


def test_slots_of_each_expert_are_listed_in_order_and_empty_ones_nowhere() -> None:
    found = logical_to_physical(np.array([[2, -1, 0, 2], [1, 0, 2, 1]]), EXPERTS)
    assert found.tolist() == [[[2, -1], [-1, -1], [0, 3]], [[1, -1], [0, 3], [2, -1]]]


@pytest.mark.parametrize("dispatch", [False, True])
def test_what_the_slots_hold_replaces_what_was_planned_in_those_layers_alone(dispatch: bool) -> None:
    planned = metadata(dispatch=dispatch)
    held = np.array([[0, 1, 2, 0], [2, -1, 0, 1], [9, 9, 9, 9]])
    hold(planned, [1], held, first_of_each)
    assert planned.physical_to_logical_map.tolist() == [[77] * 4, [2, 0, 0, 1], [77] * 4]
    assert planned.physical_to_logical_map_cpu.tolist()[1] == [2, 0, 0, 1]
    expected = [[2, -1, -1, -1], [3, -1, -1, -1], [0, -1, -1, -1]]
    assert planned.logical_to_all_physical_map.tolist()[1] == expected
    assert planned.logical_to_all_physical_map_cpu.tolist()[1] == expected
    assert planned.logical_to_all_physical_map_num_valid.tolist() == [[77] * 3, [1, 1, 1], [77] * 3]
    if dispatch:
        assert planned.logical_to_rank_dispatch_physical_map.tolist() == [[77] * 3, [2, 3, 0], [77] * 3]


# --- a policy of eplb ------------------------------------------------------------------------------------------------


def placed(policy: str, alive: tuple[int, ...], old: np.ndarray | None = None) -> tuple[torch.Tensor, ...]:
    """Ask for two layers of six experts in twelve slots of four ranks, with loads of five steps."""
    loads = torch.randint(0, 100, (5, 2, 6), generator=torch.Generator().manual_seed(3))
    return place(policy, loads, num_slots=12, slots_per_rank=3, num_groups=None, num_nodes=1, old=old, alive=alive)


@pytest.mark.parametrize("policy", ["deepseek", "incremental"])
@pytest.mark.parametrize("alive", [(0, 1, 2, 3), (0, 2, 3)])
def test_a_policy_answers_as_sglang_s_own_do_also_without_dead_ranks(policy: str, alive: tuple[int, ...]) -> None:
    slots, where, counts = placed(policy, alive)
    assert slots.shape == (2, 12)
    assert where.shape[:2] == (2, 6)
    for layer in range(2):
        lists = [[slot for slot in places if slot >= 0] for places in where[layer].tolist()]
        assert [len(places) for places in lists] == counts[layer].tolist()
        assert all(places for places in lists)
        used = sorted(slot for places in lists for slot in places)
        assert used == [slot for slot in range(12) if slot // 3 in alive]
        assert all(slots[layer, slot] == expert for expert, places in enumerate(lists) for slot in places)


def test_a_policy_starts_from_where_experts_are() -> None:
    old = placed("deepseek", (0, 1, 2, 3))[0].numpy()
    assert placed("incremental", (0, 1, 2, 3), old)[0].tolist() == old.tolist()


def test_an_old_placement_without_some_expert_is_no_start_but_no_error() -> None:
    old = np.zeros((2, 12), np.int64)
    assert placed("incremental", (0, 1, 2, 3), old)[0].tolist() == placed("incremental", (0, 1, 2, 3))[0].tolist()


def test_a_policy_that_there_is_not_is_an_error() -> None:
    with pytest.raises(PolicyError, match="did you mean incremental"):
        placed("incrementl", (0, 1, 2, 3))
