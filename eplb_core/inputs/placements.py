"""Reads and writes placement files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eplb_core.inputs.placement_formats import (
    PlacementFile,
    check_placement_target,
    read_placement_file,
    write_placement_file,
)

__all__ = ["check_placement_target", "read_placement", "write_placement"]


def read_placement(path: str | Path, num_layers: int | None = None) -> NDArray[np.int64]:
    """Return the placement that a file holds, in any of the formats of `placement_formats`.

    Args:
        path: the file.
        num_layers: how many layers have experts, if known: for a file with one list for all of them.

    Returns:
        int64 `[layers, slots]`, physical slot -> logical expert, -1 = empty. Whether the experts exist is not checked.

    Raises:
        InputError: the file is missing or cannot be read, or holds no table of whole numbers.
    """
    return read_placement_file(path, num_layers).placement


def write_placement(path: str | Path, placement: NDArray[np.int64], num_ranks: int) -> None:
    """Write a placement so that `read_placement` reads it back: as JSON or `.npz`, by the file's extension.

    Args:
        path: the file to write.
        placement: int64 `[layers, slots]`.
        num_ranks: the ranks that share the slots, also written to the file.

    Raises:
        InputError: the file cannot be written, or has a wrong extension.
    """
    write_placement_file(path, PlacementFile(placement, "eplb"), num_ranks)
