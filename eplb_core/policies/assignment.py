"""Which rank takes which: the one-to-one assignment with the highest value.

Up to `_EXACT_RANKS` ranks the assignment is optimal: shortest augmenting paths with potentials, the "Hungarian method"
as in Jonker and Volgenant, 1987, on whole numbers. SciPy has the same algorithm (`linear_sum_assignment`), but of
several optimal assignments it may return another one, and ranks with and without SciPy would then plan differently.
"""

from __future__ import annotations

import numpy as np

from eplb_core.arrays import IntArray
from eplb_core.policies.compiled import COMPILES, compiled

_EXACT_RANKS = 512
"""Beyond, pairs are taken greedily: the exact way takes time with the third power of the number."""

_FAR = 2**62


def assign(value: IntArray) -> IntArray:
    """Return for each row of `value`, int64 `[n, n]`, its column, so that the sum of the values is high.

    It is the highest there is for up to 512 rows. The same values give the same columns anywhere.
    """
    if len(value) > _EXACT_RANKS:
        return _greedy(value)
    return _exact(value)


@compiled
def _matched_at_once(value: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Give rows the first free one of their best columns, which spares most of the searches."""
    n = len(value)
    row_potential = np.zeros(n, dtype=np.int64)
    row_of, column_of = np.full(n, -1), np.full(n, -1)
    for row in range(n):
        row_potential[row] = -value[row].max()
        for column in np.flatnonzero(value[row] == value[row].max()):
            if row_of[column] < 0:
                row_of[column], column_of[row] = row, column
                break
    return row_potential, row_of, column_of


def _exact_loops(value: IntArray) -> IntArray:
    n = len(value)
    row_potential, row_of, column_of = _matched_at_once(value)
    potential = np.zeros(n, dtype=np.int64)
    for start in range(n):
        if column_of[start] >= 0:
            continue
        distance, before = np.full(n, _FAR), np.full(n, -1)
        done = np.zeros(n, dtype=np.bool_)
        row, reached, end = start, 0, -1
        while end < 0:
            nearest, least = -1, _FAR
            for column in range(n):
                if done[column]:
                    continue
                length = reached - value[row, column] - row_potential[row] - potential[column]
                if length < distance[column]:
                    distance[column], before[column] = length, row
                if distance[column] < least:
                    nearest, least = column, distance[column]
            reached = least
            done[nearest] = True
            if row_of[nearest] < 0:
                end = nearest
            else:
                row = row_of[nearest]
        row_potential[start] += reached
        for column in range(n):
            if done[column]:
                potential[column] += distance[column] - reached
                if column != end:
                    row_potential[row_of[column]] += reached - distance[column]
        column = end
        while True:
            row = before[column]
            row_of[column] = row
            column, column_of[row] = column_of[row], column
            if row == start:
                break
    return column_of


def _exact_arrays(value: IntArray) -> IntArray:
    n = len(value)
    row_potential, row_of, column_of = _matched_at_once(value)
    potential = np.zeros(n, dtype=np.int64)
    for start in np.flatnonzero(column_of < 0).tolist():
        distance, before = np.full(n, _FAR), np.full(n, -1)
        done = np.zeros(n, dtype=np.bool_)
        row, reached, end = start, 0, -1
        while end < 0:
            length = reached - value[row] - row_potential[row] - potential
            shorter = ~done & (length < distance)
            distance[shorter], before[shorter] = length[shorter], row
            nearest = int(np.where(done, _FAR, distance).argmin())
            reached = int(distance[nearest])
            done[nearest] = True
            if row_of[nearest] < 0:
                end = nearest
            else:
                row = int(row_of[nearest])
        row_potential[start] += reached
        potential[done] += distance[done] - reached
        done[end] = False
        row_potential[row_of[done]] += reached - distance[done]
        column = end
        while True:
            row = int(before[column])
            row_of[column] = row
            column, column_of[row] = int(column_of[row]), column
            if row == start:
                break
    return column_of


_exact = compiled(_exact_loops) if COMPILES else _exact_arrays


def _greedy(value: IntArray) -> IntArray:
    """Take the pair with the highest value of those that are left, again and again."""
    column_of = np.full(len(value), -1)
    free = np.ones(len(value), dtype=np.bool_)
    rows, columns = np.nonzero(value > 0)
    for pair in np.argsort(-value[rows, columns], kind="stable").tolist():
        row, column = rows[pair], columns[pair]
        if column_of[row] < 0 and free[column]:
            column_of[row], free[column] = column, False
    column_of[column_of < 0] = np.flatnonzero(free)
    return column_of
