"""Snapshots as a live table, and as lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from eplb_core.cli.rebalance.report import format_bytes
from eplb_core.cli.watch.snapshot import RankSnapshot

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

    from eplb_core.cli.watch.balance import Balance

_STYLES = {"failed": "red", "unreadable": "red", "finished": "green", "cancelled": "yellow", "idle": "dim"}
_MOST_LINKS = 12
_MOST_LAYERS = 8


def drawn(seen: Sequence[RankSnapshot], balance: Balance | None) -> Group:
    """Return the view of all ranks, and of the busiest links."""
    from rich import box
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("rank", "phase", "", "bytes", "rate", "steps", "ready layers", "so far"):
        table.add_column(title, justify="right" if title in ("bytes", "rate", "steps") else "left")
    if balance is not None:
        table.add_column("max / mean load")
    links: list[tuple[float, str]] = []
    problems = []
    for each in seen:
        name = each.source if each.rank is None else str(each.rank)
        total = each.bytes_to_receive
        bar = ProgressBar(total=max(1, total), completed=each.bytes_received, width=20) if total else Text("")
        row = [Text(name), Text(each.phase, style=_STYLES.get(each.phase, "cyan")), bar]
        row += [Text(_of(each)), Text(_rate(each.bytes_per_s)), Text(_steps(each)), Text(_ready(each))]
        row.append(Text(_so_far(each)))
        table.add_row(*row, *((Text(_balance(each, balance)),) if balance is not None else ()))
        links += [(rate, f"{peer} -> {each.rank}") for peer, rate in each.links.items() if rate]
        if each.problem:
            problems.append(Text(f"{name}: {each.problem}", style="red"))
    parts: list[RenderableType] = [table, *problems]
    if links:
        busiest = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        busiest.add_column("link")
        busiest.add_column("rate", justify="right")
        for rate, link in sorted(links, reverse=True)[:_MOST_LINKS]:
            busiest.add_row(link, _rate(rate))
        if len(links) > _MOST_LINKS:
            busiest.add_row(f"{len(links) - _MOST_LINKS} more", "")
        parts.append(busiest)
    return Group(*parts)


def line_of(snapshot: RankSnapshot, balance: Balance | None) -> str:
    """Return one rank as a line, for logs."""
    who = snapshot.source if snapshot.rank is None else f"rank {snapshot.rank}"
    parts = [f"{who} {snapshot.phase}"]
    if snapshot.problem:
        parts.append(snapshot.problem)
    if snapshot.bytes_to_receive is not None:
        parts.append(_of(snapshot))
    if snapshot.bytes_per_s:
        parts.append(_rate(snapshot.bytes_per_s))
    if snapshot.steps is not None:
        parts.append(f"{_steps(snapshot)} steps committed")
    if snapshot.ready_layers:
        parts.append(f"ready: layers {_ready(snapshot)}")
    if balance is not None and (text := _balance(snapshot, balance)):
        parts.append(f"max / mean load {text}")
    if snapshot.links:
        busy = {peer: rate for peer, rate in snapshot.links.items() if rate}
        parts += [f"{_rate(rate)} from rank {peer}" for peer, rate in sorted(busy.items())[:_MOST_LINKS]]
    if so_far := _so_far(snapshot):
        parts.append(f"{so_far} so far")
    return ", ".join(parts)


def _of(snapshot: RankSnapshot) -> str:
    if snapshot.bytes_to_receive is None:
        return ""
    return f"{format_bytes(snapshot.bytes_received)} of {format_bytes(snapshot.bytes_to_receive)}"


def _rate(bytes_per_s: float | None) -> str:
    return "" if bytes_per_s is None else f"{format_bytes(int(bytes_per_s))}/s"


def _steps(snapshot: RankSnapshot) -> str:
    return "" if snapshot.steps is None else f"{snapshot.steps_committed} of {snapshot.steps}"


def _ready(snapshot: RankSnapshot) -> str:
    layers = snapshot.ready_layers or ()
    more = len(layers) - _MOST_LAYERS
    return " ".join(map(str, layers[:_MOST_LAYERS])) + (f" and {more} more" if more > 0 else "")


def _balance(snapshot: RankSnapshot, balance: Balance) -> str:
    found = balance.of(snapshot) or {}
    return " -> ".join(f"{found[when]:.3f}" for when in ("before", "now", "after") if when in found)


def _so_far(snapshot: RankSnapshot) -> str:
    """Return how many rearrangements have ended, where the source counts them."""
    if snapshot.rearrangements is None:
        return ""
    return f"{snapshot.rearrangements} finished" + (f", {snapshot.failures} failed" if snapshot.failures else "")
