"""What is tried: trials with faults, all of it from one seed, so that every process knows it without being told."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

KINDS: Final = {
    "none": "nothing happens",
    "slow": "a rank begins each of its transfers late",
    "kill": "a rank is killed",
    "stop": "a rank is stopped, and goes on when the others have given up",
    "zombie": "a rank is stopped, the others go on without it, and then it comes back",
    "interrupt": "Ctrl-C on one rank",
    "error": "the engine's own code raises on one rank",
    "store killed": "the process that hosts the store is killed",
    "store stopped": "the process that hosts the store is stopped",
}
"""Kind of fault -> what happens."""

LEAVING: Final = ("kill", "zombie")
"""The kinds whose victim is not in the next group."""

CODE: Final = ("transfer", "decide", "settle", "commit")
"""What a rank is about to do when its fault strikes, beside `time` (any moment) and `engine` (in the engine's code)."""

COMMITS: Final = ("wait", "as they come", "the last first", "cancelled")
"""How the engine commits the layers of a background job."""

_MOST_TRIALS = 8  # of one set of processes
_PAIRED = ("kill", "stop", "zombie", "interrupt", "error", "store killed", "store stopped")


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong on one rank.

    Attributes:
        kind: one of `KINDS`.
        victim: the process, numbered from 0. For a fault of the store, the one that brings it about.
        moment: `time`, `engine`, or what of `CODE` the victim is about to do.
        after: for `time` the fraction of a rearrangement's usual duration, else how often it may do so before.
    """

    kind: str
    victim: int
    moment: str
    after: float

    def __str__(self) -> str:
        """Return it in a few words."""
        if self.kind in ("none", "slow"):
            return self.kind if self.kind == "none" else f"slow process {self.victim}"
        when = f"at {self.after:.2f} of the usual time" if self.moment == "time" else f"{self.moment} {int(self.after)}"
        return f"{self.kind}, process {self.victim}, {when}"


@dataclass(frozen=True, slots=True)
class Trial:
    """One disturbed rearrangement.

    Attributes:
        number: its place among those of one set of processes.
        members: the processes that take part, sorted; their places are their ranks.
        faults: what goes wrong: one fault, or two at once on different processes.
        background: whether it runs as a job beside "inference".
        commits: how the engine commits then, one of `COMMITS`.
        in_place: whether experts are received into slots, where the backend can.
        window_experts: how many experts the window has room for.
    """

    number: int
    members: tuple[int, ...]
    faults: tuple[Fault, ...]
    background: bool
    commits: str
    in_place: bool
    window_experts: int

    @property
    def remaining(self) -> tuple[int, ...]:
        """The processes that are in the next group."""
        gone = {fault.victim for fault in self.faults if fault.kind in LEAVING}
        return tuple(process for process in self.members if process not in gone)

    @property
    def victims(self) -> tuple[int, ...]:
        """The processes that fail themselves, sorted."""
        return tuple(sorted(f.victim for f in self.faults if f.kind not in ("none", "slow") and not loses_store(f)))

    @property
    def loses_store(self) -> bool:
        """Whether the store of this trial fails."""
        return any(map(loses_store, self.faults))

    def fault_of(self, process: int) -> Fault | None:
        """Return what `process` suffers, or brings about."""
        return next((fault for fault in self.faults if fault.victim == process), None)

    def __str__(self) -> str:
        """Return what reproduces it, beside the seed."""
        how = f"background, committed: {self.commits}" if self.background else "run()"
        where = "in place" if self.in_place else "through the window"
        faults = " and ".join(map(str, self.faults))
        return f"trial {self.number}, {len(self.members)} ranks, {how}, {where}: {faults}"


def loses_store(fault: Fault) -> bool:
    """Return whether it is the store that fails."""
    return fault.kind.startswith("store")


def plan_trials(
    seed: int, ranks: int, kinds: Sequence[str] = tuple(KINDS), background: bool | None = None
) -> list[Trial]:
    """Return the trials of one set of processes, until too few of them are left.

    Args:
        seed: the same seed gives the same trials.
        ranks: how many processes there are at first.
        kinds: which faults, of `KINDS`.
        background: whether all trials are jobs, or none; None draws it each time.
    """
    chance = random.Random(f"{seed} {ranks}")
    members = tuple(range(ranks))
    trials: list[Trial] = []
    while len(members) > 1 and len(trials) < _MOST_TRIALS:
        beside = chance.random() < 0.45 if background is None else background
        trial = Trial(
            len(trials),
            members,
            _draw_faults(chance, members, kinds, beside),
            beside,
            chance.choice(COMMITS) if beside else "",
            chance.random() < 0.5,
            chance.choice((2, 4, 8)),
        )
        trials.append(trial)
        members = trial.remaining
    return trials


def _draw_faults(
    chance: random.Random, members: tuple[int, ...], kinds: Sequence[str], background: bool
) -> tuple[Fault, ...]:
    pairs = [kind for kind in kinds if kind in _PAIRED]
    two = len(members) > 2 and len(pairs) > 0 and chance.random() < 0.2
    victims = chance.sample(members, 2 if two else 1)
    drawn = [chance.choice(pairs) if two else chance.choice(list(kinds)) for _ in victims]
    if two and all(kind.startswith("store") for kind in drawn):
        victims, drawn = victims[:1], drawn[:1]  # there is one store
    return tuple(_draw(chance, kind, victim, background) for kind, victim in zip(drawn, victims, strict=True))


def _draw(chance: random.Random, kind: str, victim: int, background: bool) -> Fault:
    if kind == "error":
        # What runs in a job's thread is not the engine's.
        moment = chance.choice(["engine"] if background else ["engine", *CODE])
    else:
        moment = chance.choice(["time", "time", "engine", *CODE])
    # A usual rearrangement is verified too, which takes a third of the time; few have more than 8 steps.
    after = chance.uniform(0, 0.7) if moment == "time" else chance.randrange(8 if moment in CODE else 3)
    return Fault(kind, victim, moment, after)
