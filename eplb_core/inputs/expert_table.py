"""Locates each expert of each layer among the tensors below `experts`, and accounts for all of them.

Every such tensor is an expert's, belongs to the layer for a reason that is noted, or is an error.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eplb_core.errors import InputError
from eplb_core.inputs.experts import TensorSpec
from eplb_core.inputs.layouts import Layout, Place
from eplb_core.inputs.model_config import ModelConfig
from eplb_core.inputs.shards import Shards, StoredTensor

# torch's names for the dtypes of safetensors. Others, and those that this torch lacks, are passed as bytes.
_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "C64": "complex64",
    "BOOL": "bool",
} | {f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}


# bitsandbytes stores the settings of a quantised tensor as JSON, whose numbers may differ in length.
_TEXT = re.compile(r"\.quant_state\.")


@dataclass(frozen=True, slots=True, eq=False)
class LayerTable:
    """The locations of the experts of one layer.

    Attributes:
        specs: the tensors of one expert.
        files: int32 `[experts, tensors]`, the file of each.
        offsets: int64 `[experts, tensors]`, its first byte in that file.
        sizes: int64 `[experts, tensors]`, its bytes: those of its spec, or fewer if it is text.
    """

    specs: tuple[TensorSpec, ...]
    files: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]


class Found(NamedTuple):
    """A tensor below experts: its name, and the meaning of the name."""

    name: str
    place: Place


class _Piece(NamedTuple):
    """One tensor of one expert: the stored tensor, and which of its bytes."""

    name: str
    stored: StoredTensor


_Expert = dict[str, _Piece]  # part -> its location


@dataclass(slots=True)
class TableBuilder:
    """Makes the tables of the layers of one stack.

    Attributes:
        shards: the checkpoint.
        config: its configuration.
        notes: what was left out, and why; extended while tables are made.
    """

    shards: Shards
    config: ModelConfig
    notes: list[str] = field(default_factory=list)
    _left: dict[str, list[str]] = field(default_factory=dict)

    def build(self, layers: Mapping[int, Sequence[Found]]) -> tuple[LayerTable, ...]:
        """Return the table of every layer, in order.

        Raises:
            InputError: an expert or one of its tensors is missing, experts of one layer differ, or it is unclear which
                bytes belong to which expert.
        """
        experts = {layer: self._experts_of(layer, layers[layer]) for layer in sorted(layers)}
        if not any(experts.values()):
            name = next(found[0].name for found in layers.values())
            raise InputError(
                "the checkpoint has no experts",
                where=self.shards.where(name),
                why=f"the tensor below experts there belongs to none: it is {self.shards.tensors[name]}",
            )
        num_experts = self._check_numbers(experts)
        for reason, names in self._left.items():
            self.notes.append(f"{reason}: {len(names)} such as {names[0]}")
        return tuple(
            self._table([found[expert] for expert in range(num_experts)], layer) for layer, found in experts.items()
        )

    @property
    def left_out(self) -> list[str]:
        """The tensors that belong to no expert."""
        return [name for names in self._left.values() for name in names]

    def _experts_of(self, layer: int, found: Sequence[Found]) -> dict[int, _Expert]:
        experts: dict[int, _Expert] = {}
        whole: list[Found] = []
        for name, place in found:
            if place.is_of_router and not self._is_of_all_experts(self.shards.tensors[name].shape):
                self._left.setdefault("tensors of routers stay where they are", []).append(name)
            elif place.expert is None:
                whole.append(Found(name, place))
            else:
                expert = experts.setdefault(place.expert, {})
                if place.part in expert:
                    raise _two_names(self.shards.where(name), expert[place.part].name)
                expert[place.part] = _Piece(name, self.shards.tensors[name])
        self._leave_zero_experts(experts)
        if whole:
            self._cut(layer, whole, experts)
        return experts

    def _is_of_all_experts(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor is too large for a router, which has one row for each expert."""
        most = (self.config.num_experts or math.inf) + self.config.num_zero_experts
        return len(shape) > 2 or (len(shape) == 2 and shape[0] > most)

    def _leave_zero_experts(self, experts: dict[int, _Expert]) -> None:
        stated, zero = self.config.num_experts, self.config.num_zero_experts
        for expert in sorted(experts):
            if stated is not None and stated <= expert < stated + zero:
                names = [piece.name for piece in experts.pop(expert).values()]
                self._left.setdefault("zero experts compute nothing and are left out", []).extend(names)

    def _cut(self, layer: int, whole: Sequence[Found], experts: dict[int, _Expert]) -> None:
        """Add the rows of tensors that hold all experts of the layer."""
        shapes = {name: self.shards.tensors[name].shape for name, _ in whole}
        num_experts = len(experts) or self._count(layer, shapes)
        # Without an expert dimension, [experts * rows, ...] as in DBRX: only if no tensor of the layer has one.
        flat = not experts and not any(len(shape) > 2 for shape in shapes.values())
        joined = {shape[0] for shape in shapes.values() if flat and len(shape) == 2 and shape[0] % num_experts == 0}
        zero = self.config.num_zero_experts
        for name, place in whole:
            stored = self.shards.tensors[name]
            shape = stored.shape
            if shape and shape[0] in (num_experts, num_experts + zero):
                rows, num_rows = shape[1:], shape[0]
                if shape[0] != num_experts:
                    self._left.setdefault("rows of zero experts compute nothing and are left out", []).append(name)
            elif shape and shape[0] in joined:
                rows, num_rows = (shape[0] // num_experts, *shape[1:]), num_experts
            elif len(shape) < 2:
                self._left.setdefault("tensors without an expert dimension belong to their layers", []).append(name)
                continue
            else:
                raise InputError(
                    f"it is unclear which rows of a tensor belong to which expert of layer {layer}",
                    where=self.shards.where(name),
                    why=f"it is {stored}, but there are {num_experts} experts",
                )
            nbytes, rest = divmod(stored.nbytes, num_rows)
            if rest:
                raise InputError("a row of a tensor ends inside a byte", where=self.shards.where(name), why=str(stored))
            for expert in range(num_experts):
                row = StoredTensor(stored.file, stored.offset + expert * nbytes, nbytes, stored.dtype, rows)
                tensors = experts.setdefault(expert, {})
                if place.part in tensors:
                    raise _two_names(self.shards.where(name), tensors[place.part].name)
                tensors[place.part] = _Piece(name, row)

    def _count(self, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return how many experts the tensors of a layer hold."""
        stated, zero = self.config.num_experts, self.config.num_zero_experts
        leading = Counter(shape[0] for shape in shapes.values() if len(shape) > 2)
        if stated is not None:
            flat = not leading and all(shape[0] % stated == 0 for shape in shapes.values() if len(shape) == 2)
            if flat or stated in leading or stated + zero in leading:
                return stated
        name = next((name for name, shape in shapes.items() if len(shape) > 2), next(iter(shapes)))
        if len(leading) != 1:
            raise InputError(
                f"it is unclear how many experts layer {layer} has",
                where=self.shards.where(name),
                why=f"it is {self.shards.tensors[name]}"
                + ("" if stated is None else f", config.json states {stated} experts")
                + (f", and others have {', '.join(map(str, sorted(leading)))} rows" if leading else ""),
                remedy=None if leading else "state num_experts in config.json",
            )
        return next(iter(leading))

    def _check_numbers(self, experts: Mapping[int, Mapping[int, _Expert]]) -> int:
        """Return how many experts each layer has. Raises `InputError` if one has too few or too many."""
        stated = self.config.num_experts
        counts = {layer: max(found, default=-1) + 1 for layer, found in experts.items()}
        most = max(counts, key=lambda layer: counts[layer])
        num_experts = counts[most] if stated is None else stated
        if counts[most] > num_experts:
            all_of_it = [experts[most][expert] for expert in sorted(experts[most])]
            if all(expert.keys() == all_of_it[0].keys() for expert in all_of_it):
                self._check_same_shapes(all_of_it, most)  # the clearer error for two kinds of experts
            name = next(iter(experts[most][counts[most] - 1].values())).name
            raise InputError(
                f"config.json states {stated} experts, but the checkpoint has expert {counts[most] - 1}",
                where=self.shards.where(name),
            )
        for layer, found in experts.items():
            missing = next((expert for expert in range(num_experts) if expert not in found), None)
            if missing is None:
                continue
            if stated is None and len(found) == counts[layer]:
                raise InputError(
                    f"layer {layer} has {counts[layer]} experts, layer {most} has {counts[most]}",
                    where=str(self.shards.directory),
                    why="layers with different numbers of experts cannot be balanced together",
                )
            example = next(iter((found or experts[most]).values()))
            raise InputError(
                f"expert {missing} of layer {layer} is missing",
                where=self.shards.where(_renumbered(next(iter(example.values())).name, missing)),
                why=f"{'other layers have' if stated is None else 'config.json states'} {num_experts} experts, "
                f"the checkpoint has {len(found)} in this layer",
            )
        return num_experts

    def _table(self, experts: Sequence[_Expert], layer: int) -> LayerTable:
        self._check_same_tensors(experts, layer)
        self._check_same_shapes(experts, layer)
        parts = _in_order(experts[0])
        longest = [max((expert[part].stored for expert in experts), key=lambda stored: stored.nbytes) for part in parts]
        return LayerTable(
            specs=tuple(_spec(part, stored) for part, stored in zip(parts, longest, strict=True)),
            files=np.array([[expert[part].stored.file for part in parts] for expert in experts], np.int32),
            offsets=np.array([[expert[part].stored.offset for part in parts] for expert in experts], np.int64),
            sizes=np.array([[expert[part].stored.nbytes for part in parts] for expert in experts], np.int64),
        )

    def _check_same_tensors(self, experts: Sequence[_Expert], layer: int) -> None:
        first = experts[0]
        for number, expert in enumerate(experts):
            for part in sorted(first.keys() ^ expert.keys()):
                lacking, having = (number, 0) if part in first else (0, number)
                raise InputError(
                    f"expert {lacking} of layer {layer} lacks a tensor that expert {having} has",
                    where=self.shards.where(_renumbered(experts[having][part].name, lacking)),
                    why="a slot can hold any expert of its layer, so all experts must have the same tensors",
                )

    def _check_same_shapes(self, experts: Sequence[_Expert], layer: int) -> None:
        first = experts[0]
        for expert in experts:
            for part, piece in expert.items():
                ours, theirs = first[part].stored, piece.stored
                if (ours.dtype, ours.shape, ours.nbytes) == (theirs.dtype, theirs.shape, theirs.nbytes):
                    continue
                if _TEXT.search(part) and ours.dtype == theirs.dtype == "U8" and len(theirs.shape) == 1:
                    continue
                alike = sum(each[part].stored.shape == ours.shape for each in experts)
                raise InputError(
                    f"experts of layer {layer} differ in shape or dtype",
                    where=self.shards.where(piece.name),
                    why=f"it is {theirs}, that of expert 0 is {ours}, like that of {alike} of {len(experts)} experts; "
                    "a slot can hold any expert of its layer, so a layer of unequal experts cannot be moved",
                )


def _two_names(first: str, second: str) -> InputError:
    return InputError("an expert has one tensor under two names", where=f"{first} and {second}")


def _in_order(parts: Iterable[str]) -> list[str]:
    """Return weights first, so that the large tensors of a layer come before their scales."""
    return sorted(parts, key=lambda part: (part.count(".") > 1 or "scale" in part or "bias" in part, part))


def _spec(part: str, stored: StoredTensor) -> TensorSpec:
    import torch

    name = part.removesuffix(".weight")
    dtype = _TORCH.get(stored.dtype, "")
    if hasattr(torch, dtype):
        return TensorSpec(name, stored.shape, dtype)
    return TensorSpec(name, (stored.nbytes,), "uint8")


def _renumbered(name: str, expert: int) -> str:
    """Return the name of the same tensor of another expert."""
    return re.sub(r"(experts\.(?:[a-z]\w*\.)?(?:expert_)?)\d+\.", rf"\g<1>{expert}.", name)


def layouts_of(layers: Mapping[int, Sequence[Found]]) -> tuple[Layout, ...]:
    """Return the layouts of these tensors, in order of first use."""
    layouts = (place.layout for found in layers.values() for _, place in found if not place.is_of_router)
    return tuple({layout.name: layout for layout in layouts}.values())
