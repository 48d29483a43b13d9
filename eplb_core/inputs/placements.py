"""Reads and writes placement files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eplb_core.errors import InputError
from eplb_core.inputs.arrays import read_array

_KEYS = ("placement", "physical_to_logical_map")


def read_placement(path: str | Path) -> NDArray[np.int64]:
    """Return the placement that a `.json`, `.npy`, `.npz` or `.pt` file holds.

    In files with names the array is called `placement`, or `physical_to_logical_map` as SGLang calls it.

    Returns:
        int64 `[layers, slots]`, physical slot -> logical expert, -1 = empty. Whether the experts exist is not checked.

    Raises:
        InputError: the file is missing or cannot be read, or holds no table of whole numbers.
    """
    path = Path(path)
    array = read_array(path, "placement", _KEYS)
    if array.ndim != 2 or array.size == 0:
        raise InputError(
            "the placement is not a table [layers, slots]", where=str(path), why=f"its shape is {list(array.shape)}"
        )
    whole = array.astype(np.int64) if np.all(np.isfinite(array)) else None
    if whole is None or not np.array_equal(whole, array):
        raise InputError("the placement holds numbers that are not whole", where=str(path))
    return whole


def write_placement(path: str | Path, placement: NDArray[np.int64], num_ranks: int) -> None:
    """Write a placement so that `read_placement` reads it back: as JSON, or as `.npz` if the name ends so.

    Args:
        path: the file to write.
        placement: int64 `[layers, slots]`.
        num_ranks: the ranks that the slots belong to, written beside it for people.

    Raises:
        InputError: the file cannot be written, or is to be of another kind.
    """
    path = Path(path)
    check_placement_target(path)
    try:
        if path.suffix.lower() == ".npz":
            np.savez_compressed(path, placement=placement, num_ranks=np.int64(num_ranks))
            return
        rows = ",\n    ".join(json.dumps(row) for row in placement.tolist())
        path.write_text(f'{{\n  "num_ranks": {num_ranks},\n  "placement": [\n    {rows}\n  ]\n}}\n', encoding="utf-8")
    except OSError as error:
        raise InputError("the placement cannot be written", where=str(path), why=error.strerror) from error


def check_placement_target(path: Path) -> None:
    """Raise `InputError` if `write_placement` cannot write files of this kind."""
    if path.suffix.lower() not in (".json", ".npz"):
        raise InputError(
            f"a placement cannot be written as {path.suffix or 'a file without extension'}",
            where=str(path),
            remedy="name it .json or .npz",
        )
