"""The expert shapes of published models, and experts of those shapes filled with random bytes.

Shapes are from the models' public configurations: with 128 x 128 block scales for DeepSeek-V3, and 4-bit values with
one 8-bit scale for each 32 of them for gpt-oss (two values are packed into a byte).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from eplb_core.errors import InputError
from eplb_core.inputs.experts import TensorSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The mixture-of-experts part of a model.

    Attributes:
        name: its short name, as `--model` takes it.
        num_layers: MoE layers.
        num_experts: logical experts in each of them.
        tensors: the tensors of one expert; `w13` is gate and up projection, stacked.
    """

    name: str
    num_layers: int
    num_experts: int
    tensors: tuple[TensorSpec, ...]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in one layer."""
        return sum(tensor.nbytes for tensor in self.tensors)


def _bf16(name: str, num_layers: int, num_experts: int, hidden: int, intermediate: int) -> ModelShape:
    return ModelShape(
        name,
        num_layers,
        num_experts,
        (
            TensorSpec("w13", (2 * intermediate, hidden), "bfloat16"),
            TensorSpec("w2", (hidden, intermediate), "bfloat16"),
        ),
    )


MODELS: tuple[ModelShape, ...] = (
    ModelShape(
        "deepseek-v3",
        58,
        256,
        (
            TensorSpec("w13", (4096, 7168), "float8_e4m3fn"),
            TensorSpec("w2", (7168, 2048), "float8_e4m3fn"),
            TensorSpec("w13.weight_scale_inv", (32, 56), "float32"),
            TensorSpec("w2.weight_scale_inv", (56, 16), "float32"),
        ),
    ),
    _bf16("qwen3-30b-a3b", 48, 128, hidden=2048, intermediate=768),
    _bf16("qwen3-235b-a22b", 94, 128, hidden=4096, intermediate=1536),
    _bf16("mixtral-8x7b", 32, 8, hidden=4096, intermediate=14336),
    ModelShape(
        "gpt-oss-120b",
        36,
        128,
        (
            TensorSpec("w13", (5760, 1440), "uint8"),
            TensorSpec("w2", (2880, 1440), "uint8"),
            TensorSpec("w13.scales", (5760, 90), "uint8"),
            TensorSpec("w2.scales", (2880, 90), "uint8"),
            TensorSpec("w13.bias", (5760,), "bfloat16"),
            TensorSpec("w2.bias", (2880,), "bfloat16"),
        ),
    ),
)


def find_model(name: str) -> ModelShape:
    """Return the model of this name. Raises `InputError` with the nearest names if there is none."""
    for model in MODELS:
        if model.name == name:
            return model
    names = [model.name for model in MODELS]
    near = difflib.get_close_matches(name.lower(), names, n=2)
    raise InputError(
        f"there is no model called {name!r}",
        why=f"did you mean {' or '.join(near)}?" if near else None,
        remedy=f"give one of {', '.join(names)}",
    )


def parse_scale(text: str) -> Fraction:
    """Parse a factor such as `1/16`, `0.25` or `1`. Raises `InputError` unless it is in (0, 1]."""
    try:
        scale = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        scale = Fraction(0)
    if not 0 < scale <= 1:
        raise InputError(f"{text!r} is not a scale", remedy="give a fraction above 0 and up to 1, such as 1/16")
    return scale


def scaled(tensors: tuple[TensorSpec, ...], scale: Fraction) -> tuple[TensorSpec, ...]:
    """Return the tensors with their first dimension shrunk, to at least one row."""
    return tuple(
        TensorSpec(tensor.name, (max(1, int(tensor.shape[0] * scale)), *tensor.shape[1:]), tensor.dtype)
        for tensor in tensors
    )


@dataclass(frozen=True, slots=True)
class RandomExperts:
    """Experts of random bytes; an `ExpertSource`.

    Every tensor of every expert has a separate generator, so that any rank gets the bytes of any expert without
    generating those of the others.

    Attributes:
        tensors: the tensors of one expert, in every layer.
        num_layers: MoE layers.
        num_experts: logical experts in each of them.
        seed: of the random bytes.
    """

    tensors: tuple[TensorSpec, ...]
    num_layers: int
    num_experts: int
    seed: int = 0

    def tensor_specs(self, layer: int) -> tuple[TensorSpec, ...]:
        """Return the tensors of one expert; the same in every layer."""
        return self.tensors

    def expert_tensors(self, layer: int, expert: int) -> list[torch.Tensor]:
        """Return one expert's tensors: the same bytes on every rank, different for every layer and expert."""
        import numpy as np
        import torch

        made = []
        for index, spec in enumerate(self.tensors):
            generator = np.random.SFC64(np.random.SeedSequence((self.seed, layer, expert, index)))
            words = generator.random_raw(-(-spec.nbytes // 8))
            content = torch.from_numpy(words).view(torch.uint8)[: spec.nbytes]
            made.append(content.view(spec.torch_dtype).reshape(spec.shape))
        return made
