"""Loads over time: made up, or out of a recording."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from eplb_core.arrays import FloatArray
from eplb_core.errors import InputError

Kind = Literal["lognormal", "zipf"]


@dataclass(frozen=True, slots=True, eq=False)
class Interval:
    """The time between two rebalances.

    Attributes:
        seen: `[steps, layers, experts]` or `[layers, experts]`, what the policy is told.
        true: `[layers, experts]`, what the placement is judged by.
    """

    seen: FloatArray
    true: FloatArray


def make_trace(
    *, kind: Kind, layers: int, experts: int, intervals: int, drift: float, tokens: float | None, seed: int
) -> Iterator[Interval]:
    """Yield made-up loads that drift.

    The logarithm of every load is a base (a normal distribution of deviation 1, or the logarithm of Zipf's law in
    random order) and a deviation that is drawn anew by the share `drift` in each interval, without growing over time.

    Args:
        kind: how loads are distributed over experts.
        layers: MoE layers.
        experts: logical experts of each.
        intervals: how many times to rebalance, and the first time, at which the first placement is made.
        drift: by how much a load changes from one interval to the next, 0 to 1; 0.2 is about 20 %.
        tokens: tokens of an expert in an interval on average, as counts with the noise of counts; None for no noise.
        seed: of the random numbers.
    """
    random = np.random.default_rng(seed)
    if kind == "lognormal":
        base, spread = np.zeros((layers, experts)), random.normal(0, 1, (layers, experts))
    else:
        ranks = np.arange(1, experts + 1)
        base = -np.log(np.stack([random.permutation(ranks) for _ in range(layers)]))
        spread = np.zeros((layers, experts))
    for _ in range(intervals):
        true = np.exp(base + spread)
        true *= experts / true.sum(axis=1, keepdims=True)
        seen = true if tokens is None else random.poisson(true * tokens).astype(np.float64)
        yield Interval(seen, true)
        spread = np.sqrt(1 - drift**2) * spread + drift * random.normal(0, 1, spread.shape)


def cut_trace(window: FloatArray, steps_each: int) -> Iterator[Interval]:
    """Yield a recording in pieces of `steps_each` steps; a placement made from one is judged by the next.

    Args:
        window: `[steps, layers, experts]`.
        steps_each: steps between two rebalances.

    Raises:
        InputError: there are not two whole pieces.
    """
    pieces = len(window) // steps_each
    if pieces < 2:
        raise InputError(
            f"the recording has {len(window)} steps, which are not two intervals of {steps_each}",
            remedy="give fewer steps an interval, or a longer recording",
        )
    for piece in range(pieces):
        seen = window[piece * steps_each : (piece + 1) * steps_each]
        following = window[(piece + 1) * steps_each : (piece + 2) * steps_each]
        yield Interval(seen, (following if len(following) else seen).sum(axis=0))
