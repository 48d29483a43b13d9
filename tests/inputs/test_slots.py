"""A rank's slots are filled with the experts that a placement names, and every byte of them is compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eplb_core.errors import InputError
from eplb_core.inputs.experts import TensorSpec
from eplb_core.inputs.models import RandomExperts
from eplb_core.inputs.slots import allocate_slots, check_same_experts, check_slots, fill_slots

CPU = torch.device("cpu")
TENSORS = (TensorSpec("w13", (4, 3), "float8_e4m3fn"), TensorSpec("w2", (5,), "float32"))
EXPERT_BYTES = 4 * 3 * 1 + 5 * 4
SOURCE = RandomExperts(TENSORS, num_layers=3, num_experts=4, seed=1)
LAYERS = (0, 2)
PLACEMENT = np.array([[3, -1, 0], [1, 1, 2]])


def filled() -> list[list[torch.Tensor]]:
    weights = allocate_slots(SOURCE, LAYERS, 3, CPU)
    fill_slots(weights, SOURCE, LAYERS, PLACEMENT)
    return weights


def test_slots_have_the_shapes_and_dtypes_of_the_experts_behind_the_slot_dimension() -> None:
    for layer in allocate_slots(SOURCE, LAYERS, 3, CPU):
        assert [(tensor.shape, tensor.dtype) for tensor in layer] == [
            ((3, 4, 3), torch.float8_e4m3fn),
            ((3, 5), torch.float32),
        ]


def test_a_slot_holds_the_bytes_of_its_expert() -> None:
    weights = filled()
    for row, layer in enumerate(LAYERS):
        for slot, expert in enumerate(PLACEMENT[row].tolist()):
            for held, right in zip(weights[row], SOURCE.expert_tensors(layer, max(expert, 0)), strict=True):
                same = torch.equal(held[slot].view(torch.uint8), right.view(torch.uint8))
                assert same == (expert >= 0)


def test_an_empty_slot_stays_as_it_is() -> None:
    assert not filled()[0][0][1].view(torch.uint8).any()


def test_filled_slots_pass_and_empty_ones_are_not_counted() -> None:
    check = check_slots(filled(), SOURCE, LAYERS, PLACEMENT)
    assert (check.num_slots, check.num_bytes, check.wrong) == (5, 5 * EXPERT_BYTES, ())


@pytest.mark.parametrize(("tensor", "name"), [(0, "w13"), (1, "w2")])
@pytest.mark.parametrize(("row", "slot"), [(0, 2), (1, 0)])
def test_one_wrong_bit_is_found_and_named(tensor: int, name: str, row: int, slot: int) -> None:
    weights = filled()
    weights[row][tensor][slot].view(torch.uint8).flatten()[-1] ^= 1
    assert check_slots(weights, SOURCE, LAYERS, PLACEMENT).wrong == ((row, slot, name),)


def test_the_right_expert_of_another_layer_is_wrong() -> None:
    weights = filled()
    for held, other in zip(weights[1], SOURCE.expert_tensors(0, 1), strict=True):
        held[0].view(torch.uint8).copy_(other.view(torch.uint8))
    assert check_slots(weights, SOURCE, LAYERS, PLACEMENT).wrong == ((1, 0, "w13"),)


def test_equal_values_of_other_bytes_are_wrong() -> None:
    class Zeros:
        num_layers = num_experts = 1

        def tensor_specs(self, layer: int) -> tuple[TensorSpec, ...]:
            return (TensorSpec("w", (1,), "float32"),)

        def expert_tensors(self, layer: int, expert: int) -> list[torch.Tensor]:
            return [torch.tensor([0.0])]

    negative_zero = [[torch.tensor([[-0.0]])]]
    assert check_slots(negative_zero, Zeros(), (0,), np.array([[0]])).wrong == ((0, 0, "w"),)


def test_progress_counts_bytes_and_ends_with_all_of_them() -> None:
    seen: list[tuple[int, int]] = []
    check_slots(filled(), SOURCE, LAYERS, PLACEMENT, lambda done, total: seen.append((done, total)))
    assert seen == [(i * EXPERT_BYTES, 5 * EXPERT_BYTES) for i in range(1, 6)]


def test_sources_of_other_numbers_or_shapes_cannot_stand_for_one_another() -> None:
    more = RandomExperts(TENSORS, num_layers=3, num_experts=5)
    with pytest.raises(InputError, match="3 layers of 5 experts, the other has 3 of 4"):
        check_same_experts(SOURCE, more, LAYERS)
    other = RandomExperts(TENSORS[:1], num_layers=3, num_experts=4)
    with pytest.raises(InputError, match="different tensors in MoE layer 0"):
        check_same_experts(SOURCE, other, LAYERS)
