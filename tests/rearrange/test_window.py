"""Experts in a window: the views that are sent, received and copied show the right bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eplb_core.rearrange import window as staged_module
from eplb_core.rearrange.weights import ExpertWeights
from eplb_core.rearrange.window import StagedExperts

SLOTS = 3
PART = 4096


def weights_of(*widths: int) -> list[torch.Tensor]:
    return [torch.zeros(SLOTS, width, dtype=torch.uint8) for width in widths]


@pytest.fixture
def part() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, 256, PART, dtype=np.uint8))


@pytest.mark.parametrize("widths", [(64, 24), (5, 33, 1), (0, 8), (16,)], ids=str)
def test_an_expert_lies_tensor_by_tensor_at_multiples_of_16_bytes(part: torch.Tensor, widths: tuple[int, ...]) -> None:
    weights = ExpertWeights([weights_of(*widths)])
    views = StagedExperts(weights, part)
    for offset in (0, 256, 1024):
        start = offset
        for width, payload, copied in zip(widths, views.payloads(0, offset), views.words(0, offset), strict=True):
            expected = part[start : start + width].tolist()
            assert payload.tensor.tolist() == expected
            assert copied.view(torch.uint8).tolist() == expected
            start += -(-width // 16) * 16


def test_copies_have_the_dtypes_of_the_slots(part: torch.Tensor) -> None:
    weights = ExpertWeights([weights_of(64, 24, 5)])
    dtypes = [tensor.dtype for tensor in weights.slot_words(0, 0)]
    assert dtypes == [torch.int64, torch.int64, torch.uint8]
    assert [tensor.dtype for tensor in StagedExperts(weights, part).words(0, 512)] == dtypes


def test_layers_that_look_alike_share_views_and_others_do_not(part: torch.Tensor) -> None:
    odd = torch.zeros(SLOTS * 64 + 1, dtype=torch.uint8)[1:].view(SLOTS, 64)  # cannot be copied as words
    weights = ExpertWeights([weights_of(64, 16), weights_of(64, 16), weights_of(16, 64), [odd, weights_of(16)[0]]])
    views = StagedExperts(weights, part)
    assert views.payloads(0, 256) is views.payloads(1, 256)
    assert views.payloads(0, 256) is not views.payloads(0, 512)
    assert [payload.nbytes for payload in views.payloads(2, 256)] == [16, 64]
    assert [tensor.dtype for tensor in views.words(3, 256)] == [torch.uint8, torch.int64]
    assert [tensor.dtype for tensor in views.words(0, 256)] == [torch.int64, torch.int64]


def test_places_are_forgotten_before_there_are_too_many(part: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_module, "_MOST_PLACES", 3)
    views = StagedExperts(ExpertWeights([weights_of(16)]), part)
    for offset in (*range(0, PART, 256), *range(0, PART, 256)):
        [payload], [copied] = views.payloads(0, offset), views.words(0, offset)
        assert payload.tensor.data_ptr() == copied.data_ptr() == part.data_ptr() + offset
        assert len(views._payloads) <= 3
        assert len(views._copied) <= 3
