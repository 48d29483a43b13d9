"""Reads and writes the placement formats of engines.

| format | what it is |
|---|---|
| `eplb` | JSON or NPZ with `placement` `[layers, slots]` and `num_ranks`; empty slots are -1 |
| `sglang` | JSON with `physical_to_logical_map`, a row for every layer of the model, for `--init-expert-location` |
| `tensorrt-llm` | YAML with `num_slots`, and `initial_global_assignments` by the layer's number in the model |
| `vllm` | JSON, one list for each layer with experts, or one for all (proposed in vllm-project/vllm#49572) |
| `vllm-ascend` | JSON with `layer_list`, in it `device_list`, in it `device_expert`, for `expert_map_path` |

Engines have no empty slots, and each of their layers holds every expert.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from eplb_core.errors import InputError
from eplb_core.inputs.arrays import StoredArray, guarded, numeric, pick, read_content
from eplb_core.inputs.edge import MOST_NUMBERS, reading

Format = Literal["eplb", "sglang", "tensorrt-llm", "vllm", "vllm-ascend"]
FORMATS: tuple[str, ...] = get_args(Format)

_KEYS = ("placement", "physical_to_logical_map")
_YAML = (".yaml", ".yml")


@dataclass(frozen=True, slots=True, eq=False)
class PlacementFile:
    """A placement with the metadata of its file.

    Attributes:
        placement: int64 `[layers, slots]`, physical slot -> logical expert, -1 = empty.
        format: which format the file has.
        num_ranks: the ranks that share the slots, if the file says so.
        layer_ids: the numbers of the layers in the model, if the file says so.
    """

    placement: NDArray[np.int64]
    format: Format
    num_ranks: int | None = None
    layer_ids: tuple[int, ...] | None = None


def read_placement_file(path: str | Path, num_layers: int | None = None) -> PlacementFile:
    """Read a placement in any of the formats; the content of the file determines which.

    Args:
        path: the file.
        num_layers: how many layers have experts, if known: for a file with one list for all of them.

    Raises:
        InputError: the file is missing or cannot be read, or holds no table of whole numbers.
    """
    path = Path(path)
    with reading(path, "placement"):
        return _read_placement_file(path, num_layers)


def _read_placement_file(path: Path, num_layers: int | None) -> PlacementFile:
    content = _read_yaml(path) if path.suffix.lower() in _YAML else read_content(path, "placement")
    if isinstance(content, Mapping) and "layer_list" in content:
        return _from_vllm_ascend(content, path)
    if isinstance(content, Mapping) and "initial_global_assignments" in content:
        return _from_tensorrt_llm(content, path)
    if isinstance(content, Mapping):
        ranks = content.get("num_ranks")
        if isinstance(ranks, StoredArray) and not ranks.shape:
            ranks = int(ranks.whole())
        kind: Format = "sglang" if "physical_to_logical_map" in content and "placement" not in content else "eplb"
        rows = pick({key: value for key, value in content.items() if key != "num_ranks"}, path, "placement", _KEYS)
        return PlacementFile(_table(rows, path), kind, ranks if type(ranks) is int else None)
    if num_layers is not None and isinstance(content, list) and content and all(type(slot) is int for slot in content):
        content = [content] * num_layers
    return PlacementFile(_table(content, path), "vllm")


def _table(value: object, path: Path) -> NDArray[np.int64]:
    stored = numeric(value, path, "placement")
    if math.prod(stored.shape) > MOST_NUMBERS:
        raise InputError(
            f"the placement has more than {MOST_NUMBERS} numbers",
            where=str(path),
            why=f"its shape is {list(stored.shape)}",
        )
    array = stored.whole()
    if array.ndim != 2 or array.size == 0:
        raise InputError(
            "the placement is not a table [layers, slots]", where=str(path), why=f"its shape is {list(array.shape)}"
        )
    whole = array.astype(np.int64) if np.all(np.isfinite(array)) else None
    if whole is None or not np.array_equal(whole, array):
        raise InputError("the placement holds numbers that are not whole", where=str(path))
    return whole


# --- vllm-ascend -----------------------------------------------------------------------------------------------------


def _from_vllm_ascend(content: Mapping[str, Any], path: Path) -> PlacementFile:
    try:
        layers = content["layer_list"]
        rows = [[device["device_expert"] for device in layer["device_list"]] for layer in layers]
        stated = int(content["moe_layer_count"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "the placement is incomplete",
            where=str(path),
            why="vllm-ascend's format has moe_layer_count, and layer_list with device_list with device_expert",
        ) from error
    if stated != len(rows):
        raise InputError(f"moe_layer_count is {stated}, but there are {len(rows)} layers", where=str(path))
    ranks = {len(row) for row in rows}
    if len(ranks) != 1 or len({len(device) for row in rows for device in row}) != 1:
        raise InputError("the devices hold different numbers of experts", where=str(path))
    joined = [[expert for device in row for expert in device] for row in rows]
    return PlacementFile(_table(joined, path), "vllm-ascend", ranks.pop())


def _to_vllm_ascend(file: PlacementFile, num_ranks: int) -> str:
    layers = [
        {
            "layer_id": layer,
            "device_count": num_ranks,
            "device_list": [
                {"device_id": rank, "device_expert": experts}
                for rank, experts in enumerate(row.reshape(num_ranks, -1).tolist())
            ],
        }
        for layer, row in enumerate(file.placement)
    ]
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layers}, indent=1) + "\n"


# --- TensorRT-LLM ----------------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> object:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise InputError(
            "YAML cannot be read: PyYAML is not installed", where=str(path), remedy='pip install "eplb[yaml]"'
        ) from error
    if not path.is_file():
        raise InputError("the placement file does not exist", where=str(path))

    def load(path: Path) -> object:
        try:
            return yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error

    return guarded(load, path, "placement")


def _from_tensorrt_llm(content: Mapping[str, Any], path: Path) -> PlacementFile:
    assignments = content["initial_global_assignments"]
    if not isinstance(assignments, Mapping) or not assignments:
        raise InputError("initial_global_assignments is not layer -> experts", where=str(path))
    try:
        by_layer = sorted((int(layer), experts) for layer, experts in assignments.items())
    except (TypeError, ValueError) as error:
        raise InputError("a layer in initial_global_assignments is not a number", where=str(path)) from error
    placement = _table([experts for _, experts in by_layer], path)
    stated = content.get("num_slots")
    if stated is not None and stated != placement.shape[1]:
        raise InputError(f"num_slots is {stated}, but the layers have {placement.shape[1]}", where=str(path))
    return PlacementFile(placement, "tensorrt-llm", layer_ids=tuple(layer for layer, _ in by_layer))


def _to_tensorrt_llm(file: PlacementFile, num_ranks: int) -> str:
    ids = file.layer_ids if file.layer_ids is not None else range(len(file.placement))
    rows = "".join(f"  {layer}: {row}\n" for layer, row in zip(ids, file.placement.tolist(), strict=True))
    slots = file.placement.shape[1]
    return f"initial_global_assignments:\n{rows}num_slots: {slots}\nlayer_updates_per_iter: 0\n"


# --- the others ------------------------------------------------------------------------------------------------------


def _rows(placement: NDArray[np.int64]) -> str:
    return "[\n    " + ",\n    ".join(json.dumps(row) for row in placement.tolist()) + "\n  ]"


def _to_eplb(file: PlacementFile, num_ranks: int) -> str:
    return f'{{\n  "num_ranks": {num_ranks},\n  "placement": {_rows(file.placement)}\n}}\n'


def _to_sglang(file: PlacementFile, num_ranks: int) -> str:
    return f'{{\n  "physical_to_logical_map": {_rows(file.placement)}\n}}\n'


def _to_vllm(file: PlacementFile, num_ranks: int) -> str:
    return f"{_rows(file.placement)}\n"


_WRITERS: Mapping[str, Callable[[PlacementFile, int], str]] = MappingProxyType(
    {
        "eplb": _to_eplb,
        "sglang": _to_sglang,
        "tensorrt-llm": _to_tensorrt_llm,
        "vllm": _to_vllm,
        "vllm-ascend": _to_vllm_ascend,
    }
)
_EXTENSIONS: Mapping[str, tuple[str, ...]] = MappingProxyType({"eplb": (".json", ".npz"), "tensorrt-llm": _YAML})


def check_placement_target(path: Path, target: str = "eplb") -> None:
    """Raise `InputError` if `write_placement_file` cannot write files of this kind."""
    extensions = _EXTENSIONS.get(target, (".json",))
    if path.suffix.lower() not in extensions:
        raise InputError(
            f"a placement cannot be written as {path.suffix or 'a file without extension'}"
            + ("" if target == "eplb" else f" for {target}"),
            where=str(path),
            remedy=f"name it {' or '.join(extensions)}",
        )


def write_placement_file(path: str | Path, file: PlacementFile, num_ranks: int, target: str = "eplb") -> None:
    """Write a placement in a format, so that `read_placement_file` reads it back.

    Args:
        path: the file to write.
        file: the placement; `layer_ids` name the layers if the format does.
        num_ranks: the ranks that share the slots.
        target: one of `FORMATS`.

    Raises:
        InputError: the file cannot be written, has a wrong extension, or the format cannot hold this placement.
    """
    path = Path(path)
    check_placement_target(path, target)
    if target != "eplb":
        _check_for_engine(file.placement, target)
    try:
        if path.suffix.lower() == ".npz":
            np.savez_compressed(path, placement=file.placement, num_ranks=np.int64(num_ranks))
            return
        path.write_text(_WRITERS[target](file, num_ranks), encoding="utf-8")
    except OSError as error:
        raise InputError("the placement cannot be written", where=str(path), why=error.strerror) from error


def _check_for_engine(placement: NDArray[np.int64], target: str) -> None:
    empty = np.argwhere(placement < 0)
    if len(empty):
        layer, slot = empty[0].tolist()
        raise InputError(
            f"{target} has no empty slots", why=f"slot {slot} of layer {layer} is empty, and {len(empty) - 1} more are"
        )


def with_dense_rows(placement: NDArray[np.int64], layer_ids: Sequence[int], num_layers: int) -> NDArray[np.int64]:
    """Return a row for every layer of the model, as in SGLang, which never reads the rows of dense layers.

    Args:
        placement: int64 `[MoE layers, slots]`.
        layer_ids: the layer's number in the model, for each row.
        num_layers: all layers, including dense ones.
    """
    num_experts = int(placement.max()) + 1
    rows = np.tile(np.arange(placement.shape[1]) % num_experts, (num_layers, 1))
    rows[list(layer_ids)] = placement
    return rows
