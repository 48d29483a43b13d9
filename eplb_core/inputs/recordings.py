"""What engines write down of their loads: one reader for each format, all of which come to steps of counts.

| source | what it writes |
|---|---|
| SGLang's recorder, `stat` and `stat_approx` | one `.pt` with `logical_count` `[steps, layers, experts]` |
| SGLang's recorder, `per_pass` and `per_token` | a `.pt` for each rank with `records`, each of one rank and pass |
| SGLang of early 2025 | a CSV for each rank: `layer_id,expert_id,count` |
| TensorRT-LLM | `rank*.safetensors` with `{iteration}_{layer}` -> `[experts]`, and `meta_info.json` |
| vLLM | counts of physical slots: `expert_load_window` `[steps, layers, slots]`, `expert_load_pass` |
| vLLM and SGLang, in answers | `routed_experts`: those of each token, `[tokens, layers, experts per token]` |

What a rank writes counts its own tokens, so a folder is read as the sum of its files.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb_core.errors import InputError
from eplb_core.inputs.arrays import StoredArray, check_is_file, guarded, numeric, pick, read_content

_LOGICAL = ("loads", "logical_count")
_PHYSICAL = ("global_physical_count", "expert_load_window", "expert_load_pass", "physical_count")
_PLACEMENTS = (
    *("placement", "physical_to_logical_map", "last_physical_to_logical_map", "initial_global_assignments"),
    *("layer_list", "moe_layer_count", "expert_map", "log2phy", "phy2log"),
)
_ROUTED = "routed_experts"
_STEP_AND_LAYER = re.compile(r"(\d+)_(\d+)")

_KINDS = (".csv", ".safetensors", ".pt", ".json", ".jsonl", ".npy", ".npz")

Counted = NDArray[Any]


@dataclass(frozen=True, slots=True)
class ModelHints:
    """What is known of the model while its loads are read.

    Attributes:
        num_experts: logical experts of a layer.
        num_layers: all layers, dense ones included.
        num_moe_layers: layers with experts.
        experts_per_token: how many the router chooses.
    """

    num_experts: int | None = None
    num_layers: int | None = None
    num_moe_layers: int | None = None
    experts_per_token: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """Counts, step by step.

    Attributes:
        shape: of one step: layers, and logical experts or physical slots.
        num_steps: how many steps there are; 0 if they were added up before they were written.
        blocks: yields the steps from a given one on, `[some steps, layers, columns]`.
        is_physical: whether the columns are physical slots, or logical experts; None if the recording does not say.
        placement: what these held, int64 `[layers, slots]`, if the recording says so.
        notes: what the user may want to know.
    """

    shape: tuple[int, ...]
    num_steps: int
    blocks: Callable[[int], Iterator[Counted]]
    is_physical: bool | None = None
    placement: NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()


def open_recording(path: Path, model: ModelHints) -> Recording:
    """Find out what a file or a folder holds. Large arrays in it are not read yet.

    Raises:
        InputError: it is missing, cannot be read, or holds no loads.
    """
    if path.is_dir():
        return _open_folder(path, model)
    kind = path.suffix.lower()
    if kind == ".csv":
        return _csv([path])
    if kind == ".safetensors":
        return _tensorrt_llm([path])
    if kind == ".jsonl":
        return _lines(path, model)
    if kind in (".yaml", ".yml"):
        raise InputError(
            "loads are not read from YAML",
            where=str(path),
            why="what TensorRT-LLM keeps in YAML is a placement",
            remedy="give it as --placement, and the folder of its EXPERT_STATISTIC_PATH as LOADS",
        )
    return _of_content(read_content(path, "loads"), path, model)


def _open_folder(path: Path, model: ModelHints) -> Recording:
    kinds: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(path.iterdir()):
        if file.is_file() and file.name != "meta_info.json" and not file.name.startswith("cooccurrence_"):
            kinds[file.suffix.lower().replace(".pth", ".pt")].append(file)
    kinds = {kind: files for kind, files in kinds.items() if kind in _KINDS}
    if len(kinds) != 1:
        raise InputError(
            "the folder holds " + ("files of several kinds" if kinds else "no file with loads"),
            where=str(path),
            why=f"it has {', '.join(f'{len(files)} of {kind}' for kind, files in kinds.items())}" if kinds else None,
            remedy="give a folder with the files that the ranks of one engine wrote, and nothing else",
        )
    ((kind, files),) = kinds.items()
    if kind == ".csv":
        return _csv(files)
    if kind == ".safetensors":
        return _tensorrt_llm(files)
    if kind == ".jsonl":
        return _sum_of([_lines(file, model) for file in files], path)
    contents = [(file, read_content(file, "loads")) for file in files]
    if all(isinstance(content, Mapping) and "records" in content for _, content in contents):
        return _sglang_records([content for _, content in contents], path)  # type: ignore[misc]
    return _sum_of([_of_content(content, file, model) for file, content in contents], path)


def _sum_of(recordings: Sequence[Recording], path: Path) -> Recording:
    """Return the recordings of several files one after the other: their counts are of different tokens."""
    first = recordings[0]
    for recording in recordings[1:]:
        if (recording.shape, recording.is_physical) != (first.shape, first.is_physical):
            raise InputError(
                "the files of the folder do not belong together",
                where=str(path),
                why=f"some count {first.shape[0]} layers of {first.shape[1]}, "
                f"some {recording.shape[0]} layers of {recording.shape[1]}",
            )
        if not _same(first.placement, recording.placement):
            raise InputError("the files of the folder count the slots of different placements", where=str(path))

    def blocks(start: int) -> Iterator[Counted]:
        for recording in recordings:
            yield from recording.blocks(0)

    return Recording(first.shape, 0, blocks, first.is_physical, first.placement)


def _same(first: NDArray[np.int64] | None, second: NDArray[np.int64] | None) -> bool:
    return first is second if first is None or second is None else np.array_equal(first, second)


# --- one file --------------------------------------------------------------------------------------------------------


def _of_content(content: object, path: Path, model: ModelHints) -> Recording:
    if isinstance(content, Mapping):
        if "records" in content:
            return _sglang_records([content], path)
        routed = list(_routed_experts(content))
        if routed:
            return _answers(routed, path, model)
        named = set(content)
        if not named & {*_LOGICAL, *_PHYSICAL} and named & set(_PLACEMENTS):
            raise InputError(
                "this file holds a placement, not loads",
                where=str(path),
                why=f"it has {', '.join(sorted(map(str, named)))}",
                remedy="give it as --placement, and the recorded loads as LOADS",
            )
        key = next((key for key in _PHYSICAL if key in content and not named & set(_LOGICAL)), None)
        if key is not None:
            placement = next((content[name] for name in _PLACEMENTS[:3] if name in content), None)
            return _array(content[key], path, is_physical=True, placement=placement)
    elif isinstance(content, list) and content and all(isinstance(entry, Mapping) for entry in content):
        routed = [found for entry in content for found in _routed_experts(entry)]
        if routed:
            return _answers(routed, path, model)
        return _records_of_steps(content, path)
    says_logical = isinstance(content, Mapping) and "loads" not in content and "logical_count" in content
    return _array(pick(content, path, "loads", _LOGICAL), path, is_physical=False if says_logical else None)


def _array(value: object, path: Path, *, is_physical: bool | None = None, placement: object = None) -> Recording:
    array = numeric(value, path, "loads")
    check_shape(array.shape, path)
    held = None if placement is None else _placement(placement, path)
    if len(array.shape) == 3:
        return Recording(array.shape[1:], array.shape[0], array.blocks, is_physical, held)
    return Recording(array.shape, 0, lambda start: iter([array.whole()[None]]), is_physical, held)


def check_shape(shape: tuple[int, ...], path: Path) -> None:
    """Raise `InputError` unless an array of this shape can be loads."""
    text = f"[{', '.join(map(str, shape))}]"
    if len(shape) not in (2, 3):
        raise InputError(
            f"the loads have {len(shape)} {'dimension' if len(shape) == 1 else 'dimensions'} instead of 2 or 3",
            where=str(path),
            why=f"their shape is {text}, not [layers, experts] or [steps, layers, experts]",
        )
    if not math.prod(shape):
        raise InputError("the loads are empty", where=str(path), why=f"their shape is {text}")


def _placement(value: object, path: Path) -> NDArray[np.int64]:
    array = numeric(value, path, "placement").whole()
    if array.ndim != 2 or not np.array_equal(array, array.astype(np.int64)):
        raise InputError("the placement in the loads file is not a table [layers, slots]", where=str(path))
    return array.astype(np.int64)


def _lines(path: Path, model: ModelHints) -> Recording:
    """Read JSON lines: one step each, or one answer each."""
    check_is_file(path, "loads")

    def parsed() -> Iterator[object]:
        with path.open(encoding="utf-8-sig") as lines:
            for line in lines:
                if line.strip():
                    yield json.loads(line)

    contents = guarded(lambda _: list(parsed()), path, "loads")
    if not contents:
        raise InputError("the loads are empty", where=str(path), why="it has no lines")
    if all(isinstance(entry, Mapping) for entry in contents):
        return _of_content(contents, path, model)
    return _array(contents, path)


def _records_of_steps(records: Sequence[Mapping[str, Any]], path: Path) -> Recording:
    """Read a list of objects with one of the known names each."""
    key = next((key for key in (*_LOGICAL, *_PHYSICAL) if all(key in record for record in records)), None)
    if key is None:
        raise InputError(
            "the records hold no loads",
            where=str(path),
            why=f"the first has {', '.join(sorted(map(str, records[0])))}",
            remedy=f"name them one of {', '.join((*_LOGICAL, *_PHYSICAL))}",
        )
    steps = [numeric(record[key], path, "loads") for record in records]
    shapes = {step.shape for step in steps}
    if len(shapes) > 1:
        raise InputError("the records have loads of different shapes", where=str(path))
    check_shape((len(steps), *steps[0].shape), path)
    is_physical = {"logical_count": False, "loads": None}.get(key, True)
    maps = [record.get("physical_to_logical_map") for record in records] if is_physical else []
    placements = [None if held is None else _placement(held, path) for held in maps]
    if any(not _same(held, placements[0]) for held in placements):
        raise InputError(
            "the placement changes between the records", where=str(path), remedy="cut the file where it does"
        )
    placement = placements[0] if placements else None

    def blocks(start: int) -> Iterator[Counted]:
        for step in steps[start:]:
            yield step.whole()[None]

    return Recording(steps[0].shape, len(steps), blocks, is_physical, placement)


# --- SGLang ----------------------------------------------------------------------------------------------------------


def _sglang_records(dumps: Sequence[Mapping[str, Any]], path: Path) -> Recording:
    """Read what the recorder's `per_pass` and `per_token` dump: the ranks of each pass are added up."""
    passes: dict[int, list[StoredArray]] = defaultdict(list)
    seen: set[tuple[object, ...]] = set()
    for dump in dumps:
        for record in dump["records"]:
            count = record.get("global_physical_count") if isinstance(record, Mapping) else None
            if not isinstance(count, StoredArray) or len(count.shape) != 2:
                raise InputError(
                    "a record holds no global_physical_count [layers, slots]",
                    where=str(path),
                    remedy="record with SGLang's expert distribution recorder in mode stat, per_pass or per_token",
                )
            number = record.get("forward_pass_id")
            if type(number) is not int:
                raise InputError("a record has no forward_pass_id", where=str(path), why=f"it is {number!r}")
            key = (number, record.get("rank"), str(record.get("gatherer_key")))
            if key in seen:
                raise InputError(
                    f"pass {key[0]} of rank {key[1]} was recorded twice",
                    where=str(path),
                    remedy="omit one of the files",
                )
            seen.add(key)
            passes[number].append(count)
    shapes = {count.shape for counts in passes.values() for count in counts}
    if len(shapes) != 1:
        raise InputError("the records have different shapes" if shapes else "there are no records", where=str(path))
    maps = [dump.get("last_physical_to_logical_map") for dump in dumps]
    placements = [_placement(each, path) for each in maps if each is not None]
    if any(not np.array_equal(placement, placements[0]) for placement in placements[1:]):
        raise InputError("the ranks recorded different placements", where=str(path))
    ordered = sorted(passes)

    def blocks(start: int) -> Iterator[Counted]:
        for number in ordered[start:]:
            yield np.array([count.whole() for count in passes[number]]).sum(axis=0, keepdims=True)

    ranks = sorted({key[1] for key in seen if isinstance(key[1], int)})
    notes: tuple[str, ...] = ()
    if len(dumps) == 1 and len(ranks) == 1:
        notes = (f"these are the tokens of rank {ranks[0]} only; give the folder to add up all ranks",)
    return Recording(next(iter(shapes)), len(ordered), blocks, True, placements[0] if placements else None, notes)


