"""Reads arrays from JSON, NPY, NPZ and PT files, large ones block by block, with clear errors.

No format runs code: NumPy files are read without pickle, PyTorch files with `weights_only`.
"""

from __future__ import annotations

import ctypes
import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from eplb_core.errors import InputError
from eplb_core.inputs.edge import MOST_NUMBERS, MOST_WHOLE_BYTES, count_numbers, reading, reason_of

if TYPE_CHECKING:
    import torch

_Content = TypeVar("_Content")

BLOCK_BYTES = 8 << 20  # of float64; a few of them exist at a time
_MOST_WRITTEN = 16 * MOST_NUMBERS  # as text: steps of a recording, say
_BINARY = "write it as .npy, which is read block by block"


@dataclass(frozen=True, slots=True, eq=False)
class StoredArray:
    """An array in a file; only one block of it is in memory at a time.

    Attributes:
        shape: its shape.
        is_numeric: whether it holds integers or floats, as opposed to booleans, text or complex numbers.
        kind: what it holds, for messages.
        read: returns the rows from the first argument up to the second, as a NumPy array. Called with increasing rows.
    """

    shape: tuple[int, ...]
    is_numeric: bool
    kind: str
    read: Callable[[int, int], NDArray[Any]]

    @classmethod
    def of(cls, array: NDArray[Any]) -> StoredArray:
        """Wrap an array that is already in memory."""

        def read(start: int, stop: int) -> NDArray[Any]:
            return array[start:stop] if array.ndim else array

        return cls(array.shape, array.dtype.kind in "iuf", array.dtype.name, read)

    def blocks(self, start: int = 0) -> Iterator[NDArray[Any]]:
        """Yield the rows from `start` on, as many as fit into a block at a time."""
        row_bytes = 8 * math.prod(self.shape[1:])
        rows = max(1, BLOCK_BYTES // max(1, row_bytes))
        for first in range(start, self.shape[0], rows):
            yield self.read(first, min(first + rows, self.shape[0]))

    def whole(self) -> NDArray[Any]:
        """Return all of it."""
        return self.read(0, self.shape[0]) if self.shape else self.read(0, 1)


def read_content(path: Path, what: str) -> object:
    """Return what a file holds: a `StoredArray`, or mappings and lists with such arrays, numbers and text in them.

    Args:
        path: a `.json`, `.npy`, `.npz`, `.pt` or `.pth` file.
        what: what the file should hold, for messages: "loads" or "placement".

    Raises:
        InputError: the file is missing, is of another kind, or cannot be read.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"the {what} file has the unknown extension {path.suffix!r}",
            where=str(path),
            remedy=f"give one of {', '.join(sorted(_READERS))}",
        )
    check_is_file(path, what)
    return guarded(reader, path, what)


def check_is_file(path: Path, what: str) -> None:
    """Raise `InputError` unless the file exists."""
    if not path.is_file():
        raise InputError(f"the {what} file {'is not a file' if path.exists() else 'does not exist'}", where=str(path))


def guarded(reader: Callable[[Path], _Content], path: Path, what: str) -> _Content:
    """Return `reader(path)`, or raise `InputError` with the reason."""
    with reading(path, what):
        try:
            return reader(path)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"the {what} file cannot be read as {path.suffix[1:]}", where=str(path), why=_reason(error)
            ) from error


def _reason(error: Exception) -> str:
    # For a file with more than tensors, torch itself advises to allow it to run code.
    refused = re.search(r"Unsupported (?:global|operand)[^\n]*?(?:GLOBAL )?([\w.]+\.[\w.]+)", str(error))
    if refused:
        return f"it holds {refused[1]}, but only tensors, numbers and text are read, as anything else can run code"
    if isinstance(error, pickle.UnpicklingError):
        return "it is damaged, or torch.save did not write it"
    return reason_of(error)


def read_array(path: Path, what: str, keys: Sequence[str]) -> NDArray[Any]:
    """Return the numeric array that `path` holds.

    Args:
        path: a `.json`, `.npy`, `.npz`, `.pt` or `.pth` file.
        what: what the array is, for messages: "loads" or "placement".
        keys: if the file maps names to values, the names to look for, best first. A file with a single array may give
            it any name.

    Returns:
        An array of integers or floats, of any shape.

    Raises:
        InputError: the file is missing, is of another kind, cannot be read, or holds no such array.
    """
    return numeric(pick(read_content(path, what), path, what, keys), path, what).whole()


def pick(content: object, path: Path, what: str, keys: Sequence[str]) -> object:
    """Return the array in `content`: the one with one of the names, or the only one."""
    if not isinstance(content, Mapping) or is_described(content):
        return content
    for key in keys:
        if key in content:
            return content[key]
    arrays = [value for value in content.values() if isinstance(value, list | StoredArray) or is_described(value)]
    if len(arrays) == 1:
        return arrays[0]
    raise InputError(
        f"the {what} file holds {'several arrays' if arrays else 'no array'}, and none is called {keys[0]!r}",
        where=str(path),
        why=f"it has {', '.join(sorted(map(str, content))) or 'nothing'}",
        remedy=f"name the array {keys[0]!r}",
    )


def is_described(value: object) -> bool:
    """Whether it is an array written as its shape and a flat list of numbers, as some engines log arrays."""
    return isinstance(value, Mapping) and isinstance(value.get("shape"), list) and isinstance(value.get("value"), list)


def numeric(value: object, path: Path, what: str) -> StoredArray:
    """Return a value as an array of numbers. Raises `InputError` if it is not one."""
    if isinstance(value, StoredArray):
        array = value
    else:
        entries = value["value"] if is_described(value) else value  # type: ignore[index]
        if count_numbers(entries, _MOST_WRITTEN) > _MOST_WRITTEN:
            raise InputError(f"the {what} have more than {_MOST_WRITTEN} numbers", where=str(path), remedy=_BINARY)
        try:
            if is_described(value):
                array = StoredArray.of(np.asarray(value["value"]).reshape(value["shape"]))  # type: ignore[index]
            else:
                if isinstance(value, list | tuple) and value and all(isinstance(row, StoredArray) for row in value):
                    value = [row.whole() for row in value]
                array = StoredArray.of(np.asarray(value))
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(f"the rows of the {what} have different lengths", where=str(path)) from error
    if not array.is_numeric and 0 not in array.shape:
        raise InputError(f"the {what} are not numbers", where=str(path), why=f"found {array.kind} values")
    return array


# --- formats ---------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def _read_npy(path: Path) -> StoredArray:
    with path.open("rb") as stream:
        return _stored_npy(stream, lambda: path.open("rb"))


def _read_npz(path: Path) -> dict[str, StoredArray]:
    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if member.endswith(".npy"):
                with archive.open(member) as stream:
                    found[member.removesuffix(".npy")] = _stored_npy(stream, _opener(path, member))
    return found


def _opener(path: Path, member: str) -> Callable[[], IO[bytes]]:
    def reopen() -> IO[bytes]:
        # The member keeps the archive's file open until the member is closed.
        with zipfile.ZipFile(path) as archive:
            return archive.open(member)

    return reopen


def _stored_npy(stream: IO[bytes], reopen: Callable[[], IO[bytes]]) -> StoredArray:
    """Read the header of an array in NumPy's format, and check that all its numbers are there."""
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("it holds objects, which are not unpickled, as that can run code")
    if any(extent < 0 for extent in shape):
        raise ValueError(f"its shape is {list(shape)}")
    num_rows, row_bytes = (*shape, 1)[0], dtype.itemsize * math.prod((1, *shape[1:]))
    begin, nbytes = stream.tell(), num_rows * row_bytes
    if nbytes and (stream.seek(begin + nbytes - 1), stream.read(1))[1] == b"":
        raise ValueError(f"it ends before the {nbytes} bytes that its header announces")
    if fortran or not shape:
        if nbytes > MOST_WHOLE_BYTES:
            raise ValueError(f"it has {nbytes} bytes, column by column; at most {MOST_WHOLE_BYTES} are read so")
        with closing(reopen()) as whole:
            array: NDArray[Any] = np.lib.format.read_array(whole, allow_pickle=False)
        return StoredArray.of(array)

    open_stream: list[IO[bytes]] = []  # seeking in compressed files is slow, so reading continues in place

    def read(start: int, stop: int) -> NDArray[Any]:
        if not open_stream:
            open_stream.append(reopen())
        open_stream[0].seek(begin + start * row_bytes)
        content = open_stream[0].read((stop - start) * row_bytes)
        if stop >= num_rows:
            open_stream.pop().close()
        return np.frombuffer(content, dtype).reshape(stop - start, *shape[1:])

    return StoredArray(tuple(shape), dtype.kind in "iuf", dtype.name, read)


def _read_torch(path: Path) -> object:
    import torch

    # A mapped file takes no memory until it is read. Files from before torch 1.6 cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    return _without_tensors(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped), mapped)


def _without_tensors(value: object, mapped: bool) -> object:
    import torch

    if isinstance(value, torch.Tensor):
        return _stored_tensor(value, mapped)
    if isinstance(value, Mapping):
        return {key: _without_tensors(entry, mapped) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(entry, mapped) for entry in value]
    return value


def _stored_tensor(tensor: torch.Tensor, mapped: bool) -> StoredArray:
    import torch

    nbytes = tensor.numel() * tensor.element_size()
    if tensor.device.type == "meta":
        raise ValueError("it holds a tensor of the device meta, which has no numbers")
    spread = tensor.layout != torch.strided or tensor.is_quantized or nbytes > tensor.untyped_storage().nbytes()
    if spread and nbytes > MOST_WHOLE_BYTES:
        raise ValueError(f"it holds a tensor that unfolds to {nbytes} bytes; at most {MOST_WHOLE_BYTES} are read so")
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
        mapped = False
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    numbers = not (tensor.dtype.is_complex or tensor.dtype == torch.bool)

    def read(start: int, stop: int) -> NDArray[Any]:
        rows = tensor.detach()[start:stop] if tensor.ndim else tensor.detach()
        copied = _copy_of(rows)
        if mapped and rows.is_contiguous():
            _forget_pages(rows)
        return copied

    return StoredArray(tuple(tensor.shape), numbers, str(tensor.dtype).removeprefix("torch."), read)


def _copy_of(rows: torch.Tensor) -> NDArray[Any]:
    """Return the numbers in memory that NumPy has allocated.

    Large tensors of torch that come and go by the block leave the C library's heap in pieces: 93 MB more for 131 MB of
    int32, in place of 31 MB.
    """
    try:
        numbers: NDArray[Any] = rows.numpy()
    except TypeError:  # NumPy has no bfloat16 and no float8; float64 holds every such number
        numbers = rows.double().numpy()
    return np.array(numbers)


def _forget_pages(rows: torch.Tensor) -> None:
    """Release the pages of a mapped file that are entirely within `rows`: they would count as this process's memory."""
    import mmap

    first = -(-rows.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (rows.data_ptr() + rows.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


_READERS: Mapping[str, Callable[[Path], object]] = {
    ".json": _read_json,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pt": _read_torch,
    ".pth": _read_torch,
}
