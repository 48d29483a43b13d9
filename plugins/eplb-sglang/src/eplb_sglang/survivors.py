"""Placements as the ranks that are alive see them, and which experts none of these holds any more.

SGLang keeps the slots of dead ranks in its placements: what it says of them is not to be believed, and nothing can be
put there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

EMPTY = -1
Placement = npt.NDArray[np.int64]


def columns(alive: Sequence[int], slots_per_rank: int) -> npt.NDArray[np.int64]:
    """Return the slots of these ranks, counted over all ranks."""
    return (np.asarray(alive, np.int64)[:, None] * slots_per_rank + np.arange(slots_per_rank)).reshape(-1)


def without_lost(old: Placement, new: Placement) -> tuple[Placement, Placement]:
    """Return `new` with -1 for each expert that no slot of `old` holds, and where that is.

    Args:
        old: `[layers, slots]` of the ranks that are alive.
        new: the same shape.

    Returns:
        The placement, and int64 `[lost, 3]`: layer, slot, expert, in that order.
    """
    reachable, lost = new.copy(), []
    for layer, (before, after) in enumerate(zip(old, new, strict=True)):
        for slot in np.flatnonzero((after != EMPTY) & ~np.isin(after, before)).tolist():
            reachable[layer, slot] = EMPTY
            lost.append((layer, slot, int(after[slot])))
    return reachable, np.array(lost, np.int64).reshape(-1, 3)


def every_expert_remains(before: Placement, after: Placement) -> bool:
    """Return whether each expert that a layer of `before` holds is held in that layer of `after` too."""
    return all(set(row[row != EMPTY].tolist()) <= set(now.tolist()) for row, now in zip(before, after, strict=True))
