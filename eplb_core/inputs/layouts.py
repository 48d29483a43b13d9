"""How checkpoints name the tensors of experts: one small table, and the parser of a name.

Only positions matter: which layer, which expert, which of its tensors. Names of projections, prefixes and quantisation
are kept but not interpreted, so that an unknown family is found if its experts follow one of these layouts.

The layouts are those of published checkpoints and of what transformers saves
(https://github.com/huggingface/transformers, `conversion_mapping.py`).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to name the tensors of experts.

    Attributes:
        name: in messages and in the documentation.
        example: a name as in a checkpoint.
        pattern: of the text after the layer's number, with the groups `block` and `part`; `expert` if each expert has
            separate tensors; `projection` if that comes before the expert's number.
        needs_dimensions: whether only weights of three dimensions are evidence of experts, because dense layers have
            the same names.
    """

    name: str
    example: str
    pattern: re.Pattern[str]
    needs_dimensions: bool = False

    def is_evident(self, part: str, shape: tuple[int, ...]) -> bool:
        """Whether such a tensor proves that there are experts.

        A convolution's kernel of width 1 does not, nor do the codes of a quantised matrix, which have three dimensions.
        """
        if not self.needs_dimensions:
            return True
        return len(shape) == 3 and min(shape) > 1 and part.rpartition(".")[2] in (part, "weight")


# `experts`, `text_experts`, but not `shared_experts`: every rank holds all of those.
_EXPERTS = r"(?P<block>(?:[^.]+\.)*?(?:(?!\w*shared)\w+_)?experts)"

LAYOUTS = (
    Layout(
        "expert by expert",
        "model.layers.0.mlp.experts.0.gate_proj.weight",
        re.compile(_EXPERTS + r"\.(?:expert_)?(?P<expert>\d+)\.(?P<part>.+)"),
    ),
    Layout(
        "projection before the number",
        "model.layers.0.mlp.experts.gate_proj.0.weight",
        re.compile(_EXPERTS + r"\.(?P<projection>[^.]+)\.(?P<expert>\d+)\.(?P<part>.+)"),
    ),
    Layout("fused", "model.layers.0.mlp.experts.gate_up_proj", re.compile(_EXPERTS + r"\.(?P<part>.+)")),
    Layout(
        "fused, without a module of experts",
        "model.layers.0.block_sparse_moe.input_linear.weight",
        re.compile(
            r"(?P<block>(?:[^.]+\.)*?(?:moe|block_sparse_moe|mlp|feed_forward|switch_mlp))"
            r"\.(?P<part>(?:(?:gate|up|down|gate_up)_proj|(?:input|output)_linear)\b.*)"
        ),
        needs_dimensions=True,
    ),
)
"""The first layout that matches a name applies."""

_NUMBERED = re.compile(r"(?P<prefix>(?:[^.]*[^.\d][^.]*\.)*)(?P<layer>\d+)\.(?P<rest>.+)")
_PREDICTION = re.compile(r"mtp\w*|nextn\w*|\w*_mtp|draft\w*|eagle\w*")
_ROUTER = re.compile(r"(?:^|\.)(?:router|gate|\w*correction_bias|expert_bias|router_bias)(?:\.|$)")


class Stack(NamedTuple):
    """A sequence of layers with the same names: a decoder, an encoder, one of two kinds of experts in a layer.

    Attributes:
        prefix: the text before the layer's number, such as `thinker.model.layers`.
        block: the text between the number and the experts, such as `mlp.experts`.
        predicts: whether it is known to be a multi-token prediction module.
    """

    prefix: str
    block: str
    predicts: bool = False

    @property
    def words(self) -> frozenset[str]:
        """The words that name it: all of its path, and `mtp` if it predicts tokens ahead."""
        return frozenset(f"{self.prefix}.{self.block}".split(".")) | ({"mtp"} if self.predicts else frozenset())

    def __str__(self) -> str:
        return ".".join(part for part in (self.prefix, "N", self.block) if part)


class Place(NamedTuple):
    """The meaning of a tensor's name.

    Attributes:
        layout: which of `LAYOUTS` it has.
        stack: which sequence of layers it belongs to.
        layer: its number in that sequence, as the checkpoint counts.
        expert: the number of its expert; None if the tensor holds all of them.
        part: which tensor of an expert it is, such as `down_proj.weight_scale_inv`.
    """

    layout: Layout
    stack: Stack
    layer: int
    expert: int | None
    part: str

    @property
    def is_of_router(self) -> bool:
        """Whether it chooses experts instead of being one; routers count logical experts, so they never move."""
        return self.expert is None and _ROUTER.search(self.part) is not None


@functools.cache
def _stack(prefix: str, block: str) -> Stack:
    return Stack(prefix, block, any(_PREDICTION.fullmatch(word) for word in prefix.split(".")))


def locate(name: str) -> Place | None:
    """Parse `name`; None if it is not below experts of a numbered layer."""
    numbered = _NUMBERED.match(name)
    if numbered is None:
        return None
    prefix, rest = numbered["prefix"].rstrip("."), numbered["rest"]
    for layout in LAYOUTS:
        found = layout.pattern.fullmatch(rest)
        if found is None:
            continue
        groups = found.groupdict()
        expert = int(groups["expert"]) if "expert" in groups else None
        part = f"{groups['projection']}.{groups['part']}" if "projection" in groups else groups["part"]
        return Place(layout, _stack(prefix, groups["block"]), int(numbered["layer"]), expert, part)
    return None


def layer_of(name: str) -> tuple[str, int, str] | None:
    """Return the prefix, the number of the layer and the rest of any tensor's name, or None if it has no number."""
    numbered = _NUMBERED.match(name)
    return None if numbered is None else (numbered["prefix"].rstrip("."), int(numbered["layer"]), numbered["rest"])


def is_below_experts(name: str) -> bool:
    """Whether a name has a component `experts`, so that it must be accounted for."""
    return re.search(r"(?:^|\.)(?:(?!\w*shared)\w+_)?experts\.", name) is not None
