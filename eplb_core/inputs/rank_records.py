"""Reads records that each rank writes separately, and sums them: those of SGLang and of TensorRT-LLM."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eplb_core.errors import InputError
from eplb_core.inputs.arrays import StoredArray, check_is_file
from eplb_core.inputs.recording import Counted, Recording, check_shape, placement_table

_STEP_AND_LAYER = re.compile(r"(\d+)_(\d+)")


def sglang_records(dumps: Sequence[Mapping[str, Any]], path: Path) -> Recording:
    """Read dumps of the recorder's modes `per_pass` and `per_token`, and sum the ranks of each pass."""
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
    placements = [placement_table(each, path) for each in maps if each is not None]
    if any(not np.array_equal(placement, placements[0]) for placement in placements[1:]):
        raise InputError("the ranks recorded different placements", where=str(path))
    ordered = sorted(passes)

    def blocks(start: int) -> Iterator[Counted]:
        for number in ordered[start:]:
            yield np.array([count.whole() for count in passes[number]]).sum(axis=0, keepdims=True)

    ranks = sorted({key[1] for key in seen if isinstance(key[1], int)})
    notes: tuple[str, ...] = ()
    if len(dumps) == 1 and len(ranks) == 1:
        notes = (f"these are the tokens of rank {ranks[0]} only; give the directory to sum all ranks",)
    return Recording(next(iter(shapes)), len(ordered), blocks, True, placements[0] if placements else None, notes)


def layer_expert_csv(paths: Sequence[Path]) -> Recording:
    """Read SGLang's first format: a line per layer and expert, a file per rank."""
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
    shape = (len(layers), max(expert for _, expert in counts) + 1)
    check_shape(shape, paths[0])
    loads = np.zeros(shape)
    for (layer, expert), count in counts.items():
        loads[layers.index(layer), expert] = count
    return Recording(loads.shape, 0, lambda start: iter([loads[None]]), is_physical=False)


def tensorrt_llm_statistic(paths: Sequence[Path]) -> Recording:
    """Read the statistics of `EXPERT_STATISTIC_PATH`, and sum the ranks of each iteration and layer."""
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
                    f"the name of tensor {name!r} is not an iteration and a layer, such as 100_3",
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

    note = "these are the tokens of one rank only; give the directory to sum all ranks"
    shape = (len(layers), len(counts(steps[0], layers[0])))
    check_shape(shape, paths[0])
    return Recording(shape, len(steps), blocks, is_physical=False, notes=() if len(paths) > 1 else (note,))
