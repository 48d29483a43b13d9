"""Every mixture-of-experts family of transformers, as small as its configuration lets it be."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

os.environ["HF_HUB_OFFLINE"] = "1"  # a family whose configuration wants to download something is to fail

NUM_EXPERTS = 4
_NUM_LAYERS = 4
_WIDTH = 16


@dataclass(frozen=True)
class Family:
    """What must be found in the checkpoints of a family, both as published and as transformers holds it in memory.

    Attributes:
        layers: the numbers of the layers with experts, of four.
        published: the tensors of one expert in the published layout.
        fused: the same in the fused layout.
        parts: the sequences of layers to choose from, if there is more than one.
        experts: in memory, a piece of the names of the experts of layer `{layer}`; the part's name is another.
        settings: what must be set beside the sizes, by path.
    """

    layers: tuple[int, ...] = (0, 1, 2, 3)
    published: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    fused: tuple[str, ...] = ("gate_up_proj", "down_proj")
    parts: tuple[str, ...] = ()
    experts: str = "layers.{layer}.mlp.experts."
    settings: tuple[tuple[str, Any], ...] = ()


ALL, AFTER_ONE, AFTER_TWO, LAST = (0, 1, 2, 3), (1, 2, 3), (2, 3), (3,)
MIXTRAL = ("w1", "w2", "w3")
SAME = ("gate_up_proj", "down_proj")  # published fused
BIASES = (*SAME, "gate_up_proj_bias", "down_proj_bias")
LINEAR = ("input_linear", "output_linear")
SPARSE = "layers.{layer}.block_sparse_moe.experts."
BARE = "layers.{layer}.experts."
FEED_FORWARD = "layers.{layer}.feed_forward.experts."
GEMMA = tuple(
    (f"text_config.{name}", value)
    for name, value in (
        *(("num_experts", NUM_EXPERTS), ("top_k_experts", 2)),
        *(("moe_intermediate_size", _WIDTH), ("enable_moe_block", True)),
    )
)
INDEXER = tuple(
    (f"text_config.indexer_{name}", value)
    for name, value in (("n_heads", 2), ("kv_heads", 1), ("head_dim", 8), ("budget", 64), ("compress_ratio", 4))
)

FAMILIES: dict[str, Family] = {
    "afmoe": Family(AFTER_ONE),
    "aria": Family(published=("fc1", "fc2")),
    "axk1": Family(AFTER_ONE),
    "axk2": Family(AFTER_ONE),
    "bailing_hybrid": Family(AFTER_TWO),
    "beam": Family(LAST),
    "cohere2_moe": Family(),
    "dbrx": Family(
        published=("mlp.v1", "mlp.w1", "mlp.w2"),
        fused=("mlp.v1", "mlp.w1", "mlp.w2"),
        experts="blocks.{layer}.ffn.experts.",
        settings=(("attn_config.rope_theta", 10000.0),),
    ),
    "deepseek_ocr2": Family(AFTER_ONE, settings=(("text_config.mlp_layer_types", ["dense"] + ["sparse"] * 3),)),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(LAST),
    "deepseek_v32": Family(LAST),
    "deepseek_v4": Family(published=MIXTRAL),
    "diffusion_gemma": Family(published=SAME, experts="decoder.layers.{layer}.experts.", settings=GEMMA),
    "dots1": Family(settings=(("n_routed_experts", NUM_EXPERTS), ("n_shared_experts", 1), ("num_experts_per_tok", 2))),
    "dots3_note": Family(AFTER_ONE),
    "ernie4_5_moe": Family(AFTER_ONE),
    "ernie4_5_vl_moe": Family(
        AFTER_ONE,
        parts=("text_moe", "vision_moe"),
        experts="layers.{layer}.mlp.{part}.experts.",
        settings=(("text_config.head_dim", 8), ("text_config.rope_parameters.mrope_section", [1, 1, 2])),
    ),
    "exaone_moe": Family(AFTER_ONE),
    "flex_olmo": Family(),
    "flint": Family(AFTER_TWO),
    "gemma4": Family(published=SAME, experts=BARE, settings=GEMMA),
    "glm4_moe": Family(AFTER_ONE),
    "glm4_moe_lite": Family(AFTER_ONE),
    "glm4v_moe": Family(AFTER_ONE),
    "glm5_next": Family(LAST),
    "glm_moe_dsa": Family(LAST),
    "gpt_oss": Family(published=BIASES, fused=BIASES),
    "granitemoe": Family(published=LINEAR, experts=SPARSE),
    "granitemoe_swa": Family(published=SAME, experts=SPARSE),
    "granitemoehybrid": Family(published=LINEAR, experts=SPARSE, settings=(("mamba_n_heads", 4), ("mamba_d_head", 8))),
    "granitemoeshared": Family(published=LINEAR, experts=SPARSE),
    "hunyuan_v1_moe": Family(settings=(("head_dim", 8), ("num_experts", NUM_EXPERTS))),
    "hy_v3": Family(AFTER_ONE),
    "hy_v4": Family(AFTER_ONE, published=SAME),
    "hy_v4_vl": Family(AFTER_ONE, published=SAME),
    "inkling_mm_model": Family(published=("w13_weight", "w2_weight")),
    "inkling2": Family(published=("w13_weight", "w2_weight")),
    "inkling2_loop": Family(published=("w13_weight", "w2_weight")),
    "jamba": Family((1, 3), experts=FEED_FORWARD),
    "jetmoe": Family(published=LINEAR, fused=LINEAR, parts=("mlp", "self_attention"), experts="layers.{layer}."),
    "kimi_k25": Family(LAST),
    "kimi_linear": Family(AFTER_ONE, published=MIXTRAL),
    "kolibri1": Family(),
    "laguna": Family(AFTER_ONE),
    "lara_mini": Family(published=SAME),
    "lfm2_moe": Family(
        AFTER_TWO, published=MIXTRAL, experts=FEED_FORWARD, settings=(("layer_types", ["conv", "full_attention"] * 2),)
    ),
    "llama4": Family(published=SAME, experts=FEED_FORWARD),
    "longcat_flash": Family(),
    "mellum": Family(),
    "mimo_v2_flash": Family(AFTER_ONE),
    "minimax": Family(published=MIXTRAL),
    "minimax_m2": Family(published=MIXTRAL),
    "minimax_m3_vl": Family(published=MIXTRAL),
    "mistral4": Family(published=SAME),
    "mistral_large4": Family(AFTER_ONE, published=MIXTRAL),
    "mixtral": Family(published=MIXTRAL),
    "muse_spark": Family(published=SAME),
    "nemotron_h": Family(
        (1,),
        published=("up_proj", "down_proj"),
        fused=("up_proj", "down_proj"),
        experts="layers.{layer}.mixer.experts.",
    ),
    "nllb-moe": Family(
        LAST,
        published=("fc1", "fc2", "fc1.bias", "fc2.bias"),
        fused=("fc1", "fc2", "fc1.bias", "fc2.bias"),
        parts=("encoder", "decoder"),
        experts="layers.{layer}.ffn.experts.",
    ),
    "olmoe": Family(),
    "openai_privacy_filter": Family(published=BIASES, fused=BIASES),
    "phimoe": Family(published=MIXTRAL),
    "qwen2_moe": Family(),
    "qwen3_5_moe": Family(),
    "qwen3_moe": Family(),
    "qwen3_next": Family(),
    "qwen3_omni_moe": Family(
        parts=("thinker", "talker"),
        settings=(
            ("talker_config.text_config.shared_expert_intermediate_size", _WIDTH),
            ("talker_config.spatial_merge_size", 2),
        ),
    ),
    "qwen3_vl_moe": Family(published=SAME),
    "qwen4_exp": Family(settings=INDEXER),
    "sarvam_moe": Family(AFTER_ONE),
    "solar_open": Family(),
    "step3p7": Family(LAST),
    "switch_transformers": Family(
        (1,),
        published=("wi", "wo"),
        fused=("wi", "wo"),
        parts=("encoder", "decoder"),
        experts="block.{layer}.layer.",
    ),
    "unlimited_ocr": Family(AFTER_ONE),
    "zaya": Family(published=SAME),
}
"""Every family of transformers 5.24 that routes tokens to experts, except Doge, whose experts are an embedding."""


def build(name: str) -> PreTrainedModel:
    """Return a model of the family with random weights in bfloat16."""
    import torch
    import transformers
    from transformers.models.auto import modeling_auto

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.CONFIG_MAPPING[name]()
    _shrink(config)
    for path, value in FAMILIES[name].settings:
        *sections, setting = path.split(".")
        target: Any = config
        for section in sections:
            target = target[section] if isinstance(target, dict) else getattr(target, section)
        target.__setitem__(setting, value) if isinstance(target, dict) else setattr(target, setting, value)
    mappings = ("IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")
    classes = [getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING") for mapping in mappings]
    found = next((each[type(config)] for each in (*classes, modeling_auto.MODEL_MAPPING) if type(config) in each), None)
    if found is None:
        found = transformers.Qwen3OmniMoeForConditionalGeneration  # in none of them
    torch.manual_seed(len(name))
    model = (found[0] if isinstance(found, tuple) else found)(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter, dtype=torch.bfloat16)  # some would be zero
    return model


def experts_in_memory(model: PreTrainedModel, family: Family, part: str, layer: int) -> list[list[torch.Tensor]]:
    """Return the tensors of each expert of a layer, as the model itself would use them."""
    within = family.experts.format(layer=layer, part=part)
    experts: list[list[torch.Tensor]] = [[] for _ in range(NUM_EXPERTS)]
    for name, tensor in model.state_dict().items():
        numbered = re.search(r"\.expert_(\d+)\.", name)
        words = name.split(".")
        if f".{within}" not in f".{name}" or "router" in words or (part and part not in words):
            continue
        if numbered:
            experts[int(numbered[1])].append(tensor)
        elif tensor.ndim > 2 or name.endswith("_bias"):
            for expert in range(NUM_EXPERTS):
                experts[expert].append(tensor[expert])
        elif re.search(r"\.experts\.mlp\.", name):  # DBRX: all experts in one matrix
            for expert, rows in enumerate(tensor.chunk(NUM_EXPERTS)):
                experts[expert].append(rows)
    return experts


def _shrink(config: PretrainedConfig) -> None:
    """Make every size of a configuration and of its sections small."""
    from transformers import PretrainedConfig

    settings = vars(config)
    for name, value in list(settings.items()):
        if isinstance(value, PretrainedConfig):
            _shrink(value)
        elif type(value) is int and (small := _small(name, value)) != value:
            setattr(config, name, small)
        elif name.endswith("token_id") and value is not None:
            setattr(config, name, [0] if isinstance(value, list) else 0)
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in list(settings.items()):
        of_layers = isinstance(value, list) and re.search(r"layer|type|pattern|freq|rope|mlp", name)
        if of_layers and isinstance(layers, int) and len(value) > layers:
            setattr(config, name, value[:layers])


def _small(name: str, value: int) -> int:
    for pattern, limit in (
        (r"token_id$", 0),
        (r"vocab", 64),
        (r"num_(hidden_|decoder_|encoder_)?layers|n_layers?|depth|(en|de)coder_layers|num_blocks?", _NUM_LAYERS),
        (r".*(experts?_per_tok|topk|top_k)", 2),
        (r"n_group|topk_group|num_expert_group", 1),
        (r"(num_local|n_routed|moe_num|num|n)_experts", NUM_EXPERTS),
        (r"zero_expert_num", 2),
        (r".*(head_dim|qk_|v_head|rope_dim|rotary_dim)", 8),
        (r".*_rank", 8),
        (r".*heads", 2),
        (r".*(patch|kernel|merge|image_size|window|chunk|state_size|conv|block_size|temporal|spatial)", value),
        (r".*(hidden|d_model|dim$|embed|width|intermediate|ffn|d_ff|d_kv|_size$|channels|in_features)", _WIDTH),
    ):
        if re.match(pattern + (r"$" if "$" not in pattern and pattern[0] in "n(z" else ""), name):
            return min(value, limit)
    return value
