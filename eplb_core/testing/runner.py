"""Runs checks in real processes and gathers what became of them.

Starting processes and process groups costs more than most checks, so one set of processes runs many checks, of several
subjects if there are. A check that hangs or crashes takes its processes with it; the ones behind it go on in new ones.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from eplb_core.errors import EplbError, InputError
from eplb_core.launch.local_ranks import Outcome, collect_local_ranks
from eplb_core.registry.config import parse_config
from eplb_core.registry.registry import Registry
from eplb_core.testing.catalogue import all_checks
from eplb_core.testing.check import BrokenPromiseError, Check, Place, SkippedError
from eplb_core.testing.in_rank import Closed, Closing, Ended, Failed, Step, perform, stacks_file
from eplb_core.testing.report import Report, Result, Status
from eplb_core.testing.subject import Subject
from eplb_core.words import ranks_text

_MOST_RESTARTS = 3  # of one subject; each costs a deadline
_GRACE_S = 3.0  # once a rank has ended early, for the deadlines of the others
_KILL_GRACE_S = 25.0  # the survivors' own deadlines come first
_START_S = 60.0
_ENVIRONMENT = {
    # torch looks up the name of every address that a store connects to. Where a name server drops one question in a
    # hundred, that costs five seconds each time, which is more than the timeouts that are checked.
    "RES_OPTIONS": "timeout:1 attempts:1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # timeouts are provoked here, and nobody has to be warned of them
}
_CLOSE_CHECK = "closing_returns"


def run_conformance(
    subjects: Sequence[Subject],
    ranks: int,
    checks: Sequence[Check] | None = None,
    *,
    on_result: Callable[[Result], None] | None = None,
) -> Report:
    """Run checks of one or more subjects with `ranks` local processes.

    Args:
        subjects: what is checked; each in turn, in the same processes.
        ranks: the number of ranks, at least 2.
        checks: which checks; None means all but the thorough ones.
        on_result: told of each result as soon as it is final.

    Raises:
        InputError: there is nothing to check, or fewer than 2 ranks.
    """
    chosen = checks if checks is not None else all_checks(thorough=False)
    return run_steps([Step(subject, check) for subject in subjects for check in chosen], ranks, on_result=on_result)


def run_steps(steps: Sequence[Step], ranks: int, *, on_result: Callable[[Result], None] | None = None) -> Report:
    """As `run_conformance`, with other checks for each subject; those of one subject follow one another.

    Raises:
        InputError: as `run_conformance`.
    """
    if not steps:
        raise InputError("there is nothing to check", why="no check, or no backend, was named")
    if ranks < 2:
        raise InputError("a transfer takes 2 ranks", why=f"{ranks} was given")
    run = _Run(ranks, on_result)
    shared: list[Step] = []
    alone: list[Step] = []
    unfit = {subject: _why_not_at_all(subject, ranks) for subject in {step.subject for step in steps}}
    for step in steps:
        reason = unfit[step.subject] or _why_not(step.subject, step.check, ranks)
        if reason:
            run.finish(step, Status.SKIPPED, reason)
        elif step.check.place is Place.INSTALLED:
            run.look_at(step)
        else:
            (alone if step.check.kills else shared).append(step)
    run.launch_all(shared)
    for step in alone:
        run.launch_all([step])
    return run.report(steps)


@dataclass(slots=True)
class _Rank:
    """What one rank has told."""

    ended: dict[int, Ended] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    closing: int | None = None
    close_problems: dict[int, str] = field(default_factory=dict)

    def hear(self, event: Any) -> None:
        """Take one event."""
        if isinstance(event, Ended):
            self.ended[event.step] = event
        elif isinstance(event, Failed):
            self.failed[event.step] = event.detail
        elif isinstance(event, Closing):
            self.closing = event.step
        elif isinstance(event, Closed):
            self.closing = None
            if event.problem:
                self.close_problems[event.step] = event.problem


class _Run:
    """The results so far."""

    def __init__(self, ranks: int, on_result: Callable[[Result], None] | None) -> None:
        self._ranks = ranks
        self._on_result = on_result
        self._results: dict[tuple[Subject, str], Result] = {}
        self._restarts: Counter[Subject] = Counter()
        self._never_closes: set[Subject] = set()

    def report(self, steps: Sequence[Step]) -> Report:
        """Return the results in the order in which they were asked for; behind them what else was found."""
        asked = [(step.subject, step.check.name) for step in steps]
        return Report([self._results[key] for key in dict.fromkeys([*asked, *self._results])])

    def finish(self, step: Step, status: Status, detail: str = "", seconds: float = 0.0) -> None:
        """Note a result; a failure is not taken back."""
        key = (step.subject, step.check.name)
        before = self._results.get(key)
        if before is not None and before.status is Status.FAILED:
            return
        check = step.check
        text = detail.strip()
        result = Result(step.subject, self._ranks, check.name, check.promise, status, text, seconds, check.page)
        self._results[key] = result
        if self._on_result is not None:
            self._on_result(result)

    def look_at(self, step: Step) -> None:
        """Run a check that needs no ranks."""
        began = time.monotonic()
        status, detail = Status.PASSED, ""
        try:
            step.check.function(step.subject)
        except SkippedError as reason:
            status, detail = Status.SKIPPED, str(reason)
        except (BrokenPromiseError, EplbError) as error:
            status, detail = Status.FAILED, str(error)
        except Exception:  # noqa: BLE001 - whatever a stranger's spec raises is what the check has found
            status, detail = Status.FAILED, traceback.format_exc()
        self.finish(step, status, detail, time.monotonic() - began)

    def launch_all(self, steps: Sequence[Step]) -> None:
        """Run steps in one set of processes, and in further ones where a step takes its processes with it."""
        left = list(steps)
        while left:
            left = self._launch(left)
            for step in left:
                if self._restarts[step.subject] > _MOST_RESTARTS:
                    self.finish(step, Status.NOT_RUN, "too many checks before it hung or crashed")
            left = [step for step in left if self._restarts[step.subject] <= _MOST_RESTARTS]

    def _launch(self, steps: Sequence[Step]) -> list[Step]:
        """Run one set of processes; return the steps that it did not come to."""
        told = [_Rank() for _ in range(self._ranks)]
        kills = any(step.check.kills for step in steps)
        noted = 0

        def note_what_is_final() -> None:
            nonlocal noted
            while noted < len(steps) and all(noted in rank.ended for rank in told):
                if steps[noted].check.place is not Place.EXIT:
                    self._note(steps[noted], noted, told)
                noted += 1

        def hear(rank: int, event: Any) -> None:
            told[rank].hear(event)
            note_what_is_final()

        with tempfile.TemporaryDirectory() as folder, _quiet_environment():
            outcomes = collect_local_ranks(
                perform,
                self._ranks,
                (list(steps), list(self._never_closes), folder),
                timeout_s=_START_S + sum(step.check.deadline_s + 15 for step in steps),
                on_event=hear,
                grace_s=_KILL_GRACE_S if kills else _GRACE_S,
            )
            stacks = []
            for rank in range(self._ranks):
                with contextlib.suppress(FileNotFoundError):
                    stacks.append(stacks_file(folder, rank).read_text(encoding="utf-8", errors="replace"))
        for number, problem in (item for each in told for item in each.close_problems.items()):
            self._blame_close(steps[number], problem)
        if kills:
            self._note_survivors(steps[0], told, outcomes, stacks)
            return []
        if noted == len(steps) and not any(rank.closing is not None for rank in told):
            self._note_exits([step for step in steps if step.check.place is Place.EXIT], outcomes)
            return []
        # A rank that ended a step but not its closing was stopped there, and the step itself is not to blame.
        how = _how_it_ended(outcomes, stacks, [rank.failed.get(noted, "") for rank in told])
        closing = next((rank.closing for rank in told if rank.closing is not None and rank.closing < noted), None)
        if closing is not None and noted and closing >= noted - 1:
            self._blame_close(steps[closing], f"close() did not return.\n{how}")
            self._never_closes.add(steps[closing].subject)
            culprit = closing
        else:
            culprit = noted
            self.finish(steps[culprit], Status.FAILED, how)
            if steps[culprit].check.name == _CLOSE_CHECK:
                self._never_closes.add(steps[culprit].subject)
        self._restarts[steps[culprit].subject] += 1
        # Whether the processes end in order is seen only in a set that comes to its end.
        again = [step for step in steps[: culprit + 1] if step.check.place is Place.EXIT]
        again = [step for step in again if (step.subject, step.check.name) not in self._results]
        return [*again, *steps[culprit + 1 :]]

    def _note(self, step: Step, number: int, told: Sequence[_Rank]) -> None:
        ended = [rank.ended[number] for rank in told]
        seconds = max(each.seconds for each in ended)
        for status in (Status.FAILED, Status.SKIPPED):
            details = {rank: each.detail for rank, each in enumerate(ended) if each.status is status}
            if details:
                self.finish(
                    step, status, _by_rank(details) if status is Status.FAILED else details.popitem()[1], seconds
                )
                return
        self.finish(step, Status.PASSED, "", seconds)

    def _note_survivors(
        self, step: Step, told: Sequence[_Rank], outcomes: Sequence[Outcome], stacks: Sequence[str]
    ) -> None:
        survivors = told[:-1]
        if all(0 in rank.ended for rank in survivors):
            self._note(step, 0, survivors)
        else:
            self.finish(
                step, Status.FAILED, _how_it_ended(outcomes[:-1], stacks, [rank.failed.get(0, "") for rank in told])
            )

    def _note_exits(self, steps: Sequence[Step], outcomes: Sequence[Outcome]) -> None:
        wrong = {outcome.rank: _exit_words(outcome) for outcome in outcomes if outcome.exit_code != 0 or outcome.error}
        for step in steps:
            self.finish(step, Status.FAILED if wrong else Status.PASSED, _by_rank(wrong))

    def _blame_close(self, step: Step, problem: str) -> None:
        check = next(check for check in all_checks() if check.name == _CLOSE_CHECK)
        self.finish(Step(step.subject, check), Status.FAILED, f"after {step.check.name}: {problem}")


@contextlib.contextmanager
def _quiet_environment() -> Iterator[None]:
    """Have processes that are started inside the block inherit `_ENVIRONMENT`, where the user has not set it."""
    ours = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _why_not_at_all(subject: Subject, ranks: int) -> str:
    if subject.max_ranks is not None and ranks > subject.max_ranks:
        return f"it connects {subject.max_ranks} ranks at most"
    if subject.device == "cuda":
        count = torch.cuda.device_count()
        if not count:
            return "there is no CUDA device"
        spec = Registry().select(parse_config(subject.config)).spec
        if spec is not None and spec.capabilities.device_group and count < ranks:
            return f"it needs a device process group, and there are {count} devices for {ranks} ranks"
    return ""


def _why_not(subject: Subject, check: Check, ranks: int) -> str:
    if ranks < check.least_ranks:
        return f"it takes {check.least_ranks} ranks"
    for need in check.needs:
        if need == "cuda" and subject.device != "cuda":
            return "there are no streams on the CPU"
        if need != "cuda" and not getattr(subject, need):
            return f"the backend is not declared to be able to ({need})"
    return ""


def _how_it_ended(outcomes: Sequence[Outcome], stacks: Sequence[str], failures: Sequence[str]) -> str:
    """Say of each rank what it saw, else how it ended and where it was if it was cut."""
    words = {}
    for outcome in outcomes:
        if failures[outcome.rank]:
            words[outcome.rank] = failures[outcome.rank]
            continue
        stack = stacks[outcome.rank] if outcome.rank < len(stacks) else ""
        words[outcome.rank] = f"it did not come to an end; it was at\n{stack}" if stack else _exit_words(outcome)
    return _by_rank(words)


def _exit_words(outcome: Outcome) -> str:
    if outcome.error:
        return outcome.trace or f"{outcome.error}: {outcome.message}"
    if outcome.exit_code is not None and outcome.exit_code < 0:
        return f"it was killed by {signal.Signals(-outcome.exit_code).name}"
    if outcome.exit_code is None:
        return outcome.message or "it did not exit and was killed"
    return f"it exited with {outcome.exit_code}"


def _by_rank(details: dict[int, str]) -> str:
    """Join what ranks say; what several say alike is written once."""
    ranks: dict[str, list[int]] = {}
    for rank, detail in details.items():
        ranks.setdefault(detail.strip(), []).append(rank)
    return "\n".join(f"{ranks_text(who)}: {detail}" for detail, who in ranks.items())
