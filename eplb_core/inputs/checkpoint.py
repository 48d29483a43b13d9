"""The experts of a Hugging Face mixture-of-experts checkpoint, read one by one on demand.

`layouts` interprets the names, `expert_table` assigns the bytes to experts. This module accounts for the layers: every
layer that the configuration states has experts, is dense, or is an error.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from eplb_core.errors import InputError
from eplb_core.inputs.edge import reading
from eplb_core.inputs.expert_table import Found, LayerTable, TableBuilder, layouts_of
from eplb_core.inputs.experts import TensorSpec
from eplb_core.inputs.layouts import LAYOUTS, Stack, is_below_experts, layer_of, locate
from eplb_core.inputs.model_config import ModelConfig
from eplb_core.inputs.shards import Shards

if TYPE_CHECKING:
    import torch

_CODES = (".trellis", ".codes")  # of quantised matrices (EXL3, AQLM): three dimensions, but none of them counts experts
_Layers = dict[int, list[Found]]
_Stacks = dict[Stack, _Layers]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """The experts of a checkpoint; an `ExpertSource`. Make one with `Checkpoint.open`.

    It holds no open file, only the location of the bytes, so it can be sent to another process.

    Attributes:
        directory: the checkpoint's directory.
        layer_ids: the number in the model of each MoE layer; dense layers are skipped.
        num_experts: logical experts in each of them.
        num_groups: the expert groups that the configuration states, else 1.
        num_hidden_layers: all layers that the configuration states, dense ones included; None if it does not, or if
            these are prediction layers, which are not among them.
        experts_per_token: how many experts the router chooses, or None if the configuration does not say.
        model_type: the model's name in the configuration, or "".
        layouts: names of the layouts that its tensors have.
        notes: what was left out, and why.
        left_out: the tensors below experts that do not belong to an expert of these layers.
        files: its safetensors files, and how many bytes each has.
        tables: for each MoE layer, which bytes of which file belong to which expert.
    """

    directory: Path
    layer_ids: tuple[int, ...]
    num_experts: int
    num_groups: int
    num_hidden_layers: int | None
    experts_per_token: int | None
    model_type: str
    layouts: tuple[str, ...]
    notes: tuple[str, ...]
    left_out: frozenset[str] = field(repr=False)
    files: tuple[tuple[Path, int], ...] = field(repr=False)
    tables: tuple[LayerTable, ...] = field(repr=False)

    @classmethod
    def open(cls, directory: str | Path, part: str | None = None) -> Self:
        """Read the headers of a checkpoint, and account for every tensor of an expert and for every layer.

        Args:
            directory: a directory with `model.safetensors.index.json` and its shards, or with `.safetensors` files
                only. `config.json`, if present, states how many experts and layers there are and which are multi-token
                prediction layers; those are left out, as engines balance them separately.
            part: a word in the names of the tensors that selects one of several sequences of layers: `thinker`,
                `talker`, `mtp`, `encoder`, `vision_moe`.

        Raises:
            InputError: there is no such checkpoint, a shard, tensor or expert is missing, experts of one layer
                differ, tensors or layers cannot be accounted for, or there are no experts at all. The message names
                the file and the tensor.
        """
        directory = Path(directory)
        with reading(directory, "checkpoint"):
            return cls._open(directory, part)

    @classmethod
    def _open(cls, directory: Path, part: str | None) -> Self:
        shards = Shards.open(directory)
        stacks = _find_stacks(shards)
        config = ModelConfig.read(directory)
        if not stacks:
            raise _no_experts(shards, config)
        stacks = _split_prediction_layers(stacks, directory, shards)
        notes: list[str] = []
        chosen = _choose(stacks, part, directory, notes)
        words = {word for stack in chosen for word in stack.words}
        config = ModelConfig.read(directory, sorted(words))
        layers: _Layers = {}
        for stack in chosen:
            layers |= stacks[stack]
        builder = TableBuilder(shards, config)
        tables = builder.build(layers)
        num_experts = len(tables[0].files)
        predicts = any(stack.predicts for stack in chosen)
        if not predicts:
            _account_for_layers(shards, config, {stack.prefix for stack in chosen}, layers, num_experts)
        return cls(
            directory=directory,
            layer_ids=tuple(sorted(layers)),
            num_experts=num_experts,
            num_groups=config.num_groups,
            num_hidden_layers=None if predicts else config.num_hidden_layers,
            experts_per_token=config.experts_per_token,
            model_type=config.model_type,
            layouts=tuple(layout.name for layout in layouts_of(layers)),
            notes=(*notes, *builder.notes),
            left_out=frozenset(builder.left_out)
            | {name for stack in stacks.keys() - set(chosen) for found in stacks[stack].values() for name, _ in found},
            files=tuple(zip(shards.files, shards.sizes, strict=True)),
            tables=tables,
        )

    @property
    def num_layers(self) -> int:
        """How many MoE layers there are; dense layers do not count."""
        return len(self.layer_ids)

    def tensor_specs(self, layer: int) -> tuple[TensorSpec, ...]:
        """Return the tensors of one expert of MoE layer number `layer`."""
        return self.tables[layer].specs

    def expert_tensors(self, layer: int, expert: int) -> list[torch.Tensor]:
        """Read one expert of MoE layer number `layer`, and no byte of any other.

        Returns:
            CPU tensors as `tensor_specs(layer)` describes them.

        Raises:
            InputError: a shard can no longer be read, or has changed since the checkpoint was opened.
        """
        import torch

        table = self.tables[layer]
        places = (table.files[expert].tolist(), table.offsets[expert].tolist(), table.sizes[expert].tolist())
        tensors = []
        opened: dict[int, int] = {}
        try:
            for spec, file, offset, size in zip(table.specs, *places, strict=True):
                content = torch.empty(spec.nbytes, dtype=torch.uint8)
                content[size:] = ord(" ")  # pad text that is shorter than that of other experts
                if file not in opened:
                    opened[file] = os.open(self.files[file][0], os.O_RDONLY | os.O_CLOEXEC)
                self._read(opened[file], content.numpy().data[:size], offset, f"{self.files[file][0]}, {spec.name}")
                tensors.append(content.view(spec.torch_dtype).reshape(spec.shape))
        except OSError as error:
            raise InputError("a tensor cannot be read", where=str(self.files[file][0]), why=error.strerror) from error
        finally:
            for descriptor in opened.values():
                os.close(descriptor)
        return tensors

    @staticmethod
    def _read(descriptor: int, target: memoryview, offset: int, where: str) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(descriptor, [target[done:]], offset + done)
            if not count:
                raise InputError("a tensor of the checkpoint changed after it was opened", where=where)
            done += count


def _find_stacks(shards: Shards) -> _Stacks:
    """Return all tensors below experts, by sequence of layers."""
    stacks: _Stacks = {}
    doubtful: _Stacks = {}
    for name, stored in shards.tensors.items():
        place = locate(name)
        if place is None:
            if is_below_experts(name):
                raise InputError(
                    "a tensor below experts belongs to no numbered layer",
                    where=shards.where(name),
                    why=f"a name looks like {LAYOUTS[0].example}",
                )
            continue
        evident = place.layout.is_evident(place.part, stored.shape)
        target = stacks if evident else doubtful
        target.setdefault(place.stack, {}).setdefault(place.layer, []).append(Found(name, place))
    for stack, layers in doubtful.items():
        for layer, found in layers.items():
            # The scales of a fused tensor may have fewer dimensions than those of a dense layer's weights.
            if layer in stacks.get(stack, {}):
                stacks[stack][layer] += found
    return stacks


def _split_prediction_layers(stacks: _Stacks, directory: Path, shards: Shards) -> _Stacks:
    """Put layers after the last one that the configuration states into separate stacks.

    DeepSeek-V3 and its descendants number their prediction layers like that.
    """
    split: _Stacks = {}
    for stack, layers in stacks.items():
        config = ModelConfig.read(directory, sorted(stack.words))
        stated = config.num_hidden_layers
        if stated is None or stack.predicts:
            split[stack] = layers
            continue
        behind = sorted(layer for layer in layers if layer >= stated)
        # Some configurations do not state them; then they must follow the last layer without a gap.
        if behind and behind[-1] >= stated + max(config.num_prediction_layers, len(behind)):
            name = layers[behind[-1]][0].name
            raise InputError(
                f"config.json states {stated} layers, but the checkpoint has experts in layer {behind[-1]}",
                where=shards.where(name),
            )
        if len(behind) < len(layers):
            split[stack] = {layer: found for layer, found in layers.items() if layer < stated}
        if behind:
            split[stack._replace(predicts=True)] = {layer: layers[layer] for layer in behind}
    return split


def _choose(stacks: _Stacks, part: str | None, directory: Path, notes: list[str]) -> list[Stack]:
    """Return the stacks that belong together: one decoder, or the requested part."""
    if part is None:
        candidates = [stack for stack in stacks if not stack.predicts]
        if not candidates:
            raise InputError(
                "only prediction layers have experts in a known layout",
                where=str(directory),
                why="; ".join(_describe(stack, layers) for stack, layers in stacks.items()),
                remedy="give --part mtp to balance them alone",
            )
        notes += [
            f"experts of prediction layers were left out: {_describe(stack, layers)}; --part mtp balances them alone"
            for stack, layers in stacks.items()
            if stack.predicts
        ]
    else:
        candidates = [stack for stack in stacks if part in stack.words]
        if part != "mtp" and any(not stack.predicts for stack in candidates):
            candidates = [stack for stack in candidates if not stack.predicts]
    listed = "; ".join(_describe(stack, layers) for stack, layers in stacks.items())
    if not candidates:
        raise InputError(f"no part of the checkpoint is called {part!r}", where=str(directory), why=f"it has {listed}")
    numbers = [layer for stack in candidates for layer in stacks[stack]]
    if len({stack.prefix for stack in candidates}) > 1 or len(set(numbers)) < len(numbers):
        words = [sorted(stack.words - _common(candidates)) for stack in candidates]
        raise InputError(
            "the checkpoint has several sequences of experts",
            where=str(directory),
            why=listed,
            remedy="give --part " + " or --part ".join(own[-1] for own in words if own),
        )
    return candidates


def _common(stacks: Sequence[Stack]) -> frozenset[str]:
    return frozenset.intersection(*(stack.words for stack in stacks))


def _describe(stack: Stack, layers: Iterable[int]) -> str:
    numbers = list(layers)
    return f"{stack} (layer{'' if len(numbers) == 1 else 's'} {_ranges(numbers)})"


def _ranges(numbers: Iterable[int]) -> str:
    """Return `0-3, 5` for 0, 1, 2, 3, 5."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)


