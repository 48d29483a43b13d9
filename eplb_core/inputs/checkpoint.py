"""The experts of a Hugging Face mixture-of-experts checkpoint, read one by one as they are asked for.

Known tensor names are those of Mixtral, `...block_sparse_moe.experts.{e}.w1|w2|w3.*`, and those that Qwen3-MoE and
DeepSeek-V3 share, `...mlp.experts.{e}.gate_proj|down_proj|up_proj.*`. Whatever follows, `weight`, `weight_scale_inv`
or another part, is read with it, in any dtype, byte for byte. An expert is handed over as engines hold it: gate and
up projection stacked into `w13`, beside `w2`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from eplb_core.errors import InputError
from eplb_core.inputs.experts import TensorSpec
from eplb_core.inputs.shards import Header, Shards, read_json_object

if TYPE_CHECKING:
    import torch

_EXPERT = re.compile(
    r"layers\.(?P<layer>\d+)\.(?:block_sparse_moe|mlp)\.experts\.(?P<expert>\d+)\."
    r"(?P<projection>w1|w2|w3|gate_proj|up_proj|down_proj)\.(?P<part>\w+)$"
)
_ROLE = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


class _Part(NamedTuple):
    """One tensor of an expert: the projection it belongs to ("gate", "up", "down"), and which part of it."""

    role: str
    part: str


_Names = dict[_Part, str]  # the tensor names of one expert
_Experts = Mapping[tuple[int, int], _Names]  # (the model's layer number, expert) -> its tensors


@dataclass(frozen=True, slots=True)
class _Fused:
    """One tensor as engines hold it, and the parts that are stacked to make it."""

    spec: TensorSpec
    pieces: tuple[_Part, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The experts of a checkpoint; an `ExpertSource`. Make one with `Checkpoint.open`.

    Attributes:
        directory: where it lies.
        layer_ids: the model's own number of each MoE layer; dense layers are skipped.
        num_experts: logical experts in each of them.
        num_groups: the expert groups that the configuration states, else 1.
        num_hidden_layers: all layers that the configuration states, dense ones included, or None.
    """

    directory: Path
    layer_ids: tuple[int, ...]
    num_experts: int
    num_groups: int
    num_hidden_layers: int | None
    _shards: Shards = field(repr=False)
    _experts: _Experts = field(repr=False)
    _fused: tuple[tuple[_Fused, ...], ...] = field(repr=False)

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Read the headers of a checkpoint, and check that every expert is there and that they are alike.

        Args:
            directory: a folder with `model.safetensors.index.json` and its shards, or with `.safetensors` files
                alone. `config.json`, if it is there, tells how many experts there are and which layers are
                multi-token prediction layers; those are left out, as engines balance them apart.

        Raises:
            InputError: there is no such checkpoint, a shard, tensor or expert is missing, experts of one layer
                differ, or there are no experts at all. The message names the file and the tensor.
        """
        directory = Path(directory)
        shards = Shards.open(directory)
        config = read_json_object(directory / "config.json") if (directory / "config.json").is_file() else {}
        num_hidden_layers = _stated(config, "num_hidden_layers")
        experts = _find_experts(shards)
        if num_hidden_layers is not None:
            num_prediction_layers = _stated(config, "num_nextn_predict_layers") or 0
            experts = _without_prediction_layers(experts, num_hidden_layers, num_prediction_layers, shards)
        if not experts:
            raise InputError(
                "the checkpoint has no experts",
                where=str(directory),
                why="none of its tensors is called like an expert of Mixtral, Qwen3-MoE or DeepSeek-V3",
            )
        layer_ids = tuple(sorted({layer for layer, _ in experts}))
        num_experts = _check_complete(
            experts, layer_ids, _stated(config, "num_local_experts", "n_routed_experts", "num_experts"), shards
        )
        return cls(
            directory=directory,
            layer_ids=layer_ids,
            num_experts=num_experts,
            num_groups=_stated(config, "n_group") or 1,
            num_hidden_layers=num_hidden_layers,
            _shards=shards,
            _experts=experts,
            _fused=tuple(
                _fuse(_alike([experts[layer, expert] for expert in range(num_experts)], layer, shards))
                for layer in layer_ids
            ),
        )

    @property
    def num_layers(self) -> int:
        """How many MoE layers there are; dense layers do not count."""
        return len(self.layer_ids)

    def tensor_specs(self, layer: int) -> tuple[TensorSpec, ...]:
        """Return what one expert of MoE layer number `layer` consists of."""
        return tuple(fused.spec for fused in self._fused[layer])

    def expert_tensors(self, layer: int, expert: int) -> list[torch.Tensor]:
        """Read one expert of MoE layer number `layer`.

        Returns:
            CPU tensors as `tensor_specs(layer)` describes them.

        Raises:
            InputError: a shard can no longer be read, or is not what it was when the checkpoint was opened.
        """
        import torch

        names = self._experts[self.layer_ids[layer], expert]
        tensors = []
        for fused in self._fused[layer]:
            pieces = [self._shards.read(names[piece]) for piece in fused.pieces]
            # Some versions of torch cannot join 8-bit floats; their bytes all can.
            content = torch.cat([piece.contiguous().reshape(-1).view(torch.uint8) for piece in pieces])
            if content.numel() != fused.spec.nbytes:
                raise InputError(
                    "a tensor of the checkpoint changed after it was opened",
                    where=self._shards.where(names[fused.pieces[0]]),
                )
            tensors.append(content.view(fused.spec.torch_dtype).reshape(fused.spec.shape))
        return tensors


def _stated(config: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of these settings that is a number above 0."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _find_experts(shards: Shards) -> _Experts:
    experts: dict[tuple[int, int], _Names] = {}
    for name in shards.names:
        match = _EXPERT.search(name)
        if match is None:
            continue
        names = experts.setdefault((int(match["layer"]), int(match["expert"])), {})
        key = _Part(_ROLE[match["projection"]], match["part"])
        if key in names:
            raise InputError(
                "an expert has one projection under two names", where=f"{shards.where(name)} and {names[key]}"
            )
        names[key] = name
    return experts


def _without_prediction_layers(
    experts: _Experts, num_hidden_layers: int, num_prediction_layers: int, shards: Shards
) -> _Experts:
    """Leave out the multi-token prediction layers, which DeepSeek-V3 numbers after the others."""
    for (layer, _), names in experts.items():
        if layer >= num_hidden_layers + num_prediction_layers:
            raise InputError(
                f"config.json states {num_hidden_layers} layers, but the checkpoint has experts in layer {layer}",
                where=shards.where(next(iter(names.values()))),
            )
    return {key: names for key, names in experts.items() if key[0] < num_hidden_layers}


def _check_complete(experts: _Experts, layer_ids: Iterable[int], stated: int | None, shards: Shards) -> int:
    """Return how many experts each layer has. Raises `InputError` if an expert or a projection is missing."""
    highest = max(expert for _, expert in experts)
    num_experts = stated or highest + 1
    if highest >= num_experts:
        raise InputError(
            f"config.json states {stated} experts, but the checkpoint has expert {highest}", where=str(shards.directory)
        )
    any_name = next(iter(next(iter(experts.values())).values()))
    for layer in layer_ids:
        for expert in range(num_experts):
            names = experts.get((layer, expert))
            if names is None:
                raise InputError(
                    f"expert {expert} of layer {layer} is missing",
                    where=shards.where(_renumbered(any_name, layer, expert)),
                    why=f"{'config.json states' if stated else 'other layers have'} {num_experts} experts",
                )
            missing = {"gate", "up", "down"} - {key.role for key in names}
            if missing:
                raise InputError(
                    f"expert {expert} of layer {layer} has no {' and no '.join(sorted(missing))} projection",
                    where=shards.where(next(iter(names.values()))),
                )
    return num_experts


def _alike(experts: list[_Names], layer: int, shards: Shards) -> dict[_Part, Header]:
    """Return the headers that all experts of a layer share. Raises `InputError` if one differs."""
    first = {key: shards.header(name) for key, name in experts[0].items()}
    for expert, names in enumerate(experts):
        for key in first.keys() | names.keys():
            if key not in names or key not in first:
                lacking, having = (expert, 0) if key in first else (0, expert)
                name = _renumbered(experts[having][key], layer, lacking)
                raise InputError(
                    f"expert {lacking} of layer {layer} lacks a tensor that expert {having} has",
                    where=shards.where(name),
                )
            header = shards.header(names[key])
            if header != first[key]:
                raise InputError(
                    f"experts of layer {layer} differ in shape or dtype",
                    where=shards.where(names[key]),
                    why=f"it is {header}, that of expert 0 is {first[key]}",
                )
    for key in first:
        if key.role == "down":
            continue
        gate, up = first.get(_Part("gate", key.part)), first.get(_Part("up", key.part))
        if gate is None or up is None or gate.dtype != up.dtype or gate.shape[1:] != up.shape[1:]:
            raise InputError(
                f"gate and up projection of layer {layer} cannot be stacked",
                where=shards.where(experts[0][key]),
                why=f"gate is {gate or 'absent'}, up is {up or 'absent'}",
            )
    return first


def _fuse(headers: Mapping[_Part, Header]) -> tuple[_Fused, ...]:
    """Return the tensors that engines hold, weights first, gate stacked on up."""
    fused = []
    for part in sorted({key.part for key in headers}, key=lambda part: (part != "weight", part)):
        suffix = "" if part == "weight" else f".{part}"
        gate, up, down = _Part("gate", part), _Part("up", part), _Part("down", part)
        if gate in headers:
            # A scale without dimensions counts as one row.
            rows = sum((headers[key].shape or (1,))[0] for key in (gate, up))
            spec = TensorSpec(f"w13{suffix}", (rows, *headers[gate].shape[1:]), headers[gate].dtype)
            fused.append(_Fused(spec, (gate, up)))
        if down in headers:
            fused.append(_Fused(TensorSpec(f"w2{suffix}", *headers[down]), (down,)))
    return tuple(fused)


def _renumbered(name: str, layer: int, expert: int) -> str:
    """Return what the same tensor of another layer and expert is called."""
    name = re.sub(r"layers\.\d+\.", f"layers.{layer}.", name)
    return re.sub(r"experts\.\d+\.", f"experts.{expert}.", name)
