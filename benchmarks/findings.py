"""What a campaign of measurements found, row by row: kept in a JSON file after each, and shown as one table."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

State = Literal["ok", "failed", "wrong", "skipped"]

_STYLES = {"ok": "green", "failed": "bold red", "wrong": "bold red", "skipped": "yellow"}
_REASON_LENGTH = 200


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Attributes:
        part: the part of the campaign.
        what: the contestant, or the test file.
        workload: the name of the workload; empty where there is none.
        ours: whether our code was measured, and not a peer's.
        state: "wrong" are wrong bytes, "skipped" is what cannot be done here, with the reason.
        reason: why it is not "ok".
        seconds: the median of what was measured: a rearrangement, or a batch beside one.
        gb_per_s: of each GPU.
        link_share: of the rate at which each GPU copies from the next, in the same run.
        slowdown: of the work beside it; 0.1 is 10 % slower.
        remark: what else is worth a look.
        details: all numbers.
    """

    part: str
    what: str
    workload: str = ""
    ours: bool = True
    state: State = "ok"
    reason: str = ""
    seconds: float | None = None
    gb_per_s: float | None = None
    link_share: float | None = None
    slowdown: float | None = None
    remark: str = ""
    details: dict[str, Any] = field(default_factory=dict)


class Findings:
    """All rows. Each is printed as a line, and written to the file, as soon as it is there.

    Args:
        path: the JSON file, or None for none.
        console: takes the lines.
        head: what stands in the JSON document before the rows.
    """

    def __init__(self, path: Path | None, console: Console, head: dict[str, Any]) -> None:
        self.rows: list[Row] = []
        self.head = head
        self._path = path
        self._console = console
        self._began = time.monotonic()
        self._lock = threading.Lock()

    @property
    def good(self) -> bool:
        """Whether something was measured, nothing failed, and every byte that was ours to move was right."""
        states = Counter(row.state for row in self.rows if row.ours or row.state != "wrong")
        return states["ok"] > 0 and not states["failed"] and not states["wrong"]

    def add(self, row: Row) -> None:
        """Keep a row."""
        with self._lock:
            self.rows.append(row)
        told = " ".join(filter(None, [row.part, row.workload, row.what]))
        line = Text(f"{time.monotonic() - self._began:5.0f} s  {told}: ").append(row.state, _STYLES[row.state])
        self._console.print(line.append(f" {_shortened(row.reason)}" if row.reason else ""), soft_wrap=True)
        self.write(finished=False)

    def write(self, *, finished: bool) -> None:
        """Write the file anew. One that is half written never takes the place of a whole one."""
        if self._path is None:
            return
        with self._lock:
            document = {
                **self.head,
                "finished": finished,
                "good": self.good,
                "seconds": time.monotonic() - self._began,
                "rows": [asdict(row) for row in self.rows],
            }
            part = self._path.with_name(self._path.name + ".part")
            part.write_text(json.dumps(document, indent=2) + "\n")
            os.replace(part, self._path)

    def print_table(self, title: str) -> None:
        """Print all rows as one table."""
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
        for column in ("part", "workload", "what"):
            table.add_column(column, no_wrap=True)
        for column in ("median", "GB/s a GPU", "of link", "slower"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("result", no_wrap=True)
        table.add_column("remark", overflow="fold")
        for row in self.rows:
            table.add_row(
                row.part,
                row.workload,
                Text(row.what),
                "" if row.seconds is None else f"{1e3 * row.seconds:,.{2 if row.seconds < 10e-3 else 1}f} ms",
                "" if row.gb_per_s is None else f"{row.gb_per_s:,.2f}",
                "" if row.link_share is None else f"{row.link_share:.0%}",
                "" if row.slowdown is None else f"{row.slowdown:+.1%}",
                Text(row.state, _STYLES[row.state]),
                Text(_shortened(row.reason) or row.remark),
            )
        self._console.print(table)


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _REASON_LENGTH else line[: _REASON_LENGTH - 3] + "..."
