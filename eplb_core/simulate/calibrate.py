"""Learns the rates of the links from real runs, so that simulated seconds are those of the machine that was measured.

The model is linear in what is looked for: the time before the first step, that of a step and of an expert, and the
seconds of a byte that crosses and of one that is copied. So they are a least-squares fit with no negative value to the
times of many rearrangements that differ in steps, in experts, and in bytes that cross and that are copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from eplb_core.arrays import FloatArray, IntArray
from eplb_core.contract.option_types import ByteSize, Duration
from eplb_core.errors import InputError
from eplb_core.simulate.cost import Links, bytes_of
from eplb_core.simulate.run import Setup, planned

_ROUNDS = 30  # of a fit that counts outliers less each time
_NEVER = ByteSize(2**62)  # a rate that limits nothing
_LEAST_OFF = 0.02  # rearrangements that the model is this close to count alike


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredRun:
    """A real run.

    Attributes:
        setup: the machine and the model; its links are not looked at.
        placements: int64 `[steps + 1, layers, slots]`.
        seconds: how long each rearrangement took.
        bounded_steps: how many steps each one took.
    """

    setup: Setup
    placements: IntArray
    seconds: Sequence[float]
    bounded_steps: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was learned.

    Attributes:
        links: the rates and times that fit best.
        rearrangements: how many different ones they were fitted to.
        off: how far the model is from their times, as a share of them, in the median.
    """

    links: Links
    rearrangements: int
    off: float

    def option(self) -> str:
        """Return the links as the option `--links` takes them."""
        links = self.links
        parts = [f"rank_rate={links.rank_rate:d}B", f"copy_rate={links.copy_rate:d}B"]
        if links.host_rate is not None:
            parts.append(f"host_rate={links.host_rate:d}B")
        times = {"expert": links.expert, "step": links.step, "start": links.start}
        return "&".join([*parts, *(f"{name}={1e3 * value:.4f}ms" for name, value in times.items())])


def calibrate(runs: Sequence[MeasuredRun]) -> Calibration:
    """Return the links that the times of real runs fit best.

    The first rearrangement of a run is left out: connections and buffers are made in it. Of equal rearrangements the
    fastest counts: what else a machine does only ever adds time. Either the busiest rank is what takes time, or all
    ranks of a host together, where they share cores and one memory: what fits better is taken.

    Raises:
        InputError: a run took other steps than it should have, or the runs are too much alike to tell the terms apart.
    """
    found: dict[tuple[float, ...], list[float]] = {}
    for run in runs:
        for row, taken in zip(_terms(run)[1:], run.seconds[1:], strict=True):
            if row[0]:
                found.setdefault(row, []).append(taken)
    if not found:
        raise InputError(
            "there is nothing to calibrate with",
            why="no run has a second rearrangement that moves anything",
            remedy="let `eplb bench` make more --steps",
        )
    table: FloatArray = np.array(list(found), dtype=np.float64)
    steps, rank, host, copied, experts = table.T
    seconds = np.array([min(each) for each in found.values()])
    start = np.ones(len(seconds))
    terms = [np.stack([start, steps, crossing, copied, experts], axis=1) for crossing in (rank, host)]
    if max(int(np.linalg.matrix_rank(each / each.max(axis=0).clip(1e-300))) for each in terms) < min(3, len(seconds)):
        raise InputError(
            "the runs are too much alike to calibrate with",
            why="their rearrangements do not differ in steps and bytes",
            remedy="measure workloads of several sizes, such as --churn 1 and --churn 0.2 with two windows",
        )
    fits = [_fit(each, seconds) for each in terms]
    off = [float(np.median(np.abs(each @ fit / seconds - 1))) for each, fit in zip(terms, fits, strict=True)]
    by_host = off[1] <= off[0]
    before, step, crossing, copying, expert = fits[by_host].tolist()
    rate = ByteSize(max(1, round(1 / crossing))) if crossing else _NEVER
    links = Links(
        rank_rate=_NEVER if by_host else rate,
        host_rate=rate if by_host else None,
        copy_rate=ByteSize(max(1, round(1 / copying))) if copying else _NEVER,
        expert=Duration(expert),
        step=Duration(step),
        start=Duration(before),
    )
    return Calibration(links=links, rearrangements=len(seconds), off=off[by_host])


def _terms(run: MeasuredRun) -> list[tuple[float, ...]]:
    """Return for each rearrangement its steps, and sums over them: bytes of a rank, a host, of copies, and experts."""
    pairs = list(itertools.pairwise(run.placements))
    # Whether a run received in place is not known beforehand: it depends on the transport. Its steps tell.
    for in_place_from in (run.setup.in_place_from, None):
        setup = replace(run.setup, in_place_from=in_place_from)
        schedules = [planned(setup, old, new) for old, new in pairs]
        if [len(steps) for _, steps in schedules] == list(run.bounded_steps):
            break
    else:
        raise InputError(
            "a run to calibrate with took other steps than its schedule has",
            why=f"it took {list(run.bounded_steps)}, the schedule {[len(steps) for _, steps in schedules]}",
            remedy="calibrate with runs of this version of eplb",
        )
    rows: list[tuple[float, ...]] = []
    for plan, steps in schedules:
        parts = [bytes_of(plan, step, setup.expert_bytes) for step in steps]
        rows.append(
            (
                float(len(steps)),
                sum(part.rank for part in parts),
                sum(part.host for part in parts),
                sum(part.copied for part in parts),
                sum(part.experts for part in parts),
            )
        )
    return rows


def _fit(terms: FloatArray, seconds: FloatArray) -> FloatArray:
    """Return factors from 0 on of the terms, so that the relative deviations are small; outliers count little."""
    weight = np.ones(len(seconds))
    factors = np.zeros(terms.shape[1])
    for _ in range(_ROUNDS):
        rows = terms / seconds[:, None] * weight[:, None]
        factors = _least_squares(rows, weight)
        off = np.abs(terms @ factors / seconds - 1)
        weight = 1 / np.sqrt(np.maximum(off, _LEAST_OFF))
    return factors


def _least_squares(rows: FloatArray, aim: FloatArray) -> FloatArray:
    """Return the factors from 0 on that fit best: of all choices of terms that may be above 0, the best."""
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    best, least = np.zeros(rows.shape[1]), float(aim @ aim)
    for used in itertools.product((False, True), repeat=rows.shape[1]):
        columns = np.flatnonzero(used)
        if not len(columns):
            continue
        found = np.linalg.lstsq(rows[:, columns] / scale[columns], aim, rcond=None)[0]
        rest = rows[:, columns] @ (found / scale[columns]) - aim
        if (found >= 0).all() and float(rest @ rest) < least * (1 - 1e-9):
            best, least = np.zeros(rows.shape[1]), float(rest @ rest)
            best[columns] = found / scale[columns]
    return best
