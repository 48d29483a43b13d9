"""Reads what an engine has written of `RearrangeJob.status()`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import msgspec

from eplb_core.cli.watch.snapshot import RankSnapshot

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Rows = list[list[int]]


class _Failure(msgspec.Struct):
    type: str
    message: str


class _Status(msgspec.Struct):
    """The fields of `RearrangeJob.status()` that are shown; others are ignored, so that newer engines can be read."""

    phase: str
    steps: _Count
    steps_committed: _Count
    bytes_received: _Count
    bytes_to_receive: _Count
    requested: _Rows
    effective: _Rows
    rank: _Count | None = None
    ranks: _Count | None = None
    ready_layers: list[_Count] = msgspec.field(default_factory=list)
    error: _Failure | None = None


class StatusFile:
    """A file with one status, which the engine replaces as often as it likes.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: tuple[float, int] | None = None

    def look(self) -> list[RankSnapshot]:
        """Return what is in it now."""
        name = str(self._path)
        try:
            status = msgspec.json.decode(self._path.read_bytes(), type=_Status)
        except OSError as error:
            return [RankSnapshot(source=name, rank=None, phase="unreadable", problem=error.strerror or str(error))]
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            return [RankSnapshot(source=name, rank=None, phase="unreadable", problem=f"not a status: {error}")]
        now, rate = time.monotonic(), None
        if self._last is not None and now > self._last[0]:
            rate = max(0, status.bytes_received - self._last[1]) / (now - self._last[0])
        self._last = now, status.bytes_received
        return [
            RankSnapshot(
                source=name,
                rank=status.rank,
                phase=status.phase,
                bytes_received=status.bytes_received,
                bytes_to_receive=status.bytes_to_receive,
                steps_committed=status.steps_committed,
                steps=status.steps,
                ready_layers=tuple(status.ready_layers),
                bytes_per_s=rate,
                problem=f"{status.error.type}: {status.error.message}" if status.error else "",
                placements={"requested": status.requested, "effective": status.effective},
                num_ranks=status.ranks,
            )
        ]