def _csv(paths: Sequence[Path]) -> Recording:
    """Read SGLang's first format: a line for each layer and expert, a file for each rank."""
    counts: dict[tuple[int, int], float] = defaultdict(float)
    for path in paths:
        check_is_file(path, "loads")
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream)
            if not {"layer_id", "expert_id", "count"} <= set(rows.fieldnames or ()):
                raise InputError(
                    "the CSV has no columns layer_id, expert_id and count",
                    where=str(path),
                    why=f"it has {', '.join(rows.fieldnames or ()) or 'nothing'}",
                )
            for row in rows:
                try:
                    key = (int(row["layer_id"]), int(row["expert_id"]))
                    count = float(row["count"])
                except (TypeError, ValueError) as error:
                    raise InputError(
                        "a line of the CSV is not three numbers", where=f"{path}, line {rows.line_num}"
                    ) from error
                if min(key) < 0:
                    raise InputError("a layer or an expert is negative", where=f"{path}, line {rows.line_num}")
                counts[key] += count
    if not counts:
        raise InputError("the loads are empty", where=str(paths[0]), why="it has no lines")
    layers = sorted({layer for layer, _ in counts})
    loads = np.zeros((len(layers), max(expert for _, expert in counts) + 1))
    for (layer, expert), count in counts.items():
        loads[layers.index(layer), expert] = count
    return Recording(loads.shape, 0, lambda start: iter([loads[None]]), is_physical=False)


