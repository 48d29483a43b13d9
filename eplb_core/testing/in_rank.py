"""What runs in each rank: the steps one after the other, each cut by a deadline that dumps this rank's stacks."""

from __future__ import annotations

import faulthandler
import os
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from eplb_core.launch.local_ranks import RankEnvironment
from eplb_core.testing.check import BrokenPromiseError, Check, SkippedError
from eplb_core.testing.context import RankContext
from eplb_core.testing.report import Status
from eplb_core.testing.subject import Subject

_MEET_S = 60.0
_CLOSE_S = 10.0  # for closing what a check has left open


@dataclass(frozen=True, slots=True)
class Step:
    """One check of one subject."""

    subject: Subject
    check: Check


@dataclass(frozen=True, slots=True)
class Ended:
    """Told to the parent: this rank is through with a step, as are all others."""

    step: int
    status: Status
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """Told to the parent at once: this rank has failed the step. The others may hang because of it."""

    step: int
    detail: str


@dataclass(frozen=True, slots=True)
class Closing:
    """Told to the parent: this rank now closes what the step has left open."""

    step: int


@dataclass(frozen=True, slots=True)
class Closed:
    """Told to the parent: it is closed; `problem` is what was raised, or empty."""

    step: int
    problem: str


def stacks_file(folder: str, rank: int) -> Path:
    """Return where a rank writes its stacks when a deadline passes."""
    return Path(folder) / f"rank-{rank}-stacks.txt"


def perform(
    environment: RankEnvironment, steps: Sequence[Step], leave_open: Iterable[Subject], stacks_folder: str
) -> None:
    """Run every step in this rank and tell the parent what became of it.

    Args:
        environment: the rank.
        steps: the same on every rank; those of one subject follow one another.
        leave_open: subjects whose communicators are not closed, since closing is known to hang.
        stacks_folder: an existing folder.
    """
    open_subjects = set(leave_open)
    environment.init_process_group(_MEET_S)
    with stacks_file(stacks_folder, environment.rank).open("w", encoding="utf-8") as stacks:
        context: RankContext | None = None
        for number, step in enumerate(steps):
            if context is None or context.subject != step.subject:
                if context is not None:
                    _close(context, number - 1, stacks, finally_=True)
                context = RankContext(environment, step.subject, leave_open=step.subject in open_subjects)
            context.step = number
            faulthandler.dump_traceback_later(step.check.deadline_s, exit=True, file=stacks)
            began = time.monotonic()
            status, detail = _outcome(context, step.check)
            seconds = time.monotonic() - began
            failed_somewhere = status is Status.FAILED
            if failed_somewhere:
                environment.report(Failed(number, detail))
                environment.store.set(context.failure_key, "")
            if not step.check.kills:
                failed_somewhere = _meet(environment, number, failed_somewhere)
            environment.report(Ended(number, status, detail, seconds))
            if failed_somewhere:
                context.renew()
            _close(context, number, stacks, finally_=False)
        if context is not None:
            _close(context, len(steps) - 1, stacks, finally_=True)
        faulthandler.cancel_dump_traceback_later()
    if any(step.check.kills for step in steps):
        os._exit(0)  # process groups that a dead rank is a member of are not torn down in any order


def _outcome(context: RankContext, check: Check) -> tuple[Status, str]:
    try:
        check.function(context)
    except SkippedError as reason:
        return Status.SKIPPED, str(reason)
    except BrokenPromiseError as error:
        return Status.FAILED, _from_check_on(error)
    except BaseException:  # noqa: BLE001 - whatever it is, it is what the check has found
        return Status.FAILED, traceback.format_exc()
    return Status.PASSED, ""


def _from_check_on(error: BrokenPromiseError) -> str:
    """Return the message, and the lines of the check that led to it."""
    frames = traceback.extract_tb(error.__traceback__)[1:-1]
    where = "".join(f"\n  {Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}" for f in frames)
    return f"{error}{where}"


def _meet(environment: RankEnvironment, number: int, failed: bool) -> bool:
    """Wait for all ranks; return whether the step failed on any. The step's deadline still runs."""
    keys = [f"step {number} is over/{rank}" for rank in range(environment.world_size)]
    environment.store.set(keys[environment.rank], "failed" if failed else "passed")
    environment.store.wait(keys)
    return b"failed" in environment.store.multi_get(keys)


def _close(context: RankContext, number: int, stacks: TextIO, *, finally_: bool) -> None:
    faulthandler.dump_traceback_later(_CLOSE_S, exit=True, file=stacks)
    context.environment.report(Closing(number))
    problem = ""
    try:
        if finally_:
            context.finish()
        else:
            context.tidy()
    except (BrokenPromiseError, dist.DistError, RuntimeError) as error:
        problem = str(error)
    context.environment.report(Closed(number, problem))
