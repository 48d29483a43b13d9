"""In which order the copies of one rank have to run, so that no slot is overwritten before it was read.

Every copy reads what its source held at the beginning of its *part* (the moves of one layer that a step performs).
Chains of copies are put in order; only a cycle needs one save into the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eplb_core.arrays import IntArray


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
    saved = np.zeros(len(dst), dtype=np.bool_)
    if not len(dst):
        return CopyOrder(np.ones(0, dtype=np.int64), saved)
    overwriter = np.full(1 + max(int(dst.max()), int(src.max())), -1, dtype=np.int64)
    overwriter[dst] = np.arange(len(dst))
    holds_up = np.where(src >= 0, overwriter[src], -1)  # the copy that has to wait for this one
    on_cycle = _on_cycles(holds_up)
    if len(on_cycle):
        saved[_one_of_each_cycle(on_cycle, holds_up)] = True
        holds_up[saved] = -1  # a saved source may be overwritten at once
    return CopyOrder(_levels(holds_up), saved)


def _on_cycles(holds_up: IntArray) -> IntArray:
    """Return the copies that wait for themselves, ascending: where walks end that take as many steps as there are."""
    waits = np.zeros(len(holds_up) + 1, dtype=np.bool_)  # the last one answers for -1
    waits[holds_up] = True
    between = np.flatnonzero((holds_up >= 0) & waits[:-1])
    end = len(between)
    number = np.full(len(holds_up), end)
    number[between] = np.arange(end)
    jump = np.append(number[holds_up[between]], end)
    for _ in range(end.bit_length()):
        jump = jump[jump]
    reached = np.zeros(end + 1, dtype=np.bool_)
    reached[jump] = True
    return between[reached[:end]]


def _levels(holds_up: IntArray) -> IntArray:
    """Return by how many copies each one is preceded at most, itself included, without cycles.

    Copies tell the one that is 1, 2, 4 and so on steps ahead. So chains take as many rounds as their length has digits.
    """
    level = np.ones(len(holds_up), dtype=np.int64)
    ahead = holds_up.copy()
    telling = np.flatnonzero(ahead >= 0)
    distance = 1
    while len(telling):
        told = ahead[telling]
        np.maximum.at(level, told, level[telling] + distance)
        ahead[telling] = ahead[told]
        telling = telling[ahead[telling] >= 0]
        distance *= 2
    return level


def _one_of_each_cycle(members: IntArray, successor: IntArray) -> IntArray:
    """Return the smallest member of each cycle of the permutation `successor` of `members`."""
    smallest = np.arange(len(successor))
    jump = successor.copy()
    for _ in range(len(members).bit_length()):
        smallest[members] = np.minimum(smallest[members], smallest[jump[members]])
        jump[members] = jump[jump[members]]
    representative: IntArray = members[smallest[members] == members]
    return representative
