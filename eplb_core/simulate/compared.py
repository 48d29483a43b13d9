"""What `eplb simulate --compare` compares: ways to place experts, ours and those of others in their essentials."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from eplb_core.arrays import FloatArray, IntArray
from eplb_core.errors import InputError
from eplb_core.policies.base import BalancePolicy, DecidingPolicy, PlacementDecision, PlacementRequest
from eplb_core.policies.deepseek import POLICY as FRESH
from eplb_core.policies.incremental import IncrementalOptions, IncrementalPolicy
from eplb_core.policies.incremental_layer import fill_slots

Moves = Literal["planned", "slots", "relabelled"]
"""Whether a plan is taken as it is, with slots kept, or with ranks relabelled and slots kept."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to place experts.

    Attributes:
        name: for the table.
        policy: what decides.
        moves: what is done to its plans before they are carried out.
    """

    name: str
    policy: BalancePolicy
    moves: Moves


@dataclass(frozen=True, slots=True)
class KeepPolicy(DecidingPolicy):
    """Moves nothing, ever."""

    name: str = "keep"
    summary: str = "leaves every expert where it is"

    def decide(self, request: PlacementRequest) -> PlacementDecision:
        """Return the old placement. Raises `InputError` if there is none."""
        if request.old is None:
            raise InputError("there is no placement to keep")
        return PlacementDecision(placement=request.old, plans=("kept",) * len(request.old))


@dataclass(frozen=True, slots=True)
class OneMovePerPairPolicy(DecidingPolicy):
    """Swaps, at most one for each pair of ranks and layer: the limit that SwiftBalancer has, not its algorithm.

    The most loaded rank swaps the two experts that lower the higher load of both ranks most, with a rank that it has
    not swapped with yet, until no such swap lowers it. Numbers of copies do not change.
    """

    name: str = "one move a pair"
    summary: str = "swaps from the old placement, at most one for each pair of ranks"

    def decide(self, request: PlacementRequest) -> PlacementDecision:
        """Return the placement after the swaps; nodes and groups are ignored."""
        old = request.old
        if old is None:
            return FRESH.decide(replace(request, num_nodes=1, num_groups=1))
        rows = [
            _swap_pairs(row, load, request.num_ranks)
            for row, load in zip(old, request.window().sum(axis=0), strict=True)
        ]
        return PlacementDecision(placement=np.stack(rows), plans=(self.name,) * len(old))


def _swap_pairs(row: IntArray, load: FloatArray, num_ranks: int) -> IntArray:
    place = fill_slots(row, load)
    if place is None:
        return row
    per_rank = len(place) // num_ranks
    share = load / np.maximum(np.bincount(place, minlength=len(load)), 1)
    rank = np.arange(len(place)) // per_rank
    rank_load = share[place].reshape(num_ranks, per_rank).sum(axis=1)
    swapped = np.eye(num_ranks, dtype=np.bool_)
    while True:
        hot = int(rank_load.argmax())
        own = np.arange(hot * per_rank, (hot + 1) * per_rank)
        less = share[place[own]][:, None] - share[place]
        highest = np.maximum(rank_load[hot] - less, rank_load[rank] + less)
        has = np.zeros((num_ranks, len(load)), dtype=np.bool_)
        has[rank, place] = True
        allowed = ~swapped[hot, rank] & ~has[hot, place] & ~has[:, place[own]].T[:, rank]
        highest = np.where(allowed, highest, np.inf)
        best = int(highest.argmin())
        slot, other = int(own[best // len(place)]), best % len(place)
        if not highest.flat[best] < rank_load[hot] * (1 - 1e-9):
            return place
        moved = share[place[slot]] - share[place[other]]
        place[slot], place[other] = place[other], place[slot]
        rank_load[hot] -= moved
        rank_load[rank[other]] += moved
        swapped[hot, rank[other]] = swapped[rank[other], hot] = True


def contestants() -> tuple[Contestant, ...]:
    """Return what is compared, from keeping everything to the best balance."""

    def incremental(**options: float) -> BalancePolicy:
        return IncrementalPolicy(values=IncrementalOptions(**options))  # type: ignore[arg-type]

    return (
        Contestant("keep", KeepPolicy(), "planned"),
        Contestant("fresh (deepseek, as planned)", FRESH, "planned"),
        Contestant("fresh, slots kept (as vLLM does)", FRESH, "slots"),
        Contestant("fresh, ranks relabelled", FRESH, "relabelled"),
        Contestant("one swap a pair of ranks", OneMovePerPairPolicy(), "slots"),
        Contestant("incremental?within=0.05", incremental(within=0.05), "slots"),
        Contestant("incremental?within=0.01", incremental(within=0.01), "slots"),
        Contestant("incremental", incremental(), "slots"),
        Contestant("incremental?imbalance=1.03", incremental(imbalance=1.03), "slots"),
    )
