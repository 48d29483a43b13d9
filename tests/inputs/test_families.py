"""The experts of every family that transformers can save are found, byte for byte, in both of its ways of saving."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from eplb_core.errors import InputError
from eplb_core.inputs.checkpoint import Checkpoint
from tests.support.tiny_models import FAMILIES, NUM_EXPERTS, build, experts_in_memory

pytest.importorskip("transformers", reason="transformers is the oracle for what checkpoints look like")

model_of = functools.lru_cache(maxsize=1)(build)  # the cases of a family follow one another

PUBLISHED, FUSED = "published", "fused"
HOW = (PUBLISHED, FUSED)

# The published layout of these counts both kinds of experts in one sequence, of which one is half as wide.
UNLIKE = {("ernie4_5_vl_moe", PUBLISHED)}


def save(name: str, how: str, directory: Path, **more: object) -> Path:
    model_of(name).save_pretrained(directory, save_original_format=how == PUBLISHED, **more)
    return directory


def words_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return all bfloat16 of an expert as bits, sorted: a transposed or split tensor still has the same."""
    return torch.cat([tensor.reshape(-1).view(torch.int16) for tensor in tensors]).sort().values.tolist()


def check(name: str, how: str, directory: Path) -> None:
    family = FAMILIES[name]
    tensors = family.published if how == PUBLISHED else family.fused
    for part in family.parts or (None,):
        checkpoint = Checkpoint.open(directory, part)
        assert checkpoint.layer_ids == family.layers
        assert checkpoint.num_experts == NUM_EXPERTS
        for number, layer in enumerate(family.layers):
            expected = experts_in_memory(model_of(name), family, part or "", layer)
            assert sorted(spec.name for spec in checkpoint.tensor_specs(number)) == sorted(tensors)
            for expert in range(NUM_EXPERTS):
                assert words_of(checkpoint.expert_tensors(number, expert)) == words_of(expected[expert]), (
                    layer,
                    expert,
                )


@pytest.mark.parametrize(("name", "how"), [(name, how) for name in FAMILIES for how in HOW])
def test_all_experts_of_a_family_are_found_with_their_bytes(name: str, how: str, tmp_path: Path) -> None:
    directory = save(name, how, tmp_path)
    if (name, how) in UNLIKE:
        with pytest.raises(InputError, match=r"experts of layer 1 differ in shape .* unequal experts cannot be moved"):
            Checkpoint.open(directory)
    else:
        check(name, how, directory)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.parts])
def test_several_sequences_of_experts_are_refused_until_one_is_chosen(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="several sequences of experts") as caught:
        Checkpoint.open(save(name, FUSED, tmp_path))
    assert all(f"--part {part}" in str(caught.value) for part in FAMILIES[name].parts)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "how"), [(name, how) for name in FAMILIES for how in HOW if (name, how) not in UNLIKE]
)
def test_a_checkpoint_in_many_shards_is_the_same(name: str, how: str, tmp_path: Path) -> None:
    directory = save(name, how, tmp_path, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    check(name, how, directory)
