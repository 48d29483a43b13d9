"""Progress bars by bytes, for stages that several ranks run in parallel."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


class StageBars:
    """One bar per stage, with the bytes of all ranks together. Shows nothing without a terminal.

    Args:
        console: where to draw.
        titles: stage -> its title.
        num_ranks: how many ranks work.
        heard_ranks: how many of them report; the others are assumed to progress equally.
    """

    def __init__(self, console: Console, titles: Mapping[str, str], num_ranks: int, heard_ranks: int) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TransferSpeedColumn,
        )

        self._titles = titles
        self._num_ranks = num_ranks
        self._heard_ranks = heard_ranks
        self._bytes: dict[str, dict[int, tuple[int, int]]] = {}
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def update(self, rank: int, stage: str, done: int, total: int) -> None:
        """Record how many bytes of a stage a rank has done."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(self._titles[stage], total=None)
        ranks = self._bytes.setdefault(stage, {})
        ranks[rank] = (done, total)
        factor = self._num_ranks // self._heard_ranks
        # The total is known once every rank has reported; until then the bar only shows activity.
        known = sum(each for _, each in ranks.values()) * factor if len(ranks) == self._heard_ranks else None
        self._progress.update(
            self._tasks[stage], completed=sum(each for each, _ in ranks.values()) * factor, total=known
        )

    def done(self, stage: str) -> int:
        """Return the bytes of a stage that are done, all ranks together as far as they report."""
        return sum(done for done, _ in self._bytes.get(stage, {}).values()) * (self._num_ranks // self._heard_ranks)

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bars."""
        self._progress.stop()
