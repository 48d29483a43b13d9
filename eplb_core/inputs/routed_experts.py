"""Counts the experts that answers of vLLM and SGLang list for each token."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eplb_core.errors import InputError
from eplb_core.inputs.arrays import numeric
from eplb_core.inputs.recording import Counted, ModelHints, Recording, check_shape

_ROUTED = "routed_experts"


def routed_experts(content: object) -> Iterator[object]:
    """Yield the values of `routed_experts`, at any depth of an answer."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key == _ROUTED and value is not None:
                yield value
            else:
                yield from routed_experts(value)
    elif isinstance(content, list) and content and isinstance(content[0], Mapping | list):
        for entry in content:
            yield from routed_experts(entry)


def answers(routed: Sequence[object], path: Path, model: ModelHints) -> Recording:
    """Count how often each expert was chosen; each answer is a step."""
    chosen = [_chosen_experts(value, path, model) for value in routed]
    layers = {array.shape[1] for array in chosen}
    if len(layers) > 1:
        raise InputError("the answers have routed experts for different numbers of layers", where=str(path))
    highest = max((int(array.max(initial=-1)) for array in chosen), default=-1)
    num_experts = max(model.num_experts or 0, highest + 1)
    shape = (layers.pop(), num_experts)
    check_shape(shape, path)

    def blocks(start: int) -> Iterator[Counted]:
        for array in chosen[start:]:
            # -1 stands for a token that was not routed.
            yield np.array([np.bincount(layer[layer >= 0], minlength=num_experts) for layer in array.swapaxes(0, 1)])[
                None
            ]

    return Recording(shape, len(chosen), blocks, is_physical=False)


def _chosen_experts(value: object, path: Path, model: ModelHints) -> NDArray[np.int64]:
    """Return the experts of each token of one answer, int64 `[tokens, layers, experts per token]`."""
    if not isinstance(value, str):
        array = numeric(value, path, "routed experts").whole()
        if array.ndim != 3:
            raise InputError(
                "the routed experts are not [tokens, layers, experts per token]",
                where=str(path),
                why=f"their shape is {list(array.shape)}",
            )
        return array.astype(np.int64)
    try:
        flat = np.frombuffer(base64.b64decode(value, validate=True), np.dtype("<i4")).astype(np.int64)
    except (binascii.Error, ValueError) as error:
        raise InputError("the routed experts are not base64 of int32 numbers", where=str(path)) from error
    per_token = model.experts_per_token
    for num_layers in (model.num_layers, model.num_moe_layers):
        if per_token and num_layers and flat.size % (per_token * num_layers) == 0:
            return flat.reshape(-1, num_layers, per_token)
    raise InputError(
        "the shape of the routed experts is unknown",
        where=str(path),
        why=f"there are {flat.size} numbers; "
        + (
            f"the model has {model.num_layers or model.num_moe_layers} layers and {per_token} experts per token"
            if per_token
            else "SGLang's answers do not state the number of layers and of experts per token"
        ),
        remedy=None if per_token else "give the model's --checkpoint with its config.json",
    )
