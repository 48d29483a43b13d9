"""What became of every check, for people and for machines."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from eplb_core.testing.subject import Subject


class Status(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    NOT_RUN = "not run"
    """Too many checks before it had hung or crashed."""


@dataclass(frozen=True, slots=True)
class Result:
    """One check of one subject.

    Attributes:
        subject: what was checked.
        ranks: with how many ranks.
        check: the check's name.
        promise: what it stands for, in one line.
        status: how it ended.
        detail: why it failed or was skipped: tracebacks by rank, or stack dumps.
        seconds: how long it took; 0 if it did not run.
        page: where the contract says so.
    """

    subject: Subject
    ranks: int
    check: str
    promise: str
    status: Status
    detail: str = ""
    seconds: float = 0.0
    page: str = ""


@dataclass(slots=True)
class Report:
    """The results of a run, in the order in which the checks are listed."""

    results: list[Result] = field(default_factory=list)

    def __iter__(self) -> Iterator[Result]:
        """Iterate over the results."""
        return iter(self.results)

    @property
    def conforms(self) -> bool:
        """Whether something was checked and nothing failed."""
        counts = self.counts
        return counts[Status.PASSED] > 0 and not counts[Status.FAILED] and not counts[Status.NOT_RUN]

    @property
    def counts(self) -> Counter[Status]:
        """Number of results of each status."""
        return Counter(result.status for result in self.results)

    def of(self, check: str, config: str | None = None) -> Result:
        """Return the result of one check, of one config string if there are several.

        Raises:
            KeyError: there is none.
        """
        for result in self.results:
            if result.check == check and config in (None, result.subject.config):
                return result
        raise KeyError(check)

    def document(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return {
            "conforms": self.conforms,
            "counts": {str(status): count for status, count in sorted(self.counts.items())},
            "results": [
                {
                    **dataclasses.asdict(result),
                    "subject": {**dataclasses.asdict(result.subject), "dtypes": list(result.subject.dtypes)},
                    "status": str(result.status),
                    "seconds": round(result.seconds, 4),
                }
                for result in self.results
            ],
        }
