"""Reads one numeric array out of a JSON, NPY, NPZ or PT file, and says plainly what is wrong with it.

No format runs code: NumPy files are read without pickle, PyTorch files with `weights_only`.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eplb_core.errors import InputError


def read_array(path: Path, what: str, keys: Sequence[str]) -> NDArray[Any]:
    """Return the numeric array that `path` holds.

    Args:
        path: a `.json`, `.npy`, `.npz` or `.pt` file.
        what: what the array is, for messages: "loads" or "placement".
        keys: where the file maps names to values, the names to look under, best first. A file with one array only
            may call it anything.

    Returns:
        An array of integers or floats, of any shape.

    Raises:
        InputError: the file is missing, is of another kind, cannot be read, or holds no such array.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"the {what} file has the unknown extension {path.suffix!r}",
            where=str(path),
            remedy=f"give one of {', '.join(sorted(_READERS))}",
        )
    if not path.is_file():
        raise InputError(f"the {what} file {'is no file' if path.exists() else 'does not exist'}", where=str(path))
    try:
        content = reader(path)
    except _READ_ERRORS as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the {what} file cannot be read as {path.suffix[1:]}", where=str(path), why=first_line
        ) from error
    return _numeric(_pick(content, path, what, keys), path, what)


def _read_json(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_numpy(path: Path) -> object:
    content = np.load(path, allow_pickle=False)
    if isinstance(content, np.ndarray):
        return content
    with content:
        return {name: content[name] for name in content.files}


def _read_torch(path: Path) -> object:
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Mapping):
        return {name: _as_numpy(value) for name, value in content.items()}
    return _as_numpy(content)


def _as_numpy(value: object) -> object:
    import torch

    # NumPy has no bfloat16; float64 holds every float of torch and every count below 2**53.
    return value.to(torch.float64).numpy() if isinstance(value, torch.Tensor) else value


_READERS: Mapping[str, Callable[[Path], object]] = {
    ".json": _read_json,
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".pt": _read_torch,
}
_READ_ERRORS = (
    OSError,
    ValueError,  # JSON and Unicode errors are ValueErrors
    EOFError,
    KeyError,
    RuntimeError,
    RecursionError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


def _pick(content: object, path: Path, what: str, keys: Sequence[str]) -> object:
    if not isinstance(content, Mapping):
        return content
    for key in keys:
        if key in content:
            return content[key]
    arrays = [value for value in content.values() if isinstance(value, list | np.ndarray)]
    if len(arrays) == 1:
        return arrays[0]
    raise InputError(
        f"the {what} file holds {'several arrays' if arrays else 'no array'}, and none is called {keys[0]!r}",
        where=str(path),
        why=f"it has {', '.join(sorted(map(str, content))) or 'nothing'}",
        remedy=f"name the array {keys[0]!r}",
    )


def _numeric(value: object, path: Path, what: str) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"the rows of the {what} have different lengths", where=str(path)) from error
    if array.dtype.kind not in "iuf" and array.size:
        raise InputError(f"the {what} are not numbers", where=str(path), why=f"found {array.dtype.name} values")
    return array
