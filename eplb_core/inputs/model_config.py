"""Finds the mixture-of-experts settings in a checkpoint's configuration, in any of its sections.

Multimodal models keep the settings of their language model in a section; some keep those of the experts in another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from eplb_core.inputs.shards import read_json_object

# Sections that hold settings of the language model or of its experts; those of images and sound are ignored.
_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config", "moe")

_LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
_PREDICTION_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")
_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts", "num_moe_experts")
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k", "moe_top_k")
_GROUPS = ("n_group", "num_expert_group", "num_expert_groups")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The settings of one part of a model.

    Attributes:
        model_type: the model's name, or "".
        num_hidden_layers: all layers, including dense ones, without prediction layers; None if not stated.
        num_prediction_layers: layers that predict further tokens and follow the others.
        num_experts: logical experts of a layer, or None.
        num_zero_experts: experts that compute nothing and have no useful weights.
        experts_per_token: how many the router chooses, or None.
        num_groups: groups of experts that the router knows.
        settings: the sections, innermost first.
    """

    model_type: str = ""
    num_hidden_layers: int | None = None
    num_prediction_layers: int = 0
    num_experts: int | None = None
    num_zero_experts: int = 0
    experts_per_token: int | None = None
    num_groups: int = 1
    settings: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def read(cls, directory: Path, words: Iterable[str] = ()) -> Self:
        """Read `config.json`, or `params.json` of Mistral's format; both may be absent.

        Args:
            directory: the checkpoint's directory.
            words: the words of the part's name: settings in a section with such a name come first, as in
                `talker_config`.

        Raises:
            InputError: the file exists, but is not a JSON object.
        """
        for name in ("config.json", "params.json"):
            if (directory / name).is_file():
                return cls.of(read_json_object(directory / name), words)
        return cls()

    @classmethod
    def of(cls, config: Mapping[str, Any], words: Iterable[str] = ()) -> Self:
        """Find the settings in a configuration."""
        words = tuple(words)
        settings = tuple(_sections(config, (*(f"{word}_config" for word in words), *_SECTIONS)))
        sides = [word for word in words if word in ("encoder", "decoder")]
        of_side = [name for side in sides for name in (f"num_{side}_layers", f"{side}_layers")]
        return cls(
            model_type=str(
                config.get("model_type") or next((s["model_type"] for s in settings if "model_type" in s), "")
            ),
            num_hidden_layers=_number(settings, (*of_side, *_LAYERS)),
            num_prediction_layers=_number(settings, _PREDICTION_LAYERS) or 0,
            num_experts=_number(settings, _EXPERTS),
            num_zero_experts=_number(settings, ("zero_expert_num",)) or 0,
            experts_per_token=_number(settings, _PER_TOKEN),
            num_groups=_number(settings, _GROUPS) or 1,
            settings=settings,
        )

    def has_experts(self, layer: int) -> bool | None:
        """Whether the configuration says that a layer has experts; None if it says nothing about single layers."""
        for config in self.settings:
            kinds = config.get("mlp_layer_types")
            if isinstance(kinds, list) and layer < len(kinds):
                return bool(kinds[layer] == "sparse")
            frequency = config.get("moe_layer_freq")
            if isinstance(frequency, list) and layer < len(frequency):
                return bool(frequency[layer])
            first = config.get("first_k_dense_replace", config.get("num_dense_layers"))
            if isinstance(first, int):
                if layer < first:
                    return False
                return layer % frequency == 0 if isinstance(frequency, int) and frequency > 0 else True
            period, offset = config.get("expert_layer_period"), config.get("expert_layer_offset")
            if isinstance(period, int) and isinstance(offset, int) and period > 0:
                return layer % period == offset
            step, dense = config.get("decoder_sparse_step"), config.get("mlp_only_layers")
            # Switch Transformers has a setting of the same name that counts from another layer.
            if isinstance(step, int) and step > 0 and "encoder_sparse_step" not in config:
                return (layer + 1) % step == 0 and layer not in (dense or ())
        return None


def _sections(config: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    for name in names:
        inner = config.get(name)
        if isinstance(inner, Mapping):
            yield from _sections(inner, names)
    yield config


def _number(settings: Iterable[Mapping[str, Any]], names: Iterable[str]) -> int | None:
    """Return the first of these settings that is above 0, in the innermost section that has one."""
    names = tuple(names)
    for config in settings:
        for name in names:
            value = config.get(name)
            if isinstance(value, list) and value and all(type(entry) is int for entry in value):
                # ERNIE-4.5-VL numbers two kinds of experts in one sequence; elsewhere there is an entry for each layer.
                kinds = name == "moe_num_experts" and len(value) == 2
                value = sum(value) if kinds else value[0] if len(set(value)) == 1 else None
            if type(value) is int and value > 0:
                return value
    return None
