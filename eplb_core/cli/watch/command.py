"""`eplb watch`: what rearrangements of other processes are doing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eplb_core.cli.output import EXIT_PROBLEM, human_console, write_json
from eplb_core.cli.watch.snapshot import FINAL, RankSnapshot
from eplb_core.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_core.cli.watch.balance import Balance
    from eplb_core.cli.watch.endpoint import Endpoint
    from eplb_core.cli.watch.status_file import StatusFile

_SHORTEST_INTERVAL_S = 0.05


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--interval", default=0.5, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Look once, and end.")
@click.option("--loads", type=click.Path(path_type=Path), help="Recorded loads: show the imbalance too.")
@click.option("--old", type=click.Path(path_type=Path), help="For endpoints, with --loads: the placement before.")
@click.option("--new", type=click.Path(path_type=Path), help="For endpoints, with --loads: the placement after.")
@click.option("--ranks", type=int, help="Ranks that share the slots.  [default: as the sources or files say]")
@click.option("--json", "json_path", metavar="FILE", help="Write what was seen last as JSON; - is standard output.")
def watch(
    sources: tuple[str, ...],
    interval: float,
    once: bool,
    loads: Path | None,
    old: Path | None,
    new: Path | None,
    ranks: int | None,
    json_path: str | None,
) -> int:
    """Show what rearrangements are doing, until they have ended or Ctrl-C.

    A SOURCE is the address of eplb-prometheus (http://HOST:PORT/metrics, or HOST:PORT), or a file with what
    RearrangeJob.status() returns, one for each rank. On a terminal the view is live; elsewhere each change is a line.

    Ends with 0, also at Ctrl-C, or with 1 if a job in a status file failed.
    """
    from eplb_core.cli.watch.balance import Balance

    if not interval >= _SHORTEST_INTERVAL_S:
        raise InputError(f"--interval is {interval:g}", why=f"it must be at least {_SHORTEST_INTERVAL_S:g} seconds")
    if (old is None) != (new is None) or (old is not None and loads is None):
        raise InputError("--old and --new go together, and need --loads")
    watched = [_open(source) for source in sources]
    balance = None if loads is None else Balance(loads, ranks, old, new)
    console = human_console(json_path)
    seen: list[RankSnapshot] = []

    def look() -> list[RankSnapshot]:
        nonlocal seen
        seen = [snapshot for source in watched for snapshot in source.look()]
        return seen

    try:
        if console.is_terminal and not once:
            _show_live(look, interval, balance, console)
        else:
            _show_lines(look, None if once else interval, balance, console)
    except KeyboardInterrupt:  # the usual end
        pass
    if json_path is not None:
        write_json(_document(seen, balance), json_path, "watch/1")
    return EXIT_PROBLEM if any(each.phase == "failed" for each in seen) else 0


def _open(source: str) -> Endpoint | StatusFile:
    """Return what reads a source."""
    host, _, port = source.partition(":")
    if source.startswith(("http://", "https://")):
        url = source
    elif host and port.partition("/")[0].isdecimal() and not Path(source).exists():
        url = f"http://{source}" + ("" if "/" in port else "/metrics")
    else:
        from eplb_core.cli.watch.status_file import StatusFile

        return StatusFile(Path(source))
    from eplb_core.cli.watch.endpoint import Endpoint
    from eplb_core.extras import require

    require("watch", "eplb watch, with an endpoint,")
    return Endpoint(url)


def _ended(seen: Sequence[RankSnapshot]) -> bool:
    return bool(seen) and all(each.phase in FINAL for each in seen)


def _show_live(look: Any, interval: float, balance: Balance | None, console: Console) -> None:
    from rich.live import Live

    from eplb_core.cli.watch.view import drawn

    with Live(drawn(look(), balance), console=console, auto_refresh=False) as live:
        while True:
            seen = look()
            live.update(drawn(seen, balance), refresh=True)
            if _ended(seen):
                return
            time.sleep(interval)


def _show_lines(look: Any, interval: float | None, balance: Balance | None, console: Console) -> None:
    from eplb_core.cli.watch.view import line_of

    last: dict[tuple[str, int | None, str], str] = {}
    while True:
        seen = look()
        for snapshot in seen:
            key, line = (snapshot.source, snapshot.rank, snapshot.backend), line_of(snapshot, balance)
            if last.get(key) != line:
                last[key] = line
                console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False, soft_wrap=True)
        if interval is None or _ended(seen):
            return
        console.file.flush()
        time.sleep(interval)


def _document(seen: Sequence[RankSnapshot], balance: Balance | None) -> dict[str, Any]:
    ranks = []
    for snapshot in seen:
        imbalance = None if balance is None else balance.of(snapshot)
        ranks.append({**snapshot.document(), "imbalance": imbalance})
    return {"ranks": ranks}
