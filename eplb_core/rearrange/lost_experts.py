"""Experts that no rank holds any more come from somewhere else, such as a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from eplb_core.arrays import IntArray
from eplb_core.control.commit_record import Record
from eplb_core.errors import LoaderError
from eplb_core.rearrange.host_backup import HostBackup
from eplb_core.rearrange.weights import ExpertWeights
from eplb_core.transport.streams import on_stream

Loader = Callable[[int, int], Sequence[torch.Tensor]]
"""Called with layer and expert; returns its tensors, in the order, shapes and dtypes of one slot of that layer."""

KEY = "loading lost experts"


def load_lost(
    lost: IntArray,
    placement: IntArray,
    weights: ExpertWeights,
    rank: int,
    loader: Loader | HostBackup,
    record: Record,
    stream: torch.cuda.Stream | None,
) -> IntArray:
    """Fill this rank's slots of lost experts, and return the placement once every rank has filled its own.

    The slots are empty until then, so nothing is lost if a rank fails.

    Args:
        lost: int64 `[lost, 3]`: layer, slot counted over all ranks, expert.
        placement: `[layers, slots]`, with -1 in those slots.
        weights: this rank's slots.
        rank: this rank.
        loader: brings the tensors of one expert, or a backup that brings all of them.
        record: where the ranks decide.
        stream: where the copies go.

    Raises:
        LoaderError: the loader of some rank failed; `error.placement` has -1 in those slots.
        ControlPlaneError: the store is gone.
    """
    experts = tuple((layer, expert) for layer, _, expert in lost.tolist())
    problem: Exception | None = None
    try:
        if isinstance(loader, HostBackup):
            loader.restore(lost, weights, stream)
        else:
            for layer, slot, expert in lost.tolist():
                if slot // weights.num_slots == rank:
                    with on_stream(weights.device, stream):
                        weights.write(layer, slot % weights.num_slots, loader(layer, expert), f"expert {expert}")
    except Exception as error:  # noqa: BLE001 - a loader may raise anything, and the other ranks have to know
        problem = error
    decision = record.decide(KEY) if problem is None else record.abort(KEY, problem)
    if decision.aborted:
        raise LoaderError(
            f"the loader of rank {decision.rank} failed",
            experts=experts,
            placement=placement.copy(),
            why=decision.text,
        ) from problem
    after = placement.copy()
    after[lost[:, 0], lost[:, 1]] = lost[:, 2]
    return after
