"""The layouts in which models are published are read to the byte; what cannot be read is refused by its name.

The names and dtypes are those of the published folders, the sizes are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from eplb_core.errors import InputError
from eplb_core.inputs.checkpoint import Checkpoint
from tests.support.examples import examples
from tests.support.stored import Stored

BYTES = torch.uint8
Parts = dict[str, tuple[str, tuple[int, ...]]]


@dataclass
class Layout:
    """A published layout: how to write it, and what must be found."""

    make: Callable[[Stored], None]
    layers: tuple[int, ...]
    config: dict[str, Any] = field(default_factory=dict)
    groups: int = 1
    part: str | None = None
    config_name: str = "config.json"
    noted: tuple[str, ...] = ()


def each(names: str, dtype: str, shape: tuple[int, ...], suffix: str = ".weight") -> Parts:
    return {f"{name}{suffix}": (dtype, shape) for name in names.split()}


GUD = "gate_proj up_proj down_proj"
W = "w1 w2 w3"
MLP = "model.layers.{l}.mlp.experts.{e}.{p}"
FUSED = "model.layers.{l}.mlp.experts.{p}"
BF16 = each(GUD, "BF16", (4, 6))
FP8 = each(GUD, "F8_E4M3", (4, 6)) | each(GUD, "F32", (1, 1), ".weight_scale_inv")
AWQ = {
    **each(GUD, "I32", (4, 2), ".qweight"),
    **each(GUD, "I32", (1, 2), ".qzeros"),
    **each(GUD, "F16", (1, 4), ".scales"),
}
GPTQ = AWQ | each(GUD, "I32", (4,), ".g_idx")
W8A8 = each(GUD, "I8", (4, 6)) | each(GUD, "F32", (4, 1), ".weight_scale")
NVFP4 = {
    **each(GUD, "U8", (4, 3)),
    **each(GUD, "F8_E4M3", (4, 1), ".weight_scale"),
    **each(GUD, "F32", (), ".weight_scale_2"),
    **each(GUD, "F32", (), ".input_scale"),
}
COMPRESSED = {
    **each(GUD, "U8", (4, 3), ".weight_packed"),
    **each(GUD, "F8_E4M3", (4, 1), ".weight_scale"),
    **each(GUD, "F32", (1,), ".weight_global_scale"),
    **each(GUD, "F32", (1,), ".input_global_scale"),
}
QUARK = each(GUD, "U8", (4, 3)) | each(GUD, "U8", (4, 1), ".weight_scale")
EXL3 = {
    **each(GUD, "I16", (1, 2, 8), ".trellis"),
    **each(GUD, "F16", (4,), ".suh"),
    **each(GUD, "F16", (6,), ".svh"),
}
KIMI = {
    **each(GUD, "I32", (4, 1), ".weight_packed"),
    **each(GUD, "BF16", (4, 1), ".weight_scale"),
    **each(GUD, "I32", (2,), ".weight_shape"),
}
NF4 = {
    **each(GUD, "U8", (12, 1)),
    **each(GUD, "U8", (3,), ".weight.absmax"),
    **each(GUD, "F32", (16,), ".weight.quant_map"),
    **each(GUD, "F32", (1,), ".weight.nested_absmax"),
    **each(GUD, "F32", (256,), ".weight.nested_quant_map"),
    **each(GUD, "U8", (80,), ".weight.quant_state.bitsandbytes__nf4"),
}
MXFP4 = {
    "gate_up_proj_blocks": ("U8", (8, 1, 16)),
    "gate_up_proj_scales": ("U8", (8, 1)),
    "gate_up_proj_bias": ("BF16", (8,)),
    "down_proj_blocks": ("U8", (4, 1, 16)),
    "down_proj_scales": ("U8", (4, 1)),
    "down_proj_bias": ("BF16", (4,)),
}
GATE_UP: Parts = {"gate_up_proj": ("BF16", (8, 6)), "down_proj": ("BF16", (6, 4))}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "n_routed_experts": 8,
    "n_group": 4,
}
QWEN3 = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 8}
PREDICTION = ("experts of prediction layers were left out",)


def numbered(template: str, layers: range, parts: Parts) -> Callable[[Stored], None]:
    return lambda stored: stored.numbered(template, layers, parts)


def fused(template: str, layers: range, parts: Parts) -> Callable[[Stored], None]:
    return lambda stored: stored.fused(template, layers, parts)


def joined(template: str, layers: range, parts: Parts) -> Callable[[Stored], None]:
    return lambda stored: stored.joined(template, layers, parts)


def unexpected(make: Callable[[Stored], None]) -> Callable[[Stored], None]:
    """Write what is in the file, but must not be found."""

    def make_it(stored: Stored) -> None:
        other = Stored(random=stored.random)
        make(other)
        stored.tensors |= other.tensors

    return make_it


def dense(*names: str, dtype: str = "BF16", shape: tuple[int, ...] = (4, 4)) -> Callable[[Stored], None]:
    def make_it(stored: Stored) -> None:
        for name in names:
            stored.add(name, dtype, shape)

    return make_it


def together(*makers: Callable[[Stored], None]) -> Callable[[Stored], None]:
    def make_it(stored: Stored) -> None:
        for make in makers:
            make(stored)

    return make_it


def deepseek(parts: Parts) -> Layout:
    make = together(
        dense("model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.gate.weight"),
        numbered(MLP, range(1, 3), parts),
        unexpected(numbered(MLP, range(3, 4), parts)),
        dense("model.layers.1.mlp.shared_experts.gate_proj.weight"),
    )
    return Layout(make, (1, 2), DEEPSEEK, groups=4, noted=PREDICTION)


def qwen3(parts: Parts) -> Layout:
    return Layout(numbered(MLP, range(2), parts), (0, 1), QWEN3)


NESTED = "language_model.model.layers.{l}.mlp.experts.{e}.{p}"
VLM = together(numbered(NESTED, range(1, 3), BF16), unexpected(numbered(NESTED, range(3, 4), BF16)))

LAYOUTS: dict[str, Layout] = {
    "DeepSeek-V3 fp8": deepseek(FP8),
    "DeepSeek-V3 AWQ": deepseek(AWQ),
    "DeepSeek-V3 GPTQ": deepseek(GPTQ),
    "DeepSeek-V3 W8A8": deepseek(W8A8),
    "DeepSeek-V3 nvfp4 (ModelOpt)": deepseek(NVFP4),
    "DeepSeek-V3 nvfp4 (compressed-tensors)": deepseek(COMPRESSED),
    "DeepSeek-V3 mxfp4 (Quark)": deepseek(QUARK),
    "DeepSeek-V3 EXL3": deepseek(EXL3),
    "EXL3 with a dense layer": Layout(
        together(
            lambda stored: stored.add("model.layers.0.mlp.gate_proj.trellis", "I16", (8, 2, 16)),
            lambda stored: stored.add("model.layers.0.mlp.down_proj.trellis", "I16", (2, 8, 16)),
            numbered(MLP, range(1, 3), EXL3),
        ),
        (1, 2),
        {"num_hidden_layers": 3, "n_routed_experts": 8},
    ),
    "DeepSeek-V3 without num_nextn_predict_layers": Layout(
        deepseek(FP8).make, (1, 2), {**DEEPSEEK, "num_nextn_predict_layers": None}, groups=4, noted=PREDICTION
    ),
    "a prediction layer alone": Layout(
        together(unexpected(numbered(MLP, range(1, 3), FP8)), numbered(MLP, range(3, 4), FP8)),
        (3,),
        DEEPSEEK,
        groups=4,
        part="mtp",
    ),
    **{
        f"a VLM with {section}": Layout(VLM, (1, 2), {"model_type": "vlm", section: DEEPSEEK}, 4, noted=PREDICTION)
        for section in ("text_config", "llm_config", "language_config")
    },
    "DeepSeek-V4": Layout(
        together(
            numbered(
                "layers.{l}.ffn.experts.{e}.{p}",
                range(2),
                each(W, "I8", (4, 3)) | each(W, "F8_E8M0", (4, 1), ".scale"),
            ),
            unexpected(numbered("mtp.{l}.ffn.experts.{e}.{p}", range(1), each(W, "I8", (4, 3)))),
        ),
        (0, 1),
        {"num_hidden_layers": 2, "n_routed_experts": 8},
        noted=PREDICTION,
    ),
    "Kimi-K2 int4": deepseek(KIMI),
    "Kimi-K2.5": Layout(
        numbered(NESTED, range(1, 3), KIMI),
        (1, 2),
        {"text_config": {**DEEPSEEK, "num_nextn_predict_layers": 0}},
        groups=4,
    ),
    "GLM-4.5V": Layout(
        numbered("model.language_model.layers.{l}.mlp.experts.{e}.{p}", range(1, 3), BF16),
        (1, 2),
        {"text_config": {"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 1}},
    ),
    "gpt-oss mxfp4": Layout(fused(FUSED, range(2), MXFP4), (0, 1), {"num_hidden_layers": 2, "num_local_experts": 8}),
    "gpt-oss bf16": Layout(
        fused(FUSED, range(2), {**GATE_UP, "gate_up_proj_bias": ("BF16", (6,)), "down_proj_bias": ("BF16", (4,))}),
        (0, 1),
        {"num_hidden_layers": 2, "num_local_experts": 8},
    ),
    **{
        f"Mixtral {name}": Layout(
            numbered("model.layers.{l}.block_sparse_moe.experts.{e}.{p}", range(2), parts),
            (0, 1),
            {"num_hidden_layers": 2, "num_local_experts": 8},
        )
        for name, parts in {
            "bf16": each(W, "BF16", (4, 6)),
            "fp8": each(W, "F8_E4M3", (4, 6))
            | each(W, "F32", (), ".weight_scale")
            | each(W, "F32", (), ".input_scale"),
        }.items()
    },
    "Mixtral native": Layout(
        numbered("layers.{l}.feed_forward.experts.{e}.{p}", range(2), each(W, "BF16", (4, 6))),
        (0, 1),
        {"n_layers": 2, "moe": {"num_experts": 8, "num_experts_per_tok": 2}},
        config_name="params.json",
    ),
    "Mistral-Large-3 native": Layout(
        numbered(
            "layers.{l}.experts.{e}.{p}",
            range(1, 3),
            each(W, "F8_E4M3", (4, 6)) | each(W, "BF16", (), ".qscale_weight") | each(W, "BF16", (), ".qscale_act"),
        ),
        (1, 2),
        {"n_layers": 3, "moe": {"num_experts": 8, "first_k_dense_replace": 1, "num_expert_groups": 2}},
        groups=2,
        config_name="params.json",
    ),
    "Qwen3-MoE bf16": qwen3(BF16),
    "Qwen3-MoE with biases": qwen3(BF16 | each(GUD, "BF16", (4,), ".bias")),
    "Qwen3-MoE bitsandbytes nf4": qwen3(NF4),
    "Qwen3-MoE bitsandbytes int8": qwen3(each(GUD, "I8", (4, 6)) | each(GUD, "F32", (4,), ".weight.SCB")),
    **{
        f"Qwen3-MoE in {dtype}": qwen3(each(GUD, dtype, (4, 6)))
        for dtype in ("U16", "U32", "U64", "C64", "F4", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_NEW")
    },
    "Qwen3-MoE, layers of two precisions": Layout(
        together(numbered(MLP, range(1), FP8), numbered(MLP, range(1, 2), BF16)), (0, 1), QWEN3
    ),
    "MLX": Layout(
        fused(
            "model.layers.{l}.mlp.switch_mlp.{p}",
            range(2),
            {
                f"{name}.{part}": (dtype, (4, width))
                for name in GUD.split()
                for part, dtype, width in (("weight", "U32", 3), ("scales", "BF16", 2), ("biases", "BF16", 2))
            },
        ),
        (0, 1),
        QWEN3,
    ),
    "Qwen3-Next with mtp.layers.0": Layout(
        together(
            numbered(MLP, range(2), FP8), unexpected(numbered("mtp.layers.{l}.mlp.experts.{e}.{p}", range(1), FP8))
        ),
        (0, 1),
        {**QWEN3, "mlp_only_layers": [], "decoder_sparse_step": 1},
        noted=PREDICTION,
    ),
    "Qwen3.5, main layers fused": Layout(
        together(
            fused("model.language_model.layers.{l}.mlp.experts.{p}", range(3), GATE_UP),
            unexpected(numbered("mtp.layers.{l}.mlp.experts.{e}.{p}", range(1), BF16)),
        ),
        (0, 1, 2),
        {"text_config": {"num_hidden_layers": 3, "num_experts": 8, "mtp_num_hidden_layers": 1}},
        noted=PREDICTION,
    ),
    "Qwen3.6, all fused": Layout(
        together(
            fused("model.language_model.layers.{l}.mlp.experts.{p}", range(3), GATE_UP),
            unexpected(fused("mtp.layers.{l}.mlp.experts.{p}", range(1), GATE_UP)),
        ),
        (0, 1, 2),
        {"text_config": {"num_hidden_layers": 3, "num_experts": 8}},
        noted=PREDICTION,
    ),
    "Qwen3-VL-MoE, transposed": Layout(
        fused(
            "model.language_model.layers.{l}.mlp.experts.{p}",
            range(2),
            {"gate_up_proj": ("BF16", (6, 8)), "down_proj": ("BF16", (4, 6))},
        ),
        (0, 1),
        {"text_config": QWEN3},
    ),
    "Qwen3-VL-MoE nvfp4, projection first": Layout(
        lambda stored: [
            stored.numbered(
                f"model.language_model.layers.{{l}}.mlp.experts.{name}.{{e}}.{part}",
                range(2),
                {f"{name}.{part}": NVFP4[f"{name}.{part}"]},
            )
            for name in GUD.split()
            for part in ("weight", "weight_scale", "weight_scale_2", "input_scale")
        ],
        (0, 1),
        {"text_config": QWEN3},
    ),
    "Qwen3-Omni, the thinker": Layout(
        together(
            numbered("thinker.model.layers.{l}.mlp.experts.{e}.{p}", range(2), BF16),
            unexpected(numbered("talker.model.layers.{l}.mlp.experts.{e}.{p}", range(1), BF16)),
        ),
        (0, 1),
        {"thinker_config": {"text_config": QWEN3}, "talker_config": {"text_config": {"num_hidden_layers": 1}}},
        part="thinker",
    ),
    "Qwen3-Omni, the talker": Layout(
        together(
            unexpected(numbered("thinker.model.layers.{l}.mlp.experts.{e}.{p}", range(2), BF16)),
            numbered("talker.model.layers.{l}.mlp.experts.{e}.{p}", range(1), BF16),
        ),
        (0,),
        {"thinker_config": {"text_config": QWEN3}, "talker_config": {"text_config": {"num_hidden_layers": 1}}},
        part="talker",
    ),
    "Llama-4 bf16": Layout(
        fused("language_model.model.layers.{l}.feed_forward.experts.{p}", range(2), GATE_UP),
        (0, 1),
        {"text_config": {"num_hidden_layers": 2, "num_local_experts": 8}},
    ),
    "Llama-4 fp8": Layout(
        numbered(
            "language_model.model.layers.{l}.feed_forward.experts.{e}.{p}",
            range(2),
            each(GUD, "F8_E4M3", (4, 6)) | each(GUD, "BF16", (4, 1), ".weight_scale"),
        ),
        (0, 1),
        {"text_config": {"num_hidden_layers": 2, "num_local_experts": 8}},
    ),
    "Llama-4 nvfp4": Layout(
        together(
            fused(
                "language_model.model.layers.{l}.feed_forward.experts.{p}",
                range(2),
                {
                    "gate_up_proj": ("U8", (6, 4)),
                    "gate_up_proj_weight_scale": ("F8_E4M3", (6, 1)),
                    "down_proj": ("U8", (4, 3)),
                    "down_proj_weight_scale": ("F8_E4M3", (4, 1)),
                },
            ),
            dense(
                "language_model.model.layers.0.feed_forward.experts.gate_up_proj_weight_scale_2",
                "language_model.model.layers.0.feed_forward.experts.gate_up_proj_input_scale",
                dtype="F32",
                shape=(),
            ),
        ),
        (0, 1),
        {"text_config": {"num_hidden_layers": 2, "num_local_experts": 8}},
        noted=("tensors without an expert dimension belong to their layers",),
    ),
    "MiniMax-M2 fp8": Layout(
        numbered(
            "model.layers.{l}.block_sparse_moe.experts.{e}.{p}",
            range(2),
            each(W, "F8_E4M3", (4, 6)) | each(W, "F32", (1, 1), ".weight_scale_inv"),
        ),
        (0, 1),
        {"num_hidden_layers": 2, "num_local_experts": 8},
    ),
    "Arctic": Layout(
        numbered("model.layers.{l}.mlp.experts.{e}.{p}", range(2), each(W, "BF16", (4, 6))),
        (0, 1),
        {"num_hidden_layers": 2, "num_local_experts": 8},
    ),
    "ERNIE-4.5": Layout(numbered(MLP, range(1, 3), BF16), (1, 2), {"num_hidden_layers": 3, "moe_num_experts": 8}),
    "LongCat with zero experts": Layout(
        together(
            numbered(MLP, range(2), BF16),
            unexpected(
                lambda stored: [
                    stored.add(f"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight")
                    for layer in range(2)
                    for expert in range(8, 12)
                ]
            ),
        ),
        (0, 1),
        {"num_layers": 2, "n_routed_experts": 8, "zero_expert_num": 4},
        noted=("zero experts compute nothing and are left out",),
    ),
    "Jamba": Layout(
        together(
            numbered("model.layers.{l}.feed_forward.experts.{e}.{p}", range(1, 5, 2), BF16),
            dense("model.layers.0.feed_forward.gate_proj.weight", "model.layers.2.feed_forward.gate_proj.weight"),
        ),
        (1, 3),
        {"num_hidden_layers": 4, "num_experts": 8, "expert_layer_period": 2, "expert_layer_offset": 1},
    ),
    "LFM2": Layout(
        together(
            numbered("model.layers.{l}.feed_forward.experts.{e}.{p}", range(2, 4), each(W, "BF16", (4, 6))),
            dense("model.layers.2.feed_forward.expert_bias", dtype="F32", shape=(8,)),
        ),
        (2, 3),
        {"num_hidden_layers": 4, "num_dense_layers": 2, "num_experts": 8},
    ),
    "DBRX": Layout(
        joined("transformer.blocks.{l}.ffn.experts.{p}", range(2), each("mlp.w1 mlp.v1 mlp.w2", "BF16", (4, 6), "")),
        (0, 1),
        {"n_layers": 2, "ffn_config": {"moe_num_experts": 8, "moe_top_k": 4}},
    ),
    "all experts in one matrix, with a projection called gate": Layout(
        together(
            joined("model.layers.{l}.moe.experts.{p}", range(2), each("gate up down", "BF16", (4, 6))),
            dense("model.layers.0.moe.experts.router.weight", shape=(8, 4)),
        ),
        (0, 1),
        {"num_hidden_layers": 2, "num_experts": 8},
        noted=("tensors of routers stay where they are",),
    ),
    "Granite": Layout(
        fused(
            "model.layers.{l}.block_sparse_moe.{p}",
            range(2),
            {"input_linear.weight": ("BF16", (8, 6)), "output_linear.weight": ("BF16", (6, 4))},
        ),
        (0, 1),
        {"num_hidden_layers": 2, "num_local_experts": 8},
    ),
    "Nemotron-H": Layout(
        together(
            numbered(
                "backbone.layers.{l}.mixer.experts.{e}.{p}", range(1, 2), each("up_proj down_proj", "BF16", (4, 6))
            ),
            dense("backbone.layers.0.mixer.in_proj.weight", "backbone.layers.2.mixer.q_proj.weight"),
        ),
        (1,),
        {"num_hidden_layers": 3, "n_routed_experts": 8, "hybrid_override_pattern": "ME*"},
    ),
    "Step-3": Layout(
        together(
            fused("model.layers.{l}.moe.{p}", range(1, 3), each(GUD, "BF16", (4, 6))),
            dense("model.layers.0.mlp.gate_proj.weight", "model.layers.1.share_expert.gate_proj.weight"),
        ),
        (1, 2),
        {"num_hidden_layers": 3, "moe_num_experts": 8, "moe_layers_enum": "1,2"},
    ),
    "Step-3 fp8": Layout(
        fused(
            "model.layers.{l}.moe.{p}",
            range(2),
            each(GUD, "F8_E4M3", (4, 6)) | each(GUD, "F32", (4,), ".weight_scale"),
        ),
        (0, 1),
        {"num_hidden_layers": 2, "moe_num_experts": 8},
    ),
    "Gemma-4": Layout(
        fused("model.language_model.layers.{l}.experts.{p}", range(2), GATE_UP),
        (0, 1),
        {"text_config": {"num_hidden_layers": 2, "num_experts": 8}},
    ),
    "Grok-1": Layout(
        numbered(
            "model.layers.{l}.moe_block.experts.{e}.{p}", range(2), each("linear linear_v linear_1", "BF16", (4, 6))
        ),
        (0, 1),
        {"num_hidden_layers": 2, "num_experts": 8},
    ),
    "w13_weight": Layout(
        fused(FUSED, range(2), {"w13_weight": ("BF16", (8, 6)), "w2_weight": ("BF16", (6, 4))}), (0, 1), QWEN3
    ),
    "no configuration": Layout(numbered(MLP, range(2), BF16), (0, 1)),
    "no configuration, fused": Layout(fused(FUSED, range(2), GATE_UP), (0, 1)),
}


def check(checkpoint: Checkpoint, stored: Stored) -> None:
    for number, layer in enumerate(checkpoint.layer_ids):
        names = [spec.name for spec in checkpoint.tensor_specs(number)]
        for expert in range(checkpoint.num_experts):
            tensors = checkpoint.expert_tensors(number, expert)
            assert [(t.dtype, tuple(t.shape)) for t in tensors] == [
                (spec.torch_dtype, spec.shape) for spec in checkpoint.tensor_specs(number)
            ]
            found = [tensor.reshape(-1).view(BYTES).numpy().tobytes() for tensor in tensors]
            assert dict(zip(names, found, strict=True)) == stored.expected[layer, expert]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_layout_is_read_to_the_byte(name: str, tmp_path: Path) -> None:
    layout, stored = LAYOUTS[name], Stored()
    layout.make(stored)
    checkpoint = Checkpoint.open(stored.write(tmp_path / "c", layout.config or None, layout.config_name), layout.part)
    assert checkpoint.layer_ids == layout.layers
    assert checkpoint.num_experts == 8
    assert checkpoint.num_groups == layout.groups
    check(checkpoint, stored)
    assert len(checkpoint.notes) == len(layout.noted)
    assert all(note.startswith(start) for note, start in zip(checkpoint.notes, layout.noted, strict=True))


def test_settings_in_text_of_unlike_lengths_are_filled_up_with_spaces(tmp_path: Path) -> None:
    stored = Stored()
    stored.numbered(MLP, range(1), NF4, experts=3)
    texts = [b'{"offset": 0.25}', b'{"offset": 0.0625}', b'{"offset": 1}']
    for expert, text in enumerate(texts):
        name = f"model.layers.0.mlp.experts.{expert}.up_proj.weight.quant_state.bitsandbytes__nf4"
        stored.tensors[name] = ("U8", (len(text),), text)
    checkpoint = Checkpoint.open(stored.write(tmp_path / "c"))
    names = [spec.name for spec in checkpoint.tensor_specs(0)]
    place = names.index("up_proj.weight.quant_state.bitsandbytes__nf4")
    found = [checkpoint.expert_tensors(0, expert)[place].numpy().tobytes() for expert in range(3)]
    assert found == [text.ljust(18) for text in texts]


def test_one_expert_of_a_fused_tensor_is_read_without_the_others(tmp_path: Path) -> None:
    num_experts, row_bytes = 4096, 16 << 20  # 64 GiB, of which the disk holds two numbers
    shape = [num_experts, row_bytes // 4, 1]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, num_experts * row_bytes]}}).encode()
    begin = 8 + len(header)
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for expert, number in ((2999, 1.0), (3000, 2.0)):
            stream.seek(begin + (expert + 1) * row_bytes - 4)
            stream.write(np.float32(number).tobytes())
        stream.truncate(begin + num_experts * row_bytes)
    (tensor,) = Checkpoint.open(tmp_path).expert_tensors(0, 3000)
    assert tensor.shape == (row_bytes // 4, 1)
    assert (tensor[-1].item(), tensor.count_nonzero().item()) == (2.0, 1)


def test_dtypes_that_torch_has_keep_their_names_and_others_are_bytes(tmp_path: Path) -> None:
    stored = Stored()
    stored.numbered(MLP, range(1), {"a.weight": ("U32", (2, 3)), "b.weight": ("F4", (2, 4)), "c.weight": ("C64", (2,))})
    specs = Checkpoint.open(stored.write(tmp_path / "c")).tensor_specs(0)
    assert [(spec.name, spec.shape, spec.dtype) for spec in specs] == [
        ("a", (2, 3), "uint32"),
        ("b", (4,), "uint8"),
        ("c", (2,), "complex64"),
    ]


# --- what is refused, and why ----------------------------------------------------------------------------------------


def refused(stored: Stored, directory: Path, config: dict[str, Any] | None = None, part: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(stored.write(directory / "c", config), part)
    return str(caught.value)


def test_experts_of_a_prediction_layer_are_not_taken_for_the_whole_model(tmp_path: Path) -> None:
    stored = Stored()
    stored.numbered("mtp.layers.{l}.mlp.experts.{e}.{p}", range(1), BF16)
    for layer in range(3):
        stored.add(f"model.layers.{layer}.mlp.unheard_of", shape=(8, 4, 4))
    message = refused(stored, tmp_path, QWEN3 | {"num_hidden_layers": 3})
    assert "only prediction layers have experts in a known layout" in message


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp.unheard_of", (8, 4, 4)),  # as many rows as there are experts
        ("mlp.gate.weight", (8, 4)),  # a router, as the other layers have it
    ],
)
def test_a_layer_whose_experts_are_in_no_known_layout_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    stored = Stored()
    stored.numbered(MLP, range(2), BF16)
    stored.add("model.layers.0.mlp.gate.weight", shape=(8, 4))
    stored.add(f"model.layers.2.{name}", shape=shape)
    message = refused(stored, tmp_path, QWEN3 | {"num_hidden_layers": 3})
    assert "layer 2 has no experts in a known layout" in message
    assert f"model.layers.2.{name}" in message
    assert "experts were found in layers 0-1" in message


def test_a_layer_that_the_configuration_says_has_experts_must_have_some(tmp_path: Path) -> None:
    stored = Stored()
    stored.numbered(MLP, range(1, 3), BF16)
    stored.add("model.layers.0.mlp.gate_proj.weight")
    assert Checkpoint.open(stored.write(tmp_path / "dense"), None).layer_ids == (1, 2)
    message = refused(stored, tmp_path, QWEN3 | {"num_hidden_layers": 3, "first_k_dense_replace": 0})
    assert "layer 0 has no experts in a known layout" in message
    assert "config.json states 3 layers, and that this one has experts" in message


def test_a_download_whose_last_layers_are_missing_is_refused(tmp_path: Path) -> None:
    stored = Stored()
    stored.numbered(MLP, range(2), BF16)
    message = refused(stored, tmp_path, QWEN3 | {"num_hidden_layers": 4})
    assert "layer 2 has no tensors at all, nor has any later one" in message


@pytest.mark.parametrize("section", ["text_config", "llm_config", "language_config", "thinker_config"])
def test_nested_configurations_say_how_many_experts_there_are(tmp_path: Path, section: str) -> None:
    stored = Stored()
    stored.numbered(NESTED, range(2), BF16)
    message = refused(stored, tmp_path, {section: QWEN3 | {"num_experts": 9}})
    assert "expert 8 of layer 0 is missing" in message
    assert "config.json states 9 experts" in message


@pytest.mark.parametrize("stated", [8, [8, 8], [8, 8, 8]])
def test_the_number_of_experts_may_stand_there_for_each_layer(tmp_path: Path, stated: object) -> None:
    stored = Stored()
    stored.numbered(MLP, range(2), BF16)
    assert Checkpoint.open(stored.write(tmp_path / "c", {"num_experts": stated})).num_experts == 8


def test_fused_tensors_with_fewer_rows_than_stated_experts_are_refused(tmp_path: Path) -> None:
    stored = Stored()
    stored.fused(FUSED, range(2), GATE_UP)
    message = refused(stored, tmp_path, QWEN3 | {"num_experts": 9})
    assert "expert 8 of layer 0 is missing" in message


def test_unlike_numbers_of_experts_are_told_from_missing_ones(tmp_path: Path) -> None:
    pruned = Stored()
    pruned.numbered(MLP, range(1), BF16, experts=8)
    pruned.numbered(MLP, range(1, 2), BF16, experts=6)
    assert "layer 1 has 6 experts, layer 0 has 8" in refused(pruned, tmp_path)
    missing = Stored()
    missing.numbered(MLP, range(2), BF16)
    del missing.tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    message = refused(missing, tmp_path)
    assert "expert 3 of layer 1 lacks a tensor that expert 0 has" in message
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in message


def test_unlike_experts_in_one_layer_are_said_to_be_unlike(tmp_path: Path) -> None:
    stored = Stored()
    stored.numbered(MLP, range(2), BF16, experts=16)
    for layer in range(2):
        for expert in range(8, 16):
            for name in GUD.split():
                stored.add(f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight", shape=(2, 6))
    message = refused(stored, tmp_path, {"num_hidden_layers": 2, "moe_num_experts": [8, 8]})
    assert "experts of layer 0 differ in shape or dtype" in message
    assert "it is BF16 [2, 6], that of expert 0 is BF16 [4, 6], like that of 8 of 16 experts" in message
    assert "a layer of unequal experts cannot be moved" in message


def test_two_decoders_are_listed_with_their_words(tmp_path: Path) -> None:
    stored = Stored()
    stored.numbered("thinker.model.layers.{l}.mlp.experts.{e}.{p}", range(2), BF16)
    stored.numbered("talker.model.layers.{l}.mlp.experts.{e}.{p}", range(1), BF16)
    message = refused(stored, tmp_path)
    assert "thinker.model.layers.N.mlp.experts (layers 0-1); talker.model.layers.N.mlp.experts (layer 0)" in message
    assert "give --part thinker or --part talker" in message
    assert "no part of the checkpoint is called 'listener'" in refused(stored, tmp_path, part="listener")


@pytest.mark.parametrize("name", ["experts.0.gate_proj.weight", "model.experts.gate_up_proj"])
def test_experts_outside_a_numbered_layer_are_refused(tmp_path: Path, name: str) -> None:
    stored = Stored()
    stored.numbered(MLP, range(2), BF16)
    stored.add(name)
    message = refused(stored, tmp_path)
    assert "a tensor below experts belongs to no numbered layer" in message
    assert name in message


def test_fused_tensors_of_different_numbers_of_rows_are_refused(tmp_path: Path) -> None:
    stored = Stored()
    stored.fused(FUSED, range(1), {"gate_up_proj": ("BF16", (4, 4))}, experts=8)
    stored.fused(FUSED, range(1), {"down_proj": ("BF16", (4, 4))}, experts=6)
    assert "it is unclear how many experts layer 0 has" in refused(stored, tmp_path)
    message = refused(stored, tmp_path, {"num_experts": 8})
    assert "it is unclear which rows of a tensor belong to which expert of layer 0" in message
    assert "down_proj" in message


def test_matrices_without_a_dimension_of_experts_need_their_number(tmp_path: Path) -> None:
    stored = Stored()
    stored.joined(FUSED, range(1), each("w1 w2", "BF16", (4, 6)))
    message = refused(stored, tmp_path)
    assert "it is unclear how many experts layer 0 has" in message
    assert "state num_experts in config.json" in message


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    stored = Stored()
    stored.numbered(MLP, range(1), BF16)
    stored.numbered("model.layers.{l}.mlp.experts.gate_proj.{e}.{p}", range(1), {"weight": ("BF16", (4, 6))})
    assert "an expert has one tensor under two names" in refused(stored, tmp_path)


def test_a_checkpoint_without_experts_shows_its_model_type_and_the_nearest_tensor(tmp_path: Path) -> None:
    stored = Stored()
    for name in (
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.moe_router.weight",
    ):
        stored.add(name)
    message = refused(stored, tmp_path, {"model_type": "strange_moe"})
    assert "the checkpoint has no experts" in message
    assert "model type 'strange_moe'; its closest tensor is model.layers.0.moe_router.weight" in message
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 4]}, r"is BF16 \[2, 2\], but has 4 bytes"),
        ({"dtype": "BF16", "shape": [2, -2], "data_offsets": [0, 8]}, "has a negative number"),
        ({"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 0]}, "has a negative number"),
        ({"dtype": "BF16", "shape": [2, 2]}, "is incomplete"),
        ({"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}, "its tensors end at byte .*, the file has"),
        ([], "is incomplete"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, change: object, message: str) -> None:
    header = json.dumps({"a": change}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(InputError, match=f"a shard cannot be read as safetensors .*{message}"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\x02" + bytes(7) + b"{]", b"\x02" + bytes(7) + b"[]"])
def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="a shard cannot be read as safetensors"):
        Checkpoint.open(tmp_path)


# --- every byte is accounted for -------------------------------------------------------------------------------------

WORD = st.sampled_from(
    ["weight", "w1", "gate_proj", "down_proj", "scale", "absmax", "bias", "qweight", "router", "a_1"]
)
PART = st.lists(WORD, min_size=1, max_size=3).map(".".join)
SHAPE = st.lists(st.integers(1, 4), max_size=3).map(tuple)
DTYPE = st.sampled_from(["F8_E4M3", "BF16", "F32", "U64", "I8", "NEW8"])
BLOCK = st.sampled_from(["mlp.experts", "experts", "ffn.text_experts", "block.moe.experts"])
PREFIX = st.sampled_from(["model.layers", "layers", "language_model.model.h", "mtp.layers", "a.layers"])


@st.composite
def random_checkpoints(draw: st.DrawFn) -> Stored:
    """Draw a checkpoint of one to three sequences of layers, in which something may be odd."""
    stored = Stored(random=np.random.default_rng(draw(st.integers(0, 99))))
    for _ in range(draw(st.integers(1, 3))):
        prefix, block = draw(PREFIX), draw(BLOCK)
        parts = draw(st.dictionaries(PART, st.tuples(DTYPE, SHAPE), min_size=1, max_size=4))
        layers = range(draw(st.integers(0, 2)), draw(st.integers(3, 4)))
        kind, template = draw(
            st.sampled_from(
                [
                    (stored.numbered, f"{prefix}.{{l}}.{block}.{{e}}.{{p}}"),
                    (stored.numbered, f"{prefix}.{{l}}.{block}.up.{{e}}.{{p}}"),
                    (stored.fused, f"{prefix}.{{l}}.{block}.{{p}}"),
                    (stored.joined, f"{prefix}.{{l}}.{block}.{{p}}"),
                ]
            )
        )
        if kind == stored.joined:
            parts = {part: (dtype, (2, *shape)) for part, (dtype, shape) in parts.items()}
        kind(template, layers, parts, experts=draw(st.integers(1, 5)))
    for name in draw(st.lists(st.tuples(PREFIX, BLOCK, PART), max_size=2)):
        stored.add(f"{name[0]}.0.{name[1]}.{name[2]}", draw(DTYPE), draw(SHAPE))
    for name in draw(st.lists(st.sampled_from(sorted(stored.tensors)), max_size=1)):
        del stored.tensors[name]
    return stored


@examples(100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stored=random_checkpoints(),
    part=st.sampled_from([None, None, "mtp", "model", "layers"]),
    config=st.dictionaries(st.sampled_from(["num_experts", "num_hidden_layers"]), st.integers(1, 5)),
)
def test_every_byte_below_experts_is_read_or_left_out_by_name_or_refused(
    tmp_path: Path, stored: Stored, part: str | None, config: dict[str, Any]
) -> None:
    directory = stored.write(tmp_path / "c", config)
    try:
        checkpoint = Checkpoint.open(directory, part)
    except InputError:
        return
    below = {name: len(content) for name, (_, _, content) in stored.tensors.items() if "experts." in name}
    read = checkpoint.num_experts * sum(
        spec.nbytes for layer in range(checkpoint.num_layers) for spec in checkpoint.tensor_specs(layer)
    )
    assert checkpoint.left_out <= below.keys()
    assert read + sum(below[name] for name in checkpoint.left_out) == sum(below.values())
    assert bool(checkpoint.left_out) == bool(checkpoint.notes) or part is not None
    contents = {content for _, _, content in stored.tensors.values()}
    for layer in range(checkpoint.num_layers):
        for expert in range(checkpoint.num_experts):
            for tensor in checkpoint.expert_tensors(layer, expert):
                bytes_of_it = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                assert any(bytes_of_it in content for content in contents)
