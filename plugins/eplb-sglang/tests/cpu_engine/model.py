"""A tiny random Qwen3-MoE checkpoint, made on the spot. Prompts are token numbers, so that it needs no tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, EXPERTS, HIDDEN, INNER, VOCABULARY = 3, 16, 128, 64, 512


def make_checkpoint(folder: Path, seed: int = 0) -> None:
    """Write a checkpoint whose tokens depend on every expert."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "moe_intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCABULARY,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(seed), str(folder / "model.safetensors"), metadata={"format": "pt"})


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Return all tensors of the checkpoint; the experts' are large enough to matter in every token."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * scale

    tensors = {
        "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN, scale=1.0),
        "lm_head.weight": normal(VOCABULARY, HIDDEN, scale=1.0),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = torch.ones(HIDDEN)
        for name, rows in (("q", 128), ("k", 64), ("v", 64)):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = normal(rows, HIDDEN, scale=0.1)
        tensors[f"{at}.self_attn.o_proj.weight"] = normal(HIDDEN, 128, scale=0.1)
        for name in ("q_norm", "k_norm"):
            tensors[f"{at}.self_attn.{name}.weight"] = torch.ones(32)
        tensors[f"{at}.mlp.gate.weight"] = normal(EXPERTS, HIDDEN, scale=0.3)
        for expert in range(EXPERTS):
            for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
                tensors[f"{at}.mlp.experts.{expert}.{name}_proj.weight"] = normal(*shape, scale=0.3)
    return tensors
