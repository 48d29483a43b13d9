"""Reads the load recordings of engines: one reader per format; each returns steps of counts.

| source | what it writes |
|---|---|
| SGLang's recorder, `stat` and `stat_approx` | one `.pt` with `logical_count` `[steps, layers, experts]` |
| SGLang's recorder, `per_pass` and `per_token` | a `.pt` for each rank with `records`, each of one rank and pass |
| SGLang of early 2025 | a CSV for each rank: `layer_id,expert_id,count` |
| TensorRT-LLM | `rank*.safetensors` with `{iteration}_{layer}` -> `[experts]`, and `meta_info.json` |
| vLLM | counts of physical slots: `expert_load_window` `[steps, layers, slots]`, `expert_load_pass` |
| vLLM and SGLang, in answers | `routed_experts`: those of each token, `[tokens, layers, experts per token]` |

Each rank's file counts that rank's tokens, so a directory is read as the sum of its files.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eplb_core.errors import InputError
from eplb_core.inputs.arrays import check_is_file, guarded, numeric, pick, read_content
from eplb_core.inputs.rank_records import layer_expert_csv, sglang_records, tensorrt_llm_statistic
from eplb_core.inputs.recording import Counted, ModelHints, Recording, check_shape, placement_table, same_placement
from eplb_core.inputs.routed_experts import answers, routed_experts

_LOGICAL = ("loads", "logical_count")
_PHYSICAL = ("global_physical_count", "expert_load_window", "expert_load_pass", "physical_count")
_PLACEMENTS = (
    *("placement", "physical_to_logical_map", "last_physical_to_logical_map", "initial_global_assignments"),
    *("layer_list", "moe_layer_count", "expert_map", "log2phy", "phy2log"),
)

_KINDS = (".csv", ".safetensors", ".pt", ".json", ".jsonl", ".npy", ".npz")


def open_recording(path: Path, model: ModelHints) -> Recording:
    """Find out what a file or a directory holds. Large arrays in it are not read yet.

    Raises:
        InputError: it is missing, cannot be read, or holds no loads.
    """
    if path.is_dir():
        return _open_folder(path, model)
    kind = path.suffix.lower()
    if kind == ".csv":
        return layer_expert_csv([path])
    if kind == ".safetensors":
        return tensorrt_llm_statistic([path])
    if kind == ".jsonl":
        return _lines(path, model)
    if kind in (".yaml", ".yml"):
        raise InputError(
            "loads are not read from YAML",
            where=str(path),
            why="a YAML file of TensorRT-LLM is a placement",
            remedy="give it as --placement, and the directory of its EXPERT_STATISTIC_PATH as LOADS",
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
            "the directory holds " + ("files of several kinds" if kinds else "no file with loads"),
            where=str(path),
            why=f"it has {', '.join(f'{len(files)} of {kind}' for kind, files in kinds.items())}" if kinds else None,
            remedy="give a directory with the files that the ranks of one engine wrote, and nothing else",
        )
    ((kind, files),) = kinds.items()
    if kind == ".csv":
        return layer_expert_csv(files)
    if kind == ".safetensors":
        return tensorrt_llm_statistic(files)
    if kind == ".jsonl":
        return _sum_of([_lines(file, model) for file in files], path)
    contents = [(file, read_content(file, "loads")) for file in files]
    if all(isinstance(content, Mapping) and "records" in content for _, content in contents):
        return sglang_records([content for _, content in contents], path)  # type: ignore[misc]
    return _sum_of([_of_content(content, file, model) for file, content in contents], path)


def _sum_of(recordings: Sequence[Recording], path: Path) -> Recording:
    """Return the recordings of several files in sequence: they count different tokens."""
    first = recordings[0]
    for recording in recordings[1:]:
        if (recording.shape, recording.is_physical) != (first.shape, first.is_physical):
            raise InputError(
                "the files of the directory do not belong together",
                where=str(path),
                why=f"some count {first.shape[0]} layers of {first.shape[1]}, "
                f"some {recording.shape[0]} layers of {recording.shape[1]}",
            )
        if not same_placement(first.placement, recording.placement):
            raise InputError("the files of the directory count the slots of different placements", where=str(path))

    def blocks(start: int) -> Iterator[Counted]:
        for recording in recordings:
            yield from recording.blocks(0)

    return Recording(first.shape, 0, blocks, first.is_physical, first.placement)


# --- one file --------------------------------------------------------------------------------------------------------


def _of_content(content: object, path: Path, model: ModelHints) -> Recording:
    if isinstance(content, Mapping):
        if "records" in content:
            return sglang_records([content], path)
        routed = list(routed_experts(content))
        if routed:
            return answers(routed, path, model)
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
        routed = [found for entry in content for found in routed_experts(entry)]
        if routed:
            return answers(routed, path, model)
        return _records_of_steps(content, path)
    says_logical = isinstance(content, Mapping) and "loads" not in content and "logical_count" in content
    return _array(pick(content, path, "loads", _LOGICAL), path, is_physical=False if says_logical else None)


def _array(value: object, path: Path, *, is_physical: bool | None = None, placement: object = None) -> Recording:
    array = numeric(value, path, "loads")
    check_shape(array.shape, path)
    held = None if placement is None else placement_table(placement, path)
    if len(array.shape) == 3:
        return Recording(array.shape[1:], array.shape[0], array.blocks, is_physical, held)
    return Recording(array.shape, 0, lambda start: iter([array.whole()[None]]), is_physical, held)


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
    placements = [None if held is None else placement_table(held, path) for held in maps]
    if any(not same_placement(held, placements[0]) for held in placements):
        raise InputError("the placement changes between the records", where=str(path), remedy="split the file there")
    placement = placements[0] if placements else None

    def blocks(start: int) -> Iterator[Counted]:
        for step in steps[start:]:
            yield step.whole()[None]

    return Recording(steps[0].shape, len(steps), blocks, is_physical, placement)
