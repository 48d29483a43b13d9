"""Reads recorded expert loads, sums their steps, and refuses what cannot be loads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eplb_core.errors import InputError
from eplb_core.inputs.edge import reading
from eplb_core.inputs.load_window import LoadWindow
from eplb_core.inputs.recording import ModelHints, Recording
from eplb_core.inputs.recordings import open_recording

Counts = Literal["logical", "physical"]

MOST_WINDOW_BYTES = 8 << 30
"""The most that `read_load_window` returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to read loads.

    Attributes:
        counts: what an array counts, if the file does not say: logical experts, or physical slots.
        placement: int64 `[layers, slots]`, what the slots held during the recording, if the file does not say.
        window_steps: sum only this many of the last steps; None for all.
        decay: the weight of a step relative to the next, above 0 and up to 1.
        model: what is known about the model.
    """

    counts: Counts = "logical"
    placement: NDArray[np.int64] | None = None
    window_steps: int | None = None
    decay: float = 1.0
    model: ModelHints = field(default_factory=ModelHints)


@dataclass(frozen=True, slots=True, eq=False)
class RecordedLoads:
    """The result of reading a recording.

    Attributes:
        loads: float64 `[layers, experts]`, the sum of the steps.
        window: float64 `[steps, layers, experts]`, the same loads step by step; of a long recording consecutive steps
            are joined, so that there are at most `load_window.MOST_STEPS` of equal weight.
        num_steps: how many steps were summed; 0 if the file does not separate steps.
        notes: what the user may want to know.
    """

    loads: NDArray[np.float64]
    window: NDArray[np.float64]
    num_steps: int = 0
    notes: tuple[str, ...] = field(default=())


def read_loads(path: str | Path, options: LoadOptions | None = None) -> NDArray[np.float64]:
    """Return the load of each logical expert of each layer; see `read_recording`."""
    return read_recording(path, options).loads


def read_recording(path: str | Path, options: LoadOptions | None = None) -> RecordedLoads:
    """Return the load of each logical expert of each layer.

    Steps are read block by block, so that a long recording needs no more memory than a short one.

    Args:
        path: a file or a directory, of one of the kinds in `recordings`.
        options: how to read it.

    Returns:
        Tokens or any other unit; finite, not negative.

    Raises:
        InputError: it is missing or cannot be read, or the loads have a wrong shape, are empty, negative, infinite or
            not numbers, count physical slots although logical experts are expected, or are a placement.
    """
    path, options = Path(path), options or LoadOptions()
    with reading(path, "loads"):
        return _read_recording(path, options)


def _read_recording(path: Path, options: LoadOptions) -> RecordedLoads:
    recording = open_recording(path, options.model)
    placement = _placement_of(recording, options, path)
    first = _first_step(recording, options, path)
    window = LoadWindow(recording.shape, max(1, recording.num_steps - first), options.decay)
    notes = list(recording.notes)
    for loads in _checked_blocks(recording, first, path):
        window.add(loads)
    total, steps = window.loads, window.steps
    _check_all(total[None], np.isinf(total[None]), "infinite after summing the steps", path, ())
    if not recording.is_physical and options.counts == "logical" and _looks_like_a_placement(total, recording):
        notes.append(
            "every row of the loads names each of the same experts, as a placement does; "
            "if it is one, give it as --placement"
        )
    if placement is not None:
        num_experts = options.model.num_experts
        total = _to_logical(total, placement, num_experts)
        steps = np.stack([_to_logical(each, placement, num_experts) for each in steps])
    return RecordedLoads(total, steps, max(0, recording.num_steps - first), (*notes, *_never_chosen(total)))


def read_load_window(path: str | Path, options: LoadOptions | None = None) -> NDArray[np.float64]:
    """Return every step of a recording separately, which needs memory for all of them; `decay` is ignored.

    Returns:
        float64 `[steps, layers, experts]`; one step if the file does not separate steps.

    Raises:
        InputError: as `read_recording`.
    """
    path, options = Path(path), options or LoadOptions()
    with reading(path, "loads"):
        recording = open_recording(path, options.model)
        placement = _placement_of(recording, options, path)
        first = _first_step(recording, options, path)
        nbytes = 8 * max(1, recording.num_steps - first) * math.prod(recording.shape)
        if nbytes > MOST_WINDOW_BYTES:
            raise InputError(
                f"the steps take {nbytes} bytes",
                where=str(path),
                why=f"at most {MOST_WINDOW_BYTES} are read step by step",
                remedy="give fewer steps: window_steps",
            )
        steps = np.concatenate(list(_checked_blocks(recording, first, path)))
        if placement is None:
            return steps
        return np.stack([_to_logical(step, placement, options.model.num_experts) for step in steps])


def _checked_blocks(recording: Recording, first: int, path: Path) -> Iterator[NDArray[np.float64]]:
    """Yield the steps from `first` on, block by block; raise `InputError` if one holds an impossible load."""
    step = first
    added_up = np.zeros((1, *recording.shape))  # files without steps, one after the other
    for block in recording.blocks(first):
        loads = block.astype(np.float64)
        where = (step,) if recording.num_steps else ()
        _check_all(loads, np.isnan(loads), "NaN", path, where)
        _check_all(loads, np.isinf(loads), "infinite", path, where)
        _check_all(loads, loads < 0, "negative", path, where)
        step += len(loads)
        if recording.num_steps:
            yield loads
        else:
            with np.errstate(over="ignore"):
                added_up += loads.sum(axis=0)
    if not recording.num_steps:
        yield added_up


def _placement_of(recording: Recording, options: LoadOptions, path: Path) -> NDArray[np.int64] | None:
    """Return what the counted slots held; None if experts were counted."""
    if options.counts == "physical" and recording.is_physical is False:
        raise InputError("the loads count logical experts", where=str(path), remedy="omit --counts physical")
    if not recording.is_physical and options.counts == "logical":
        return None
    placement = recording.placement if recording.placement is not None else options.placement
    if placement is None:
        raise InputError(
            "the loads count physical slots, but it is not known which experts these held",
            where=str(path),
            remedy="give the placement of that time: --counts physical --placement FILE",
        )
    if placement.shape != recording.shape:
        raise InputError(
            f"the loads count {_layers_of(recording.shape, 'slots')}, "
            f"the placement has {_layers_of(placement.shape, 'slots')}",
            where=str(path),
        )
    return placement


def _layers_of(shape: tuple[int, ...], columns: str) -> str:
    return f"{shape[0]} layer{'' if shape[0] == 1 else 's'} of {shape[1]} {columns}"


def _first_step(recording: Recording, options: LoadOptions, path: Path) -> int:
    if not 0 < options.decay <= 1:
        raise InputError(f"--decay is {options.decay:g}", why="it must be above 0 and at most 1")
    if options.window_steps is not None and options.window_steps < 1:
        raise InputError(f"--window-steps is {options.window_steps}", why="it must be 1 or more")
    if not recording.num_steps and (options.window_steps is not None or options.decay != 1):
        option = "--decay" if options.window_steps is None else "--window-steps"
        raise InputError(f"{option} needs loads with steps", where=str(path), why="these are already summed")
    if options.window_steps is None:
        return 0
    return max(0, recording.num_steps - options.window_steps)


def _to_logical(
    counts: NDArray[np.float64], placement: NDArray[np.int64], num_experts: int | None
) -> NDArray[np.float64]:
    """Sum the counts of the slots of each expert; empty slots count for none."""
    loads = np.zeros((len(counts), max(num_experts or 0, int(placement.max()) + 1)))
    rows, slots = np.nonzero(placement >= 0)
    np.add.at(loads, (rows, placement[rows, slots]), counts[rows, slots])
    return loads


def _looks_like_a_placement(loads: NDArray[np.float64], recording: Recording) -> bool:
    if recording.num_steps or loads.shape[1] < 4 or not np.array_equal(loads, np.floor(loads)):
        return False
    # At least half as many experts as slots: most experts have one or two slots.
    num_experts = int(loads.max()) + 1
    if not loads.shape[1] / 2 <= num_experts <= loads.shape[1]:
        return False
    return all(np.array_equal(np.unique(row), np.arange(num_experts)) for row in loads)


def _never_chosen(loads: NDArray[np.float64]) -> Iterator[str]:
    never = int(np.count_nonzero(~loads.any(axis=0)))
    if loads.any() and 2 * never >= loads.shape[1] > 1:
        yield (
            f"{never} of {loads.shape[1]} experts were never chosen in any layer; were the counts of all ranks summed?"
        )


def _check_all(
    loads: NDArray[np.float64], wrong: NDArray[np.bool_], adjective: str, path: Path, step: tuple[int, ...]
) -> None:
    count = int(np.count_nonzero(wrong))
    if not count:
        return
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    numbers = (first[0] + step[0], *first[1:]) if step else first[1:]
    names = ("step", "layer", "expert")[-len(numbers) :]
    place = ", ".join(f"{name} {i}" for name, i in zip(names, numbers, strict=True))
    one = count == 1
    raise InputError(
        f"{count} {'load is' if one else 'loads are'} {adjective}",
        where=str(path),
        why=f"{'it is' if one else 'the first is'} {loads[first]:g} at {place}",
    )
