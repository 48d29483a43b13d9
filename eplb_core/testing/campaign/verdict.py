"""What is wrong with a trial, given what every process said of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from eplb_core.planning.placement import EMPTY
from eplb_core.testing.campaign.episode import Episode
from eplb_core.testing.campaign.member import PATIENCE_S, Told
from eplb_core.testing.campaign.plan import Trial

PROMISES = ("bytes", "one placement", "named", "in time", "next", "ended")
"""What is looked at: no wrong byte; no two placements; errors of eplb that name who failed; none later than the timeout
and 2 s; the next rearrangement is right; every process ends as it should, and nothing is left."""

_STALLED = 0.25  # of the timeout: what a machine takes away before a failure without a fault is its own


@dataclass(slots=True)
class Verdict:
    """What came of one trial.

    Attributes:
        trial: it.
        failed_on: how many ranks raised.
        struck: whether its fault came before the rearrangement had ended.
        problems: promise -> what was seen instead.
        stalled: whether the machine took so much time away that deadlines say nothing.
    """

    trial: Trial
    failed_on: int = 0
    struck: bool = False
    stalled: bool = False
    problems: list[tuple[str, str]] = field(default_factory=list)


def judge(episode: Episode, timeout_s: float) -> list[Verdict]:
    """Return a verdict of each trial that was begun; the last one has what became of the processes."""
    verdicts: list[Verdict] = []
    for trial in episode.trials:
        verdict = Verdict(trial)
        killed = {fault.victim for fault in trial.faults if fault.kind == "kill"}
        expected = [process for process in trial.members if process not in killed]
        told = episode.told.get(trial.number, {})
        for victim in killed:
            code = episode.outcomes[victim].exit_code
            if code != -signal.SIGKILL and len(told) == len(expected):
                verdict.problems.append(("ended", f"process {victim} was to be killed and ended with {code}"))
        missing = [process for process in expected if process not in told]
        if missing:
            ends = "; ".join(f"process {p}: {_end(episode, p)}" for p in missing)
            verdict.problems.append(("ended", f"told nothing: {ends}"))
            return [*verdicts, verdict]
        verdict.problems += _of_trial(trial, told, timeout_s, verdict, trial.number in episode.too_late)
        verdicts.append(verdict)
        following = episode.following.get(trial.number, {})
        lost = [process for process in trial.remaining if process not in following]
        if lost:
            ends = "; ".join(f"process {p}: {_end(episode, p)}" for p in lost)
            verdict.problems.append(("next", f"it did not come to an end: {ends}"))
            return verdicts
        for process, after in following.items():
            if after.wrong:
                verdict.problems.append(("next", f"process {process}: slots {after.wrong} are wrong"))
            if after.wrong_later:
                verdict.problems.append(("bytes", f"process {process}: slots {after.wrong_later} changed later"))
    bad = [
        f"process {p}: {_end(episode, p)}" for p in episode.trials[-1].remaining if episode.outcomes[p].exit_code != 0
    ]
    verdicts[-1].problems += [("ended", text) for text in bad]
    verdicts[-1].problems += [("ended", f"left behind: {what}") for what in episode.left_behind]
    return verdicts


def _of_trial(
    trial: Trial, told: dict[int, Told], timeout_s: float, verdict: Verdict, came_too_late: bool
) -> Iterator[tuple[str, str]]:
    verdict.failed_on = sum(bool(said.kind) for said in told.values())
    killed = any(fault.kind == "kill" for fault in trial.faults) and not came_too_late
    verdict.struck = killed or any(said.struck for said in told.values())
    stalled_s = max(said.stalled_s for said in told.values())
    verdict.stalled = stalled_s > _STALLED * timeout_s
    for process, said in told.items():
        if said.wrong:
            yield "bytes", f"process {process}: slots {said.wrong} do not hold what it says; {said.kind}"
    yield from _different(trial, told)
    victims = [process for process in trial.victims if process in trial.members]
    ranks = {trial.members.index(process) for process in victims}
    harmless = all(fault.kind in ("none", "slow") for fault in trial.faults)
    others = {process: said for process, said in told.items() if process not in victims}
    for process, said in told.items():
        if not said.own:
            yield "named", f"process {process}: a foreign error, {said.kind}: {said.error}"
    for process, said in others.items():
        if said.kind and harmless and not verdict.stalled:
            yield "named", f"process {process} failed though nothing happened: {said.kind}: {said.error}"
        elif (
            said.kind
            and not harmless
            and not ranks & set(said.blamed)
            and not _names_store(trial, said)
            and not verdict.stalled
        ):
            yield (
                "named",
                f"process {process} names {said.blamed}, not any of {sorted(ranks)}: {said.kind}: {said.error}",
            )
        allowed_s = timeout_s + PATIENCE_S + said.usual_s + said.stalled_s
        if said.seconds > allowed_s:
            took = f"{said.seconds:.1f} s, {said.stalled_s:.1f} s of them stalls"
            yield "in time", f"process {process}: {took}: {said.kind}: {said.error}"
    if not trial.loses_store and len({bool(said.kind) for said in others.values()}) > 1:
        kinds = {process: said.kind or "went on" for process, said in others.items()}
        yield "one placement", f"some failed and some did not: {kinds}"


def _different(trial: Trial, told: dict[int, Told]) -> Iterator[tuple[str, str]]:
    """Yield where ranks say different things of the slots. A store that is gone leaves some of them not knowing."""
    said = np.stack([each.placement for each in told.values()])
    if trial.loses_store:
        most = said.max(axis=0)
        different = ((said != most) & (said != EMPTY)).any(axis=0)
    else:
        different = (said != said[0]).any(axis=0)
    if different.any():
        layer, slot = np.argwhere(different)[0].tolist()
        words = {process: int(each.placement[layer, slot]) for process, each in told.items()}
        kinds = {process: each.kind for process, each in told.items()}
        yield "one placement", f"{int(different.sum())} slots differ, as layer {layer} slot {slot}: {words}; {kinds}"


def _names_store(trial: Trial, said: Told) -> bool:
    return trial.loses_store and "store" in said.error


def _end(episode: Episode, process: int) -> str:
    outcome = episode.outcomes[process]
    return f"exit code {outcome.exit_code}, {outcome.message}\n{outcome.trace}".strip()
