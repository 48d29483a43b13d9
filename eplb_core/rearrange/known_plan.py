"""Plans and schedules of the last few rearrangements: what is asked for again need not be worked out again."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from eplb_core.arrays import IntArray
from eplb_core.planning.plan import RearrangementPlan
from eplb_core.scheduling.schedule import Step

_MOST_PLANS = 4
"""How many are kept: some MB each for large placements."""


@dataclass(slots=True, eq=False)
class KnownPlan:
    """A plan, and what was worked out of it.

    Attributes:
        plan: the plan.
        digests: of its old and its new placement; what ranks compare.
        changes: whether any slot changes, or is to be loaded.
        steps: what a schedule depends on -> the schedule.
        bytes_moved: bytes that cross between ranks, and that are copied on a rank; None before they are asked for.
    """

    plan: RearrangementPlan
    digests: tuple[bytes, bytes]
    changes: bool
    steps: dict[Hashable, list[Step]] = field(default_factory=dict)
    bytes_moved: tuple[int, int] | None = None

    @staticmethod
    def of(plan: RearrangementPlan) -> KnownPlan:
        """Return what is known of a plan that was just made."""
        return KnownPlan(
            plan, (_digest(plan.old), _digest(plan.new)), bool((plan.old != plan.new).any() or len(plan.lost))
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """What was asked for, and what came out."""

    old: npt.NDArray[np.generic]
    new: npt.NDArray[np.generic]
    how: Hashable
    known: KnownPlan


class KnownPlans:
    """The plans of the last few rearrangements of one rank."""

    def __init__(self) -> None:
        self._entries: deque[_Entry] = deque(maxlen=_MOST_PLANS)

    def find(
        self, old: npt.ArrayLike, new: npt.ArrayLike, how: Hashable, make: Callable[[], RearrangementPlan]
    ) -> KnownPlan:
        """Return the plan for two placements, made by `make` unless it is known.

        Args:
            old: as it was given.
            new: as it was given.
            how: everything else that the plan depends on.
            make: makes the plan. What it raises is not remembered.
        """
        asked = _integers(old), _integers(new)
        for entry in self._entries:
            if entry.how == how and _same(entry.old, asked[0]) and _same(entry.new, asked[1]):
                if entry is not self._entries[-1]:
                    self._entries.remove(entry)
                    self._entries.append(entry)
                return entry.known
        known = KnownPlan.of(make())
        if asked[0] is not None and asked[1] is not None:
            self._entries.append(_Entry(asked[0].copy(), asked[1].copy(), how, known))
        return known


def _integers(placement: npt.ArrayLike) -> npt.NDArray[np.generic] | None:
    """Return an array that a plan can be made of; None for what a plan refuses, or may refuse."""
    return placement if isinstance(placement, np.ndarray) and placement.dtype == np.int64 else None


def _same(kept: npt.NDArray[np.generic], asked: npt.NDArray[np.generic] | None) -> bool:
    return asked is not None and kept.shape == asked.shape and bool((kept == asked).all())


def _digest(placement: IntArray) -> bytes:
    return hashlib.sha256(placement.tobytes()).digest()
