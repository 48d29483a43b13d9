"""Reads recorded expert loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eplb_core.errors import InputError
from eplb_core.inputs.arrays import read_array

_KEYS = ("loads", "logical_count")


def read_loads(path: str | Path) -> NDArray[np.float64]:
    """Return how much load each logical expert of each layer had, summed over the steps of `read_load_window`.

    Returns:
        float64 `[layers, experts]`, tokens or any other unit; finite, not negative.

    Raises:
        InputError: as `read_load_window`.
    """
    return _summed(read_load_window(path), Path(path))


def read_load_window(path: str | Path) -> NDArray[np.float64]:
    """Return how much load each logical expert of each layer had in each step.

    A file holds `[layers, experts]`, which is one step, or `[steps, layers, experts]`, which is what an engine's
    recorder writes. In files with names the array is called `loads`, or `logical_count` as SGLang calls it.

    Args:
        path: a `.json`, `.npy`, `.npz` or `.pt` file.

    Returns:
        float64 `[steps, layers, experts]`, tokens or any other unit; finite, not negative.

    Raises:
        InputError: the file is missing or cannot be read, or the loads have a wrong shape, are empty, negative,
            infinite or not numbers.
    """
    path = Path(path)
    array = read_array(path, "loads", _KEYS)
    if array.ndim not in (2, 3):
        raise InputError(
            f"the loads have {array.ndim} {'dimension' if array.ndim == 1 else 'dimensions'} instead of 2 or 3",
            where=str(path),
            why=f"their shape is {_shape(array.shape)}, not [layers, experts] or [steps, layers, experts]",
        )
    if array.size == 0:
        raise InputError("the loads are empty", where=str(path), why=f"their shape is {_shape(array.shape)}")
    loads = array.astype(np.float64)
    _check_all(loads, np.isnan(loads), "NaN", path)
    _check_all(loads, np.isinf(loads), "infinite", path)
    _check_all(loads, loads < 0, "negative", path)
    if loads.ndim == 2:
        return loads[None]
    _summed(loads, path)
    return loads


def _summed(window: NDArray[np.float64], path: Path) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        loads: NDArray[np.float64] = window.sum(axis=0)
    _check_all(loads, np.isinf(loads), "infinite after summing the steps", path)
    return loads


def _check_all(loads: NDArray[np.float64], wrong: NDArray[np.bool_], adjective: str, path: Path) -> None:
    count = int(np.count_nonzero(wrong))
    if not count:
        return
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    names = ("step", "layer", "expert")[-len(first) :]
    place = ", ".join(f"{name} {i}" for name, i in zip(names, first, strict=True))
    one = count == 1
    raise InputError(
        f"{count} {'load is' if one else 'loads are'} {adjective}",
        where=str(path),
        why=f"{'it is' if one else 'the first is'} {loads[first]:g} at {place}",
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
