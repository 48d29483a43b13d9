"""How much of the difference between two loads of a rank is noise, from a window of loads or from counts."""

from __future__ import annotations

import numpy as np

from eplb_core.arrays import FloatArray, IntArray
from eplb_core.planning.placement import EMPTY


def margin_of(
    old: IntArray, fresh: IntArray | None, window: FloatArray, num_ranks: int, z: float, *, counts: bool
) -> FloatArray:
    """Return how far the most loaded rank of each layer may be above its target by noise alone, `[num_layers]`.

    That is `z` standard deviations of the difference of two loads: that of the most loaded rank, and the target. Where
    the target is the fresh plan's highest load it has a noise of its own: another sample has another fresh plan.

    Args:
        old: `[num_layers, num_slots]`, where the experts are.
        fresh: the same shape, the plan whose highest load is the target; None if the target is a given number.
        window: `[steps, num_layers, num_logical]`.
        num_ranks: ranks that share the slots evenly.
        z: how many standard deviations.
        counts: whether the loads are counts.
    """
    if not z or (len(window) < 2 and not counts):
        return np.zeros(len(old))
    variance = sum(
        _variance(placement, window, num_ranks, counts=counts) for placement in (old, fresh) if placement is not None
    )
    margin: FloatArray = z * np.sqrt(variance)
    return margin


def _variance(placement: IntArray, window: FloatArray, num_ranks: int, *, counts: bool) -> FloatArray:
    """Return the variance of the mean load over the window of the most loaded rank of each layer, `[num_layers]`.

    It comes from how loads change from step to step: those of the most loaded rank, or of all ranks, which are more to
    learn from, whichever is higher. Of one step alone it comes from the counts, if the loads are counts of tokens: a
    count has the variance of its own size, and an expert with several copies has an even part of its tokens on each.
    """
    steps, num_layers, num_logical = window.shape
    layer, slot = np.nonzero(placement != EMPTY)
    expert = placement[layer, slot]
    copies = np.zeros((num_layers, num_logical))
    np.add.at(copies, (layer, expert), 1.0)

    def of_ranks(load: FloatArray) -> FloatArray:
        share = np.zeros(placement.shape)
        share[layer, slot] = load[layer, expert]
        total: FloatArray = share.reshape(num_layers, num_ranks, -1).sum(axis=2)
        return total

    split = np.maximum(copies, 1.0)
    hottest = of_ranks(window.mean(axis=0) / split).argmax(axis=1)
    row = np.arange(num_layers)
    variance = np.zeros(num_layers)
    if counts:
        # Summed over the window the counts have this variance, and the mean is the sum divided by the steps.
        variance = of_ranks(window.sum(axis=0) / split**2)[row, hottest] / steps**2
    if steps > 1:
        seen = np.stack([of_ranks(step / split) for step in window]).var(axis=0, ddof=1) / steps
        variance = np.maximum(variance, np.maximum(seen[row, hottest], seen.mean(axis=1)))
    return variance
