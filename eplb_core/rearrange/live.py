"""Whether the slots hold what the placement says, asked at any time: what an operator runs when answers look wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from eplb_core.arrays import IntArray
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import HandshakeError
from eplb_core.planning.placement import EMPTY

_MOST_NAMED: Final = 8


@dataclass(frozen=True, slots=True)
class LiveCheck:
    """What `Rearranger.verify_live` found, the same on every rank.

    Attributes:
        slots: how many slots were looked at.
        unlike: `(layer, expert)` of each expert whose copies differ, sorted.
        wrong: `(layer, slot)` of each slot that does not hold the bytes of its expert that were remembered, sorted.
        remembered: whether there was something to compare with beside other copies (`Rearranger.remember`).
    """

    slots: int
    unlike: tuple[tuple[int, int], ...]
    wrong: tuple[tuple[int, int], ...]
    remembered: bool

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, as far as can be told."""
        return not self.unlike and not self.wrong

    def __str__(self) -> str:
        """Return it in one sentence."""
        compared = "copies and remembered bytes" if self.remembered else "copies"
        if self.ok:
            return f"{self.slots} slots are right ({compared} compared)"
        parts = []
        if self.wrong:
            parts.append(f"{len(self.wrong)} slots do not hold their expert: " + _named("slot", self.wrong))
        if self.unlike:
            parts.append(f"copies of {len(self.unlike)} experts differ: " + _named("expert", self.unlike))
        return "; ".join(parts)


def compare_live(
    control: ControlPlane,
    placement: IntArray,
    sums: IntArray,
    remembered: Mapping[tuple[int, int], int] | None,
    timeout_s: float,
) -> LiveCheck:
    """Compare the slots of all ranks with one another, and with what is remembered.

    Args:
        control: every rank calls this.
        placement: int64 `[layers, slots]`, the experts of this rank's slots, as it routes now.
        sums: int64 `[layers, slots]`, the checksums of this rank's slots.
        remembered: `(layer, expert)` -> checksum, the same on every rank, or None.
        timeout_s: how long to wait for the slowest rank, in seconds.

    Raises:
        ControlPlaneError: a rank did not come, or the store is gone.
        HandshakeError: another rank's answer has another size.
    """
    mine = np.stack([placement, sums])
    said = control.all_gather("what all slots hold", mine.tobytes(), timeout_s)
    if {len(part) for part in said} != {mine.nbytes}:
        raise HandshakeError("the ranks have different numbers of slots", table={})
    parts = [np.frombuffer(part, dtype=np.int64).reshape(mine.shape) for part in said]
    experts, everyone = np.concatenate(parts, axis=2)
    first: dict[tuple[int, int], int] = {}
    unlike: set[tuple[int, int]] = set()
    wrong: list[tuple[int, int]] = []
    held = np.argwhere(experts != EMPTY).tolist()
    for layer, slot in held:
        expert, held_sum = (layer, int(experts[layer, slot])), int(everyone[layer, slot])
        if first.setdefault(expert, held_sum) != held_sum:
            unlike.add(expert)
        if remembered is not None and remembered.get(expert, held_sum) != held_sum:
            wrong.append((layer, slot))
    return LiveCheck(len(held), tuple(sorted(unlike)), tuple(sorted(wrong)), remembered is not None)


def _named(what: str, places: tuple[tuple[int, int], ...]) -> str:
    named = ", ".join(f"{what} {number} of layer {layer}" for layer, number in places[:_MOST_NAMED])
    return named + (f" and {len(places) - _MOST_NAMED} more" if len(places) > _MOST_NAMED else "")
