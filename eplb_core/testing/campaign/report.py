"""What a campaign has tried and found, as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from eplb_core.testing.campaign.episode import Episode
from eplb_core.testing.campaign.verdict import PROMISES, Verdict

_COLUMNS = ("trials", "struck", "failed", *PROMISES)


@dataclass(slots=True)
class Report:
    """All trials so far.

    Attributes:
        timeout_s: the communicators', in seconds.
        episodes: sets of processes, with the verdicts of their trials.
        seconds: how long it took.
    """

    timeout_s: float
    episodes: list[tuple[Episode, list[Verdict]]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def trials(self) -> int:
        """How many trials have been made."""
        return sum(len(verdicts) for _, verdicts in self.episodes)

    @property
    def problems(self) -> list[str]:
        """What was seen that must not be, each with what reproduces it."""
        return [line for episode, verdicts in self.episodes for line in problems_of(episode, verdicts, self.timeout_s)]

    def table(self) -> str:
        """Return a table of what was tried: a row for each kind of fault, each backend and each mode."""
        parts = []
        for title, key in _ROWS:
            rows: dict[str, Counter[str]] = {}
            for episode, verdicts in self.episodes:
                for verdict in verdicts:
                    for name in {*key(episode, verdict), "all"} if title == "fault" else key(episode, verdict):
                        rows.setdefault(name, Counter()).update(_counts(verdict))
            order = sorted(rows, key=lambda name: (name == "all", name))
            cells = [[title, *_COLUMNS], *([name, *(str(rows[name][c]) for c in _COLUMNS)] for name in order)]
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            parts += ["  ".join(_aligned(row, widths)).rstrip() for row in cells]
            parts.append("")
        return "\n".join(parts)

    def document(self) -> dict[str, Any]:
        """Return everything as plain data, for JSON."""
        return {
            "trials": self.trials,
            "seconds": round(self.seconds, 1),
            "timeout_s": self.timeout_s,
            "problems": self.problems,
            "episodes": [
                {
                    "backend": episode.config,
                    "seed": episode.seed,
                    "ranks": episode.ranks,
                    "seconds": round(episode.seconds, 1),
                    "left_behind": episode.left_behind,
                    "trials": [
                        {
                            "tried": str(verdict.trial),
                            "struck": verdict.struck,
                            "ranks_that_raised": verdict.failed_on,
                            "machine_stalled": verdict.stalled,
                            "raised": {
                                str(process): {"kind": said.kind, "seconds": round(said.seconds, 2)}
                                for process, said in episode.told.get(verdict.trial.number, {}).items()
                            },
                            "problems": [f"{promise}: {text}" for promise, text in verdict.problems],
                        }
                        for verdict in verdicts
                    ],
                    "log": episode.log if any(verdict.problems for verdict in verdicts) else "",
                }
                for episode, verdicts in self.episodes
            ],
        }


def problems_of(episode: Episode, verdicts: Sequence[Verdict], timeout_s: float) -> list[str]:
    """Return what is wrong with one set of processes; every line has what reproduces it."""
    again = f"--backend '{episode.config}' --seed {episode.seed} --ranks {episode.ranks} --timeout {timeout_s:g}"
    return [
        f"{promise}: {text}\n  {verdict.trial}\n  again: {again} --episodes 1"
        for verdict in verdicts
        for promise, text in verdict.problems
    ]


def _counts(verdict: Verdict) -> Counter[str]:
    broken = {promise for promise, _ in verdict.problems}
    return Counter(
        {"trials": 1, "struck": int(verdict.struck), "failed": int(verdict.failed_on > 0)}
        | {promise: int(promise in broken) for promise in PROMISES}
    )


def _kinds(_episode: Episode, verdict: Verdict) -> list[str]:
    kinds = [fault.kind for fault in verdict.trial.faults]
    return [kinds[0] if len(kinds) == 1 else "two at once"]


def _mode(_episode: Episode, verdict: Verdict) -> list[str]:
    return ["background" if verdict.trial.background else "run(), in place" if verdict.trial.in_place else "run()"]


_ROWS: tuple[tuple[str, Callable[[Episode, Verdict], list[str]]], ...] = (
    ("fault", _kinds),
    ("backend", lambda episode, _: [episode.config]),
    ("mode", _mode),
    ("ranks", lambda _, verdict: [str(len(verdict.trial.members))]),
)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if not place else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
