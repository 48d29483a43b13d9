"""Serialises a checkpoint's table, so that one rank reads the headers and sends the others the locations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from eplb_core.errors import HandshakeError, InputError
from eplb_core.inputs.checkpoint import Checkpoint

_DTYPES = ("int32", "int64")


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    """Return the table as bytes."""
    return msgspec.msgpack.encode(checkpoint, enc_hook=_to_plain)


def decode_checkpoint(payload: bytes) -> Checkpoint:
    """Return the checkpoint that another rank has opened, after checking the files that this rank sees.

    Raises:
        InputError: a file is missing here, or its size differs.
        HandshakeError: these are not the bytes of a table.
    """
    try:
        checkpoint = msgspec.msgpack.decode(payload, type=Checkpoint, dec_hook=_from_plain)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise HandshakeError(
            "rank 0's description of the checkpoint cannot be read",
            table={},
            why=str(error),
            remedy="install the same eplb on every rank",
        ) from error
    for path, size in checkpoint.files:
        try:
            found = path.stat().st_size
        except OSError as error:
            raise InputError("a shard is missing on this machine", where=str(path), why=error.strerror) from error
        if found != size:
            raise InputError(
                "the checkpoint differs from the one that rank 0 has read",
                where=str(path),
                why=f"it has {found} bytes here, {size} there",
            )
    return checkpoint


def _to_plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, value.tobytes()
    raise NotImplementedError(f"{type(value)} cannot be part of a table")


def _from_plain(kind: type, value: object) -> object:
    if kind is Path:
        return Path(cast("str", value))
    match value:
        case [str() as dtype, [int() as rows, int() as columns], bytes() as content] if dtype in _DTYPES:
            array: np.ndarray[Any, Any] = np.frombuffer(content, dtype).reshape(rows, columns)
            return array
    raise ValueError("it is not an array of a table")
