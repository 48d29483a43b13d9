"""The tensors of a safetensors checkpoint, in one file or many: where each lies, its header, its bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from eplb_core.errors import InputError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"

# How safetensors names the dtypes, and what torch calls them: https://github.com/huggingface/safetensors
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class Header(NamedTuple):
    """What a file says of a tensor before it is read.

    Attributes:
        shape: its shape.
        dtype: the name of its torch dtype.
    """

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Shards:
    """All tensors of one checkpoint folder, read one at a time. Make it with `Shards.open`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path_of: dict[str, Path] = {}
        self._files: dict[Path, Any] = {}

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Find the files of a checkpoint; no tensor is read.

        Args:
            directory: a folder with `model.safetensors.index.json` and the shards that it names, or with
                `.safetensors` files alone.

        Raises:
            InputError: there is no such folder, no safetensors file in it, or a shard is missing.
        """
        if not directory.is_dir():
            kind = "is no folder" if directory.exists() else "does not exist"
            raise InputError(f"the checkpoint {kind}", where=str(directory))
        shards = cls(directory)
        if (directory / INDEX).is_file():
            shards._follow_index()
        else:
            shards._list_files()
        return shards

    @property
    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._path_of.keys()

    def where(self, name: str) -> str:
        """Return the file and the tensor, for messages; for an absent tensor, the folder and the tensor."""
        return f"{self._path_of.get(name, self.directory)}, {name}"

    def header(self, name: str) -> Header:
        """Return the shape and dtype of a tensor without reading it.

        Raises:
            InputError: the shard lacks it, cannot be read, or gives it a dtype that torch does not have.
        """
        from safetensors import SafetensorError

        try:
            piece = self._file(self._path_of[name]).get_slice(name)
        except SafetensorError as error:
            raise InputError("a tensor is missing in its shard", where=self.where(name), why=str(error)) from error
        code = str(piece.get_dtype())
        if code not in _DTYPES:
            raise InputError(f"a tensor has the unknown dtype {code}", where=self.where(name))
        return Header(tuple(piece.get_shape()), _DTYPES[code])

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, on the CPU. Raises `InputError` if it cannot be read."""
        from safetensors import SafetensorError

        try:
            tensor: torch.Tensor = self._file(self._path_of[name]).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError("a tensor cannot be read", where=self.where(name), why=str(error)) from error
        return tensor

    def _follow_index(self) -> None:
        index = self.directory / INDEX
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise InputError("the index has no weight_map", where=str(index))
        present: dict[str, bool] = {}
        for name, shard in weight_map.items():
            # A path that leads out of the folder is no shard of this checkpoint.
            if Path(shard).name != shard:
                raise InputError(f"the index names the shard {shard!r}, which is no file name", where=str(index))
            path = self.directory / shard
            if shard not in present:
                present[shard] = path.is_file()
            if not present[shard]:
                raise InputError("a shard is missing", where=str(path), why=f"{INDEX} puts {name} there")
            self._path_of[name] = path

    def _list_files(self) -> None:
        # Mixtral's folder also has its original weights, `consolidated.*`, under other names.
        paths = sorted(self.directory.glob("model*.safetensors")) or sorted(self.directory.glob("*.safetensors"))
        if not paths:
            raise InputError(
                "the folder holds no safetensors checkpoint",
                where=str(self.directory),
                why=f"there is neither {INDEX} nor any .safetensors file",
            )
        for path in paths:
            for name in self._file(path).keys():  # noqa: SIM118 - an open file is no mapping
                if name in self._path_of:
                    raise InputError(
                        "two files hold the same tensor", where=f"{self._path_of[name]} and {path}, {name}"
                    )
                self._path_of[name] = path

    def _file(self, path: Path) -> Any:
        """Return the open file; opening maps it and reads its header, not its tensors."""
        from safetensors import SafetensorError, safe_open

        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise InputError("a shard cannot be read as safetensors", where=str(path), why=str(error)) from error
        return self._files[path]


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `InputError` if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name} cannot be read", where=str(path), why=str(error)) from error
    if not isinstance(content, dict):
        raise InputError(f"{path.name} is not a JSON object", where=str(path))
    return content