def _account_for_layers(
    shards: Shards, config: ModelConfig, prefixes: set[str], layers: Mapping[int, object], num_experts: int
) -> None:
    """Raise `InputError` if a layer that the configuration states is neither among `layers` nor dense."""
    if config.num_hidden_layers is None:
        return
    rest: dict[int, list[tuple[str, str]]] = {}
    routers = set()
    for name, stored in shards.tensors.items():
        split = layer_of(name)
        if split is None or split[0] not in prefixes:
            continue
        if split[1] not in layers:
            rest.setdefault(split[1], []).append((split[2], name))
        elif re.search(r"(?:^|\.)(?:gate|router)(?:\.|$)", split[2]) and num_experts in stored.shape[:1]:
            routers.add(split[2])
    first, last = min(layers), max(layers)
    for layer in range(config.num_hidden_layers):
        if layer in layers:
            continue
        declared = config.has_experts(layer)
        signs = [
            name
            for inner, name in rest.get(layer, [])
            if inner in routers or (declared is not False and _holds_many(shards, name, num_experts))
        ]
        if not signs and not declared and (layer in rest or declared is False or layer < first):
            continue
        near = signs or [name for _, name in rest.get(layer, [])]
        raise InputError(
            f"layer {layer} has no experts in a known layout",
            where=shards.where(near[0]) if near else str(shards.directory),
            why=f"config.json states {config.num_hidden_layers} layers"
            + (", and that this one has experts" if declared else "")
            + f"; experts were found in layers {_ranges(layers)}"
            + ("" if near else f"; layer {layer} has no tensors at all" + (", nor has any later one" * (layer > last))),
        )


def _holds_many(shards: Shards, name: str, num_experts: int) -> bool:
    shape = shards.tensors[name].shape
    return len(shape) == 3 and shape[0] == num_experts > 1 and min(shape) > 1 and not name.endswith(_CODES)


def _no_experts(shards: Shards, config: ModelConfig) -> InputError:
    """Return the error for a checkpoint in which nothing looks like an expert."""
    templates = {re.sub(r"\d+", "0", name): name for name in shards.tensors}
    wanted = [layout.example for layout in LAYOUTS]
    scores = {
        template: max(difflib.SequenceMatcher(None, template, example).ratio() for example in wanted)
        + ("expert" in template) + ("moe" in template)
        for template in templates
    }  # fmt: skip
    nearest = max(scores, key=lambda template: scores[template], default=None)
    return InputError(
        "the checkpoint has no experts",
        where=str(shards.directory),
        why=(f"model type {config.model_type!r}; " if config.model_type else "")
        + ("it has no tensors" if nearest is None else f"its closest tensor is {templates[nearest]}"),
        remedy=f"known names look like {' or '.join(wanted)}",
    )
