"""Which weights can be rearranged: memory of their own for every slot."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from eplb_core.errors import InputError
from eplb_core.rearrange.weights import ExpertWeights

Weights = list[list[torch.Tensor]]


def one_tensor_in_two_layers() -> Weights:
    tensor = torch.zeros(3, 8)
    return [[tensor], [tensor]]


def one_tensor_twice_in_a_layer() -> Weights:
    tensor = torch.zeros(3, 8)
    return [[tensor, torch.zeros(3, 2), tensor]]


def the_same_bytes_as_another_dtype() -> Weights:
    tensor = torch.zeros(3, 8)
    return [[tensor], [torch.zeros(3, 1)], [tensor.view(torch.int32)]]


def windows_that_overlap() -> Weights:
    flat = torch.zeros(100)
    return [[flat[:30].view(3, 10)], [flat[29:59].view(3, 10)]]


def one_inside_another() -> Weights:
    fused = torch.zeros(3, 20)
    return [[fused], [fused[:, 5:8]]]


def neighbours_of_which_one_is_a_byte_too_long() -> Weights:
    fused = torch.zeros(3, 20, dtype=torch.uint8)
    return [[fused[:, :11]], [fused[:, 10:]]]


def slots_in_another_order() -> Weights:
    fused = torch.zeros(4, 6)
    return [[fused[:2]], [fused[::2]]]


def a_parameter_and_its_data() -> Weights:
    parameter = torch.nn.Parameter(torch.zeros(3, 8))
    return [[parameter], [parameter.data]]


TWO = [
    one_tensor_in_two_layers,
    one_tensor_twice_in_a_layer,
    the_same_bytes_as_another_dtype,
    windows_that_overlap,
    one_inside_another,
    neighbours_of_which_one_is_a_byte_too_long,
    slots_in_another_order,
    a_parameter_and_its_data,
]


@pytest.mark.parametrize("make", TWO, ids=lambda make: make.__name__)
def test_tensors_that_share_memory_are_refused_and_both_are_named(make: Callable[[], Weights]) -> None:
    with pytest.raises(InputError, match="two tensors share memory") as error:
        ExpertWeights(make())
    named = re.findall(r"layer (\d), tensor (\d)", str(error.value))
    assert len(set(named)) == 2
    assert named == sorted(named)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(8).expand(3, 8), torch.zeros(100).as_strided((3, 8), (7, 1)), torch.zeros(1).expand(3, 1)],
    ids=["expanded", "a step too short", "one element"],
)
def test_slots_of_one_tensor_that_share_memory_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(InputError, match="slots lie on top of one another") as error:
        ExpertWeights([[torch.zeros(3, 1), tensor]])
    assert "layer 0, tensor 1" in str(error.value)


def views_side_by_side() -> Weights:
    fused = torch.zeros(3, 20, dtype=torch.uint8)
    return [[fused[:, :11]], [fused[:, 11:]]]


def layers_of_one_storage() -> Weights:
    return [[layer] for layer in torch.zeros(4, 3, 8).unbind(0)]


def slots_that_alternate() -> Weights:
    fused = torch.zeros(6, 8)
    return [[fused[::2]], [fused[1::2]]]


def nothing_in_them() -> Weights:
    empty = torch.zeros(3, 0)
    return [[empty, torch.zeros(3, 1)], [empty]]


def no_slots() -> Weights:
    return [[torch.zeros(0, 8)], [torch.zeros(0, 8)]]


@pytest.mark.parametrize(
    "make",
    [views_side_by_side, layers_of_one_storage, slots_that_alternate, nothing_in_them, no_slots],
    ids=lambda make: make.__name__,
)
def test_views_of_one_storage_that_share_no_byte_are_taken(make: Callable[[], Weights]) -> None:
    weights = make()
    assert ExpertWeights(weights).num_slots == weights[0][0].shape[0]


def transposed() -> Weights:
    return [[torch.zeros(3, 4, 8).transpose(1, 2), torch.zeros(3, 2, 4, 8).permute(0, 3, 1, 2)]]


def column_major_scales() -> Weights:
    return [[torch.zeros(3, 8, 4).mT, torch.zeros(3, 1, 5).mT]]


@pytest.mark.parametrize("make", [transposed, column_major_scales], ids=lambda make: make.__name__)
def test_rows_may_have_their_dimensions_in_any_order(make: Callable[[], Weights]) -> None:
    weights = make()
    for tensor in weights[0]:
        tensor.copy_(torch.arange(tensor.numel(), dtype=tensor.dtype).view(tensor.shape))
    seen = ExpertWeights(weights)
    for number, tensor in enumerate(weights[0]):
        for slot in range(3):
            values = seen.slot(0, slot)[number].view(torch.float32)
            assert sorted(values.tolist()) == sorted(tensor[slot].flatten().tolist())


def test_how_rows_lie_is_part_of_what_the_ranks_compare() -> None:
    plain, other = torch.zeros(3, 4, 8), torch.zeros(3, 8, 4).transpose(1, 2)
    assert plain.shape == other.shape
    assert ExpertWeights([[plain]]).description != ExpertWeights([[other]]).description


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3, 4, 8)[:, :, ::2], torch.zeros(3, 4, 8)[:, :, :5]], ids=["every other", "a part"]
)
def test_rows_with_gaps_are_refused_and_no_copy_is_advised(tensor: torch.Tensor) -> None:
    with pytest.raises(InputError, match="a slot's row has gaps") as error:
        ExpertWeights([[tensor]])
    assert error.value.remedy is not None
    assert ".contiguous()" not in error.value.remedy
    assert "a copy would be moved in its place" in error.value.remedy


class Wrapper(torch.Tensor):
    """As a quantised weight: two tensors that look like one."""

    @staticmethod
    def __new__(cls, size: tuple[int, ...]) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(cls, size)  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        raise NotImplementedError


class Local(torch.Tensor):
    """As torch.distributed's DTensor."""

    def to_local(self) -> torch.Tensor:
        return torch.zeros(1)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(3, 4).to_sparse(), "layout torch.sparse_coo has no rows"),
        (torch.quantize_per_tensor(torch.zeros(3, 4), 1.0, 0, torch.qint8), "a quantised tensor"),
        (torch.zeros(3, 4, device="meta"), "on the meta device has no bytes"),
        (Wrapper((3, 4)), "a Wrapper wraps other tensors"),
        (torch.zeros(3, 4).as_subclass(Local), "give this rank's part, .to_local()"),
        (torch.zeros(3, 4).numpy(), "a ndarray instead of a torch tensor"),
        (None, "a NoneType instead"),
    ],
    ids=["sparse", "quantised", "meta", "wrapper", "DTensor", "numpy", "None"],
)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_plain_tensor_is_refused_by_name(tensor: torch.Tensor, said: str, place: int) -> None:
    layer = [torch.zeros(3, 2), torch.zeros(3, 2)]
    layer[place] = tensor
    with pytest.raises(InputError, match=re.escape(said)) as error:
        ExpertWeights([layer])
    assert f"layer 0, tensor {place}" in str(error.value)


def test_a_tensor_that_got_other_memory_is_noticed() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    weights = ExpertWeights([[torch.zeros(3, 2), parameter]])
    weights.check_places()
    parameter.data = torch.ones(3, 4)
    with pytest.raises(InputError, match="other memory than when the rearranger was made") as error:
        weights.check_places()
    assert "layer 0, tensor 1" in str(error.value)
