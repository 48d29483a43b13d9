"""Locates the tensors of a safetensors checkpoint, in one file or many: file, offset and size of each.

Headers are read here and nowhere else. Later steps need only a tensor's bytes, so a dtype that torch or the safetensors
package does not know is as good as any other.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec

from eplb_core.errors import InputError

INDEX = "model.safetensors.index.json"
_INDEX_SUFFIX = ".safetensors.index.json"

# Bits of one element of each dtype whose name is known: https://github.com/huggingface/safetensors
_DTYPES_OF = {
    64: "F64 I64 U64 C64",
    32: "F32 I32 U32",
    16: "F16 BF16 I16 U16",
    8: "BOOL I8 U8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    4: "F4",
}
_BITS_OF = {dtype: bits for bits, dtypes in _DTYPES_OF.items() for dtype in dtypes.split()}


class StoredTensor(NamedTuple):
    """The location of one tensor, and its entry in the header.

    Attributes:
        file: index into `Shards.files`.
        offset: its first byte, from the beginning of the file.
        nbytes: how many bytes it has.
        dtype: safetensors' name of its dtype, such as `BF16`.
        shape: in elements.
    """

    file: int
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Shards:
    """All tensors of one checkpoint directory. Make it with `Shards.open`.

    Attributes:
        directory: the directory.
        files: its safetensors files.
        sizes: how many bytes each has.
        tensors: name -> its location.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: list[Path] = []
        self.sizes: list[int] = []
        self.tensors: dict[str, StoredTensor] = {}

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read the header of every file of a checkpoint; no tensor is read.

        Args:
            directory: a directory with `model.safetensors.index.json` and the shards that it names, or with
                `.safetensors` files only.

        Raises:
            InputError: the directory does not exist, it holds no safetensors file, a shard or a tensor is missing, or a
                file is not safetensors.
        """
        if not directory.is_dir():
            kind = "is not a directory" if directory.exists() else "does not exist"
            raise InputError(f"the checkpoint {kind}", where=str(directory))
        shards = cls(directory)
        index = _find_index(directory)
        if index is None:
            shards._read_files(_list_files(directory))
        else:
            shards._follow_index(index)
        return shards

    def where(self, name: str) -> str:
        """Return the file and the tensor, for messages; for an absent tensor, the directory and the tensor."""
        stored = self.tensors.get(name)
        return f"{self.directory if stored is None else self.files[stored.file]}, {name}"

    def _follow_index(self, index: Path) -> None:
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise InputError("the index has no weight_map", where=str(index))
        paths: dict[str, Path] = {}
        for name, shard in weight_map.items():
            if shard in paths:
                continue
            # A path that leads out of the directory is not a shard of this checkpoint.
            if Path(shard).name != shard:
                raise InputError(f"the index names the shard {shard!r}, which is not a file name", where=str(index))
            paths[shard] = self.directory / shard
            if not paths[shard].is_file():
                raise InputError("a shard is missing", where=str(paths[shard]), why=f"{index.name} puts {name} there")
        # Tensors of a shard that the index does not mention are read too: engines load whole files.
        self._read_files(list(paths.values()), weight_map)
        for name, shard in weight_map.items():
            stored = self.tensors.get(name)
            if stored is None or self.files[stored.file].name != shard:
                raise InputError("a tensor is missing in its shard", where=f"{paths[shard]}, {name}")

    def _read_files(self, paths: list[Path], weight_map: dict[str, str] | None = None) -> None:
        """Add the tensors of all files. If two files hold the same tensor, the index decides."""
        self.files = paths
        for file, path in enumerate(paths):
            tensors, file_bytes = _read_header(path, file)
            self.sizes.append(file_bytes)
            for name, stored in tensors.items():
                if name in self.tensors:
                    chosen = (weight_map or {}).get(name)
                    if chosen is None:
                        raise InputError(
                            "two files hold the same tensor",
                            where=f"{paths[self.tensors[name].file]} and {path}, {name}",
                        )
                    if chosen != path.name:
                        continue
                self.tensors[name] = stored


def _find_index(directory: Path) -> Path | None:
    if (directory / INDEX).is_file():
        return directory / INDEX
    others = sorted(directory.glob(f"*{_INDEX_SUFFIX}"))
    if len(others) > 1:
        raise InputError(
            "the directory has several checkpoints",
            where=str(directory),
            why=f"it has {', '.join(path.name for path in others)}",
            remedy=f"keep one of them, or name the right one {INDEX}",
        )
    return others[0] if others else None


def _list_files(directory: Path) -> list[Path]:
    # Mixtral's directory also has its original weights, `consolidated.*`, under other names.
    paths = sorted(directory.glob("model*.safetensors")) or sorted(directory.glob("*.safetensors"))
    if not paths:
        raise InputError(
            "the directory holds no safetensors checkpoint",
            where=str(directory),
            why=f"there is neither {INDEX} nor any .safetensors file",
        )
    return paths


def _read_header(path: Path, file: int) -> tuple[dict[str, StoredTensor], int]:
    """Return the tensors of one file, and its size. Format: https://github.com/huggingface/safetensors#format."""
    try:
        with path.open("rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            header_bytes = int.from_bytes(stream.read(8), "little")
            if header_bytes > file_bytes - 8:
                raise _NotSafetensorsError(f"its header would have {header_bytes} bytes, the file has {file_bytes}")
            entries = msgspec.json.decode(stream.read(header_bytes), type=dict[str, Any])
        entries.pop("__metadata__", None)
        begin = 8 + header_bytes
        found = {name: _stored(entry, file, begin, name) for name, entry in entries.items()}
        end = max((stored.offset + stored.nbytes for stored in found.values()), default=begin)
        if end != file_bytes:
            raise _NotSafetensorsError(f"its tensors end at byte {end}, the file has {file_bytes} bytes")
    except OSError as error:
        raise InputError("a shard cannot be read", where=str(path), why=error.strerror) from error
    except (msgspec.DecodeError, UnicodeDecodeError, _NotSafetensorsError) as error:
        raise InputError("a shard cannot be read as safetensors", where=str(path), why=str(error)) from error
    return found, file_bytes


class _NotSafetensorsError(ValueError):
    """A file, or an entry of its header, violates the format."""


def _stored(entry: object, file: int, begin: int, name: str) -> StoredTensor:
    match entry:
        case {"dtype": str() as dtype, "shape": list() as shape, "data_offsets": [int() as start, int() as stop]}:
            pass
        case _:
            raise _NotSafetensorsError(f"the entry of {name} is incomplete")
    if not all(isinstance(extent, int) and extent >= 0 for extent in shape) or not 0 <= start <= stop:
        raise _NotSafetensorsError(f"the entry of {name} has a negative number")
    if dtype in _BITS_OF and math.prod(shape) * _BITS_OF[dtype] != 8 * (stop - start):
        raise _NotSafetensorsError(f"{name} is {dtype} {shape}, but has {stop - start} bytes")
    return StoredTensor(file, begin + start, stop - start, dtype, tuple(shape))


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `InputError` if it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.name} cannot be read", where=str(path), why=str(error)) from error
    if not isinstance(content, dict):
        raise InputError(f"{path.name} is not a JSON object", where=str(path))
    return content
