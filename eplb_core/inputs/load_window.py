"""Joins the steps of a long recording into a few, to keep its loads and their noise in little memory."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

MOST_STEPS = 64  # of 58 layers and 256 experts they take 8 MB
_PARTS = 1024  # a step is shared in such parts: a power of two, so that sums of whole counts stay exact everywhere


class LoadWindow:
    """Sums steps that arrive in order, joined into at most `MOST_STEPS` of equal weight.

    A policy takes the mean of the steps, and its uncertainty from their differences. Both are valid for joined steps
    too, if each stands for equally many. So if the number of steps does not divide evenly, or a later step counts more
    than the one before it, a step is shared between two joined ones.
    """

    def __init__(self, shape: tuple[int, ...], num_steps: int, decay: float = 1.0) -> None:
        """Prepare for `num_steps` steps.

        Args:
            shape: of one step, `[layers, columns]`.
            num_steps: how many steps come.
            decay: the weight of a step relative to the next, above 0 and up to 1.
        """
        self.loads: NDArray[np.float64] = np.zeros(shape)
        age = np.arange(num_steps, -1, -1.0)  # of the edges between the steps: 0 is where the last one ends
        self._weights = decay ** age[1:]
        self._edges = age if decay == 1 else (1 - decay**age) / (1 - decay)  # the weight that comes after each
        total = self._edges[0]
        per_joined = math.ceil(total / MOST_STEPS)  # whole steps if they divide evenly, as shared ones vary less
        joined = max(1, min(num_steps, round(total / per_joined)))
        self.steps: NDArray[np.float64] = np.zeros((joined, *shape))
        self._joined_edges = np.round(total * np.arange(joined, -1, -1.0) / joined * _PARTS) / _PARTS
        self._joined_edges[0] = total
        self._seen = 0

    def add(self, loads: NDArray[np.float64]) -> None:
        """Add the next steps, `[some steps, layers, columns]`."""
        first, self._seen = self._seen, self._seen + len(loads)
        with np.errstate(over="ignore", invalid="ignore"):
            self.loads += _weighed(self._weights[first : self._seen], loads)
            begins, ends = self._edges[first : self._seen], self._edges[first + 1 : self._seen + 1]
            for row, (begin, end) in enumerate(zip(self._joined_edges[:-1], self._joined_edges[1:], strict=True)):
                if begin <= ends[-1] or end >= begins[0]:
                    continue
                share = np.maximum(0.0, np.minimum(begins, begin) - np.maximum(ends, end))
                self.steps[row] += _weighed(share, loads)


def _weighed(weights: NDArray[np.float64], loads: NDArray[np.float64]) -> NDArray[np.float64]:
    if (weights == 1).all():
        total: NDArray[np.float64] = loads.sum(axis=0)
        return total
    used = np.flatnonzero(weights)
    first, stop = (used[0], used[-1] + 1) if used.size else (0, 0)  # a view: no step is copied
    weighed: NDArray[np.float64] = np.tensordot(weights[first:stop], loads[first:stop], axes=1)
    return weighed
