"""Writes a small checkpoint with the files, names and dtypes of a real one, and random bytes for weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from eplb_core.errors import InputError
from eplb_core.extras import require
from eplb_core.inputs.edge import writing
from eplb_core.inputs.experts import TensorSpec
from eplb_core.inputs.models import RandomExperts
from eplb_core.inputs.shards import INDEX

if TYPE_CHECKING:
    import torch

Style = Literal["mixtral", "qwen3", "deepseek"]
STYLES: tuple[str, ...] = get_args(Style)

_MARK = "made_by_eplb"  # a key of config.json: the directory holds nothing that could not be written again
_OWN_FILES = re.compile(rf"config\.json|{re.escape(INDEX)}|model-\d{{5}}-of-\d{{5}}\.safetensors")
_BLOCK = 128  # DeepSeek-V3 has one float32 scale for each block of 128 x 128 values


def make_checkpoint(
    directory: str | Path,
    *,
    style: Style = "mixtral",
    layers: int = 2,
    experts: int = 12,
    hidden: int = 64,
    intermediate: int = 128,
    seed: int = 0,
    shards: int = 2,
) -> int:
    """Write `config.json`, the index and the shards of a mixture-of-experts model into a new or empty directory.

    If the directory holds only an earlier checkpoint of this function, that is replaced.

    Weights are bfloat16; in the style of DeepSeek-V3 they are float8 with float32 block scales, the first layer is
    dense, and a multi-token prediction layer follows the last.

    Args:
        directory: the output directory; created if it does not exist.
        style: the naming scheme of the tensors.
        layers: MoE layers.
        experts: experts per layer.
        hidden: the model's hidden size.
        intermediate: the experts' intermediate size.
        seed: of the random bytes.
        shards: how many files the tensors are spread over.

    Returns:
        The bytes of all tensors.

    Raises:
        InputError: a number is not positive, the directory is not empty or not writable, or safetensors is not
            installed.
    """
    require("cli", "writing a checkpoint")
    import torch
    from safetensors.torch import save_file

    numbers = {"layers": layers, "experts": experts, "hidden": hidden, "intermediate": intermediate, "shards": shards}
    for option, number in numbers.items():
        if number < 1:
            raise InputError(f"{option} is {number}", why="it must be 1 or more")
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _make_room(directory)
    except OSError as error:
        raise InputError("the directory cannot be used", where=str(directory), why=error.strerror) from error

    tensors = {"model.embed_tokens.weight": torch.zeros(16, hidden, dtype=torch.bfloat16)}
    tensors |= dict(_expert_tensors(style, layers, experts, hidden, intermediate, seed))
    names = list(tensors)
    shards = min(shards, len(names))
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        with writing(directory / file_name):
            save_file({name: tensors[name] for name in mine}, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    config = _config(style, layers, experts, hidden, intermediate) | {_MARK: True}
    with writing(directory):
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(directory / "config.json", config)
    return total


def _make_room(directory: Path) -> None:
    """Remove an earlier checkpoint of `make_checkpoint`. Raises `InputError` if there is anything else."""
    present = list(directory.iterdir())
    if not present:
        return
    try:
        marked = json.loads((directory / "config.json").read_bytes()).get(_MARK) is True
    except (OSError, ValueError, AttributeError):
        marked = False
    foreign = [path.name for path in present if not _OWN_FILES.fullmatch(path.name)]
    if not marked or foreign:
        raise InputError(
            "the directory is not empty",
            where=str(directory),
            why=f"it also holds {foreign[0]}" if marked else "its content was not written by eplb make-checkpoint",
            remedy="give another one, or empty it",
        )
    for path in present:
        path.unlink()


def _expert_tensors(
    style: Style, layers: int, experts: int, hidden: int, intermediate: int, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    gate, up, down = ("w1", "w3", "w2") if style == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    block = "block_sparse_moe" if style == "mixtral" else "mlp"
    dtype = "float8_e4m3fn" if style == "deepseek" else "bfloat16"
    shapes = {gate: (intermediate, hidden), down: (hidden, intermediate), up: (intermediate, hidden)}
    specs = [TensorSpec(f"{name}.weight", shape, dtype) for name, shape in shapes.items()]
    first_layer = 0
    if style == "deepseek":
        specs += [
            TensorSpec(f"{name}.weight_scale_inv", (-(-rows // _BLOCK), -(-columns // _BLOCK)), "float32")
            for name, (rows, columns) in shapes.items()
        ]
        dense = RandomExperts(tuple(specs[:3]), 1, 1, seed + 1)
        for spec, tensor in zip(dense.tensors, dense.expert_tensors(0, 0), strict=True):
            yield f"model.layers.0.mlp.{spec.name}", tensor
        first_layer = 1
        layers += 1  # the prediction layer
    source = RandomExperts(tuple(specs), layers, experts, seed)
    for layer in range(layers):
        for expert in range(experts):
            prefix = f"model.layers.{first_layer + layer}.{block}.experts.{expert}"
            for spec, tensor in zip(source.tensors, source.expert_tensors(layer, expert), strict=True):
                yield f"{prefix}.{spec.name}", tensor


def _config(style: Style, layers: int, experts: int, hidden: int, intermediate: int) -> dict[str, Any]:
    common = {"hidden_size": hidden, "torch_dtype": "bfloat16", "num_experts_per_tok": min(2, experts)}
    if style == "mixtral":
        return common | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_hidden_layers": layers,
            "num_local_experts": experts,
            "intermediate_size": intermediate,
        }
    if style == "qwen3":
        return common | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_hidden_layers": layers,
            "num_experts": experts,
            "moe_intermediate_size": intermediate,
        }
    return common | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": layers + 1,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
        "n_routed_experts": experts,
        "n_group": 4 if experts % 4 == 0 else 1,
        "moe_intermediate_size": intermediate,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [_BLOCK, _BLOCK]},
    }


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
