"""Compares several runs: medians over rounds, and speed relative to the first backend."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_WORST_NAMED = 5  # of wrong tensors
_FEW_S = 10e-3


def summarize(backends: Sequence[str], runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per backend: medians of its rounds, and its speed relative to the first.

    Args:
        backends: the config strings, in their order.
        runs: documents of all runs; a failed one has only `backend` and `error`.
    """
    rows: list[dict[str, Any]] = []
    for backend in backends:
        own = [run for run in runs if run["backend"] == backend]
        done = [run for run in own if "error" not in run]
        row: dict[str, Any] = {"backend": backend, "rounds": len(done), "failed": len(own) - len(done)}
        if done:
            median = statistics.median(run["seconds_median"] for run in done)
            row |= {
                "seconds_median": median,
                "seconds_min": min(run["seconds_min"] for run in done),
                "seconds_first": statistics.median(run["seconds_first"] for run in done),
                "gb_per_s": done[0]["bytes_moved"] / median / 1e9,
                "staging_bytes_max": max(run["staging_bytes_max"] for run in done),
            }
            first = rows[0] if rows else row
            row["times_as_fast"] = first["seconds_median"] / median if "seconds_median" in first else None
        row["correct"] = bool(own) and all(run.get("correct", False) for run in own)
        rows.append(row)
    return rows


def print_summary(rows: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the rows as a table, and below it the problems."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("backend")
    for column in ("median", "fastest", "first", "GB/s", "staging", "correct"):
        table.add_column(column, justify="right")
    if len(rows) > 1:
        table.add_column("times as fast", justify="right")
    for row in rows:
        correct = Text("yes", "green") if row["correct"] else Text("NO", "bold red")
        if not row["rounds"]:
            table.add_row(Text(row["backend"]), *["-"] * 5, correct)
            continue
        table.add_row(
            Text(row["backend"]),
            *(f"{_milliseconds(row[key])} ms" for key in ("seconds_median", "seconds_min", "seconds_first")),
            f"{row['gb_per_s']:,.2f}",
            f"{row['staging_bytes_max'] / 2**20:,.1f} MiB",
            correct,
            *([f"{row['times_as_fast']:.2f}" if row["times_as_fast"] else "-"] if len(rows) > 1 else []),
        )
    console.print(table)
    for row in rows:
        done = [run for run in runs if run["backend"] == row["backend"] and "error" not in run]
        if done:
            names = dict.fromkeys(name for run in done for name in run["phases_in_detail"])
            medians = {
                name: statistics.median(run["phases_in_detail"].get(name, 0.0) for run in done) for name in names
            }
            text = ", ".join(f"{name} {_milliseconds(seconds)}" for name, seconds in medians.items())
            console.print(f"{row['backend']}: milliseconds in {text}", markup=False)
    for run in runs:
        for problem in [run["error"]] if "error" in run else run["examples"][:_WORST_NAMED]:
            console.print(f"{run['backend']}: {problem}", markup=False, style="red")


def _milliseconds(seconds: float) -> str:
    """Return milliseconds, with a second decimal if one would hide differences."""
    return f"{1e3 * seconds:,.2f}" if seconds < _FEW_S else f"{1e3 * seconds:,.1f}"
