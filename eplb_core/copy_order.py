"""In which order the copies of one rank have to run, so that no slot is overwritten before it was read.

Every copy reads what its source held at the beginning of its *part* (the moves of one layer that a step performs).
Chains of copies are put in order; only a cycle needs one save into the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eplb_core.placement import IntArray


@dataclass(frozen=True, slots=True)
class CopyOrder:
    """The order of copies.

    Attributes:
        level: int64 `[M]`, from 1; a copy runs after all copies of smaller levels of its rank.
        saved: bool `[M]`, whether the copy's source slot is saved into the window at level 0, and read from there.
    """

    level: IntArray
    saved: npt.NDArray[np.bool_]


def order_copies(dst: IntArray, src: IntArray) -> CopyOrder:
    """Order copies so that each reads its source before another copy overwrites it.

    Each slot is read by any number of copies, but overwritten by at most one. So a copy has to wait for the readers of
    the slot that it overwrites, and holds up at most one other copy: what cannot be ordered are simple cycles.

    Args:
        dst: `[M]`, the slots that are overwritten, as distinct numbers from 0.
        src: `[M]`, the slots that are read, numbered like `dst`; -1 where the bytes come out of the window.

    Returns:
        The levels, as small as possible, with one save for each cycle.
    """
    level = np.ones(len(dst), dtype=np.int64)
    saved = np.zeros(len(dst), dtype=np.bool_)
    if not len(dst):
        return CopyOrder(level, saved)
    overwriter = np.full(1 + max(int(dst.max()), int(src.max())), -1, dtype=np.int64)
    overwriter[dst] = np.arange(len(dst))
    holds_up = np.where(src >= 0, overwriter[src], -1)  # the copy that has to wait for this one
    waits_for = np.bincount(holds_up[holds_up >= 0], minlength=len(dst))
    _release(np.flatnonzero(waits_for == 0), holds_up, waits_for, level)

    on_cycle = np.flatnonzero(waits_for > 0)
    if len(on_cycle):
        saved[_one_of_each_cycle(on_cycle, holds_up)] = True
        # A saved source may be overwritten at once: its overwriter waits for nothing on the cycle any more.
        freed = holds_up[saved]
        holds_up[saved] = -1
        waits_for[freed] -= 1
        _release(freed, holds_up, waits_for, level)
    return CopyOrder(level, saved)


def _release(ready: IntArray, holds_up: IntArray, waits_for: IntArray, level: IntArray) -> None:
    """Set the levels of all copies that can follow, one after the other, once those in `ready` have their level."""
    any_of = np.empty(len(level), dtype=np.int64)
    while len(ready):
        holding = ready[holds_up[ready] >= 0]
        following = holds_up[holding]
        np.maximum.at(level, following, level[holding] + 1)
        np.subtract.at(waits_for, following, 1)
        ready = following[waits_for[following] == 0]
        any_of[ready] = np.arange(len(ready))
        ready = ready[any_of[ready] == np.arange(len(ready))]  # each once


def _one_of_each_cycle(members: IntArray, successor: IntArray) -> IntArray:
    """Return the smallest member of each cycle of the permutation `successor` of `members`."""
    smallest = np.arange(len(successor))
    jump = successor.copy()
    for _ in range(len(members).bit_length()):
        smallest[members] = np.minimum(smallest[members], smallest[jump[members]])
        jump[members] = jump[jump[members]]
    representative: IntArray = members[smallest[members] == members]
    return representative
