"""Checksums of all experts of all ranks, before and after a rearrangement: the end check that trusts no transport."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from eplb_core.arrays import IntArray
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import HandshakeError, IntegrityError
from eplb_core.planning.placement import EMPTY
from eplb_core.rearrange.weights import ExpertWeights
from eplb_core.transport.checksums import checksums
from eplb_core.transport.streams import on_stream

Thoroughness = Literal["off", "sample", "full"]
THOROUGHNESS: tuple[str, ...] = ("off", "sample", "full")
_MOST_NAMED = 8
_ODD = 0x9E3779B97F4A7C15


def slot_checksums(
    weights: ExpertWeights, control: ControlPlane, *, sample: bool, stream: torch.cuda.Stream | None, timeout_s: float
) -> IntArray:
    """Return one number for each slot of the group, int64 `[layers, slots]`, equal where all tensors' bytes are.

    Args:
        weights: this rank's slots.
        control: gathers the ranks' numbers; every rank calls this.
        sample: look at some blocks of each tensor instead of at all of it.
        stream: where to compute, behind the copies of the rearrangement.
        timeout_s: how long to wait for the slowest rank, in seconds.

    Raises:
        ControlPlaneError: a rank did not come, or the store is gone.
        HandshakeError: another rank's answer has another size.
    """
    mine = own_checksums(weights, sample=sample, stream=stream)
    said = control.all_gather("the checksums of all experts", mine.tobytes(), timeout_s)
    if {len(part) for part in said} != {mine.nbytes}:
        raise HandshakeError("the ranks have checksums of different numbers of slots", table={})
    parts = [np.frombuffer(part, dtype=np.int64).reshape(mine.shape) for part in said]
    return np.concatenate(parts, axis=1)


def own_checksums(weights: ExpertWeights, *, sample: bool, stream: torch.cuda.Stream | None) -> IntArray:
    """Return one number for each slot of this rank, int64 `[layers, slots]`; arguments as in `slot_checksums`."""
    mine = np.zeros((len(weights.layers), weights.num_slots), dtype=np.uint64)
    with on_stream(weights.device, stream):
        for layer in range(len(weights.layers)):
            tensors = [row for slot in range(weights.num_slots) for row in weights.slot(layer, slot) if len(row)]
            if not tensors:
                continue
            sums = checksums(tensors, sample=sample).view(np.uint64).reshape(weights.num_slots, -1)
            factors = np.uint64(_ODD) * np.arange(1, 2 * sums.shape[1], 2, dtype=np.uint64)
            mine[layer] = (sums * factors).sum(axis=1, dtype=np.uint64)
    return mine.view(np.int64)


def expected_checksums(placement: IntArray, sums: IntArray) -> dict[tuple[int, int], int]:
    """Return `(layer, expert)` -> its checksum, if all its copies have the same.

    Raises:
        IntegrityError: copies of an expert differ before anything was moved.
    """
    expected: dict[tuple[int, int], int] = {}
    different: set[tuple[int, int]] = set()
    for layer, slot in np.argwhere(placement != EMPTY).tolist():
        expert = layer, int(placement[layer, slot])
        if expected.setdefault(expert, int(sums[layer, slot])) != int(sums[layer, slot]):
            different.add(expert)
    if different:
        raise IntegrityError(
            f"copies of {_named(sorted(different))} differ before anything was moved",
            usable=True,
            remedy="find out who wrote into the slots, or give the placement that the slots really hold",
        )
    return expected


def wrong_slots(placement: IntArray, sums: IntArray, expected: dict[tuple[int, int], int]) -> list[tuple[int, int]]:
    """Return `(layer, slot)` of the slots that do not hold the bytes of the expert that `placement` says."""
    return [
        (layer, slot)
        for layer, slot in np.argwhere(placement != EMPTY).tolist()
        if (sum_before := expected.get((layer, int(placement[layer, slot])))) is not None
        and sum_before != int(sums[layer, slot])
    ]


def check_end(placement: IntArray, sums: IntArray, expected: dict[tuple[int, int], int], slots_per_rank: int) -> None:
    """Compare what the slots hold after a rearrangement with what the experts were before it.

    Raises:
        IntegrityError: some differ. `error.placement` has -1 there.
    """
    wrong = wrong_slots(placement, sums, expected)
    if not wrong:
        return
    experts = [(layer, int(placement[layer, slot])) for layer, slot in wrong]
    error = IntegrityError(
        f"{_named(experts)} not the bytes that they were",
        why="first at " + ", ".join(f"layer {la} slot {s}" for la, s in wrong[:_MOST_NAMED]),
        peers={slot // slots_per_rank for _, slot in wrong},
        usable=True,
        remedy="load these experts anew; error.placement has -1 in their slots",
    )
    error.placement = placement.copy()
    error.placement[tuple(np.array(wrong).T)] = EMPTY
    raise error


def _named(experts: list[tuple[int, int]]) -> str:
    named = ", ".join(f"expert {expert} of layer {layer}" for layer, expert in experts[:_MOST_NAMED])
    more = len(experts) - _MOST_NAMED
    return named + (f" and {more} more" if more > 0 else "")