# --- TensorRT-LLM ----------------------------------------------------------------------------------------------------


def _tensorrt_llm(paths: Sequence[Path]) -> Recording:
    """Read the statistic of `EXPERT_STATISTIC_PATH`: the ranks of each iteration and layer are added up."""
    from safetensors import SafetensorError, safe_open

    files: list[Any] = []
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, path in enumerate(paths):
        check_is_file(path, "loads")
        try:
            files.append(safe_open(path, framework="np"))
        except (SafetensorError, OSError) as error:
            raise InputError("the loads file cannot be read as safetensors", where=str(path), why=str(error)) from error
        names: list[str] = files[-1].keys()
        for name in names:
            match = _STEP_AND_LAYER.fullmatch(name)
            if match is None:
                raise InputError(
                    f"the tensor {name!r} is not called like an iteration and a layer, 100_3",
                    where=str(path),
                    why="loads in safetensors are what TensorRT-LLM writes for its EXPERT_STATISTIC_PATH",
                )
            places[int(match[1]), int(match[2])].append(number)
    where = str(paths[0] if len(paths) == 1 else paths[0].parent)
    if not places:
        raise InputError("the loads are empty", where=where, why="there are no tensors")
    steps, layers = (sorted({key[axis] for key in places}) for axis in (0, 1))
    missing = next(((step, layer) for step in steps for layer in layers if (step, layer) not in places), None)
    if missing is not None:
        raise InputError(f"layer {missing[1]} of iteration {missing[0]} is missing", where=where)

    def counts(step: int, layer: int) -> Counted:
        found: list[Counted] = [files[number].get_tensor(f"{step}_{layer}") for number in places[step, layer]]
        if len({each.shape for each in found}) > 1 or found[0].ndim != 1:
            raise InputError(f"the counts of layer {layer} of iteration {step} differ in shape", where=where)
        total: Counted = np.sum(found, axis=0)
        return total

    def blocks(start: int) -> Iterator[Counted]:
        for step in steps[start:]:
            rows = [counts(step, layer) for layer in layers]
            if len({len(row) for row in rows}) > 1:
                raise InputError(f"the layers of iteration {step} have different numbers of experts", where=where)
            yield np.array(rows)[None]

    note = "these are the tokens of one rank only; give the folder to add up all ranks"
    shape = (len(layers), len(counts(steps[0], layers[0])))
    check_shape(shape, paths[0])
    return Recording(shape, len(steps), blocks, is_physical=False, notes=() if len(paths) > 1 else (note,))


# --- answers ---------------------------------------------------------------------------------------------------------


def _routed_experts(content: object) -> Iterator[object]:
    """Yield what stands under `routed_experts`, at any depth of an answer."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key == _ROUTED and value is not None:
                yield value
            else:
                yield from _routed_experts(value)
    elif isinstance(content, list) and content and isinstance(content[0], Mapping | list):
        for entry in content:
            yield from _routed_experts(entry)


def _answers(routed: Sequence[object], path: Path, model: ModelHints) -> Recording:
    """Count how often each expert was chosen; each answer is a step."""
    chosen = [_chosen_experts(value, path, model) for value in routed]
    layers = {array.shape[1] for array in chosen}
    if len(layers) > 1:
        raise InputError("the answers have routed experts of different numbers of layers", where=str(path))
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
        "the shape of the routed experts is not known",
        where=str(path),
        why=f"there are {flat.size} numbers; "
        + (
            f"the model has {model.num_layers or model.num_moe_layers} layers and {per_token} experts per token"
            if per_token
            else "SGLang's answers do not say how many layers and experts per token they are of"
        ),
        remedy=None if per_token else "give the model's --checkpoint with its config.json",
    )
