"""Recorded loads as all readers return them: steps of counts, and their metadata."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb_core.errors import InputError
from eplb_core.inputs.arrays import numeric
from eplb_core.inputs.edge import MOST_NUMBERS

Counted = NDArray[Any]


@dataclass(frozen=True, slots=True)
class ModelHints:
    """What is known about the model while its loads are read.

    Attributes:
        num_experts: logical experts of a layer.
        num_layers: all layers, including dense ones.
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
        num_steps: how many steps there are; 0 if they were summed before they were written.
        blocks: yields the steps from a given one on, `[some steps, layers, columns]`.
        is_physical: whether the columns are physical slots or logical experts; None if the recording does not say.
        placement: what the slots held, int64 `[layers, slots]`, if the recording says so.
        notes: what the user may want to know.
    """

    shape: tuple[int, ...]
    num_steps: int
    blocks: Callable[[int], Iterator[Counted]]
    is_physical: bool | None = None
    placement: NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()


def check_shape(shape: tuple[int, ...], path: Path) -> None:
    """Raise `InputError` unless an array of this shape can be loads."""
    text = f"[{', '.join(map(str, shape))}]"
    if len(shape) not in (2, 3):
        raise InputError(
            f"the loads have {len(shape)} {'dimension' if len(shape) == 1 else 'dimensions'} instead of 2 or 3",
            where=str(path),
            why=f"their shape is {text}, not [layers, experts] or [steps, layers, experts]",
        )
    if math.prod(shape[-2:]) > MOST_NUMBERS:
        raise InputError(
            f"the loads have more than {MOST_NUMBERS} layers times columns",
            where=str(path),
            why=f"their shape is {text}",
        )
    if not math.prod(shape):
        raise InputError("the loads are empty", where=str(path), why=f"their shape is {text}")


def placement_table(value: object, path: Path) -> NDArray[np.int64]:
    """Return the placement stored in a file of loads."""
    array = numeric(value, path, "placement").whole()
    if array.ndim != 2 or not np.array_equal(array, array.astype(np.int64)):
        raise InputError("the placement in the loads file is not a table [layers, slots]", where=str(path))
    return array.astype(np.int64)


def same_placement(first: NDArray[np.int64] | None, second: NDArray[np.int64] | None) -> bool:
    """Whether both placements are equal, or neither is known."""
    return first is second if first is None or second is None else np.array_equal(first, second)
