"""The expert-parallel load balancer that DeepSeek published, in numpy.

The algorithm is that of https://github.com/deepseek-ai/EPLB (`eplb.py`, described in its README and in the DeepSeek-V3
paper); this implementation is our own. Three steps: spread the groups of experts over nodes, replicate the experts
with the highest load per copy within each node, spread the copies over the ranks of each node.

It plans from the loads alone: it does not look at the old placement, so most slots change with every call.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from eplb_core.arrays import FloatArray, IntArray
from eplb_core.errors import PlacementError
from eplb_core.policies.base import DecidingPolicy, PlacementDecision, PlacementRequest

HIERARCHICAL, GLOBAL = "hierarchical", "global"
"""The two plans: groups of experts kept on nodes, or nodes and groups ignored."""


@dataclass(frozen=True, slots=True)
class DeepSeekOptions:
    """Which of the two plans is made.

    Attributes:
        plan: `auto` keeps groups on nodes where the nodes can share them evenly, as published; the others insist.
    """

    plan: Literal["auto", "hierarchical", "global"] = field(
        default="auto", metadata={"help": "keep groups on nodes where they can be shared evenly, always, or never"}
    )


@dataclass(frozen=True, slots=True)
class DeepSeekPolicy(DecidingPolicy):
    """The hierarchical policy where the groups can be shared evenly by the nodes, else the global one.

    Attributes:
        values: its options.
    """

    name: str = "deepseek"
    summary: str = "DeepSeek's EPLB: groups to nodes, replicate the busiest experts, spread copies over ranks"
    options: type = DeepSeekOptions
    values: DeepSeekOptions = DeepSeekOptions()

    def with_options(self, options: DeepSeekOptions) -> DeepSeekPolicy:
        """Return the policy with other options."""
        return dataclasses.replace(self, values=options)

    def decide(self, request: PlacementRequest) -> PlacementDecision:
        """Return the published algorithm's placement for the sum of a window of loads, and say which plan it is.

        Global means that nodes and groups are ignored: one node and one group. A layer without any load is treated as
        evenly loaded. The old placement is not looked at.

        Raises:
            InputError: the loads are not numbers, negative, not finite, or of another shape.
            PlacementError: the counts do not divide one another, there are fewer slots than experts, or the options
                want a plan that cannot be made.
        """
        weights = request.window().sum(axis=0)
        num_slots, num_ranks = request.num_slots, request.num_ranks
        num_nodes, num_groups = request.num_nodes, request.num_groups
        num_layers, num_logical = weights.shape
        plan, notes = self._plan(num_nodes, num_groups) if min(num_nodes, num_groups) > 0 else (HIERARCHICAL, ())
        if notes:  # the published fallback does not look at groups, so they need not divide the experts
            num_groups = 1
        _check_shared(num_slots, "slots", num_ranks, "ranks")
        _check_shared(num_ranks, "ranks", num_nodes, "nodes")
        _check_shared(num_logical, "logical experts", num_groups, "groups")
        if num_slots < num_logical:
            raise PlacementError(
                f"{num_slots} slots cannot hold {num_logical} logical experts", remedy="use more slots, or more ranks"
            )
        if plan == GLOBAL:
            num_groups = num_nodes = 1
        order = spread_groups_over_nodes(weights, num_groups, num_nodes)
        by_node = np.take_along_axis(weights, order, axis=1).reshape(num_layers * num_nodes, -1)
        expert, copies = replicate_experts(by_node, num_slots // num_nodes)
        per_copy = np.take_along_axis(by_node / copies, expert, axis=1)
        expert = np.take_along_axis(expert, spread_copies_over_ranks(per_copy, num_ranks // num_nodes), axis=1)
        # Experts are numbered within their node so far; `order` says which expert of the layer each one is.
        expert = expert.reshape(num_layers, num_nodes, -1)
        expert = expert + np.arange(num_nodes)[:, None] * (num_logical // num_nodes)
        placement = np.take_along_axis(order, expert.reshape(num_layers, num_slots), axis=1)
        return PlacementDecision(
            placement=placement, plans=(plan,) * num_layers, notes=notes, nodes_kept=plan == HIERARCHICAL
        )

    def _plan(self, num_nodes: int, num_groups: int) -> tuple[str, tuple[str, ...]]:
        """Return which plan to make, and what there is to say about it."""
        shared = num_groups % num_nodes == 0
        if self.values.plan == HIERARCHICAL and not shared:
            raise PlacementError(
                f"{num_groups} groups cannot be kept on {num_nodes} nodes",
                why="every node gets the same number of groups",
                remedy="let the number of groups be a multiple of the number of nodes, or ask for the global plan",
            )
        if num_nodes == 1 or self.values.plan == GLOBAL:
            return GLOBAL, ()
        if not shared:
            groups = "1 group" if num_groups == 1 else f"{num_groups} groups"
            return GLOBAL, (f"{groups} cannot be shared evenly by {num_nodes} nodes, so the plan ignores nodes",)
        return HIERARCHICAL, ()


POLICY = DeepSeekPolicy()
"""The target of the entry point."""


def spread_groups_over_nodes(weights: FloatArray, num_groups: int, num_nodes: int) -> IntArray:
    """Step 1: give every node the same number of whole groups, with loads as even as a greedy packing makes them.

    Args:
        weights: `[num_layers, num_logical]`.
        num_groups: groups of consecutive experts.
        num_nodes: a divisor of `num_groups`.

    Returns:
        `[num_layers, num_logical]`, the logical experts, those of node 0 first, then those of node 1, and so on.
    """
    num_layers, num_logical = weights.shape
    size = num_logical // num_groups
    groups = _pack_evenly(weights.reshape(num_layers, num_groups, size).sum(axis=2), num_nodes)
    experts: IntArray = groups[:, :, None] * size + np.arange(size)
    return experts.reshape(num_layers, num_logical)


def replicate_experts(weights: FloatArray, num_replicas: int) -> tuple[IntArray, IntArray]:
    """Step 2: give each further replica to the expert whose load per copy is the highest just then.

    Args:
        weights: `[rows, num_experts]`; a row without any load counts as evenly loaded.
        num_replicas: copies of all experts of a row together, at least `num_experts`.

    Returns:
        `[rows, num_replicas]`, the expert of each replica, the first `num_experts` being 0, 1, 2, ..., and
        `[rows, num_experts]`, the number of copies of each expert.
    """
    rows, num_experts = weights.shape
    # With no load at all every replica would otherwise go to expert 0.
    weights = np.where(weights.any(axis=1, keepdims=True), weights, 1.0)
    expert = np.tile(np.arange(num_replicas), (rows, 1))
    copies = np.ones((rows, num_experts), dtype=np.int64)
    row = np.arange(rows)
    for replica in range(num_experts, num_replicas):
        busiest = (weights / copies).argmax(axis=1)
        expert[:, replica] = busiest
        copies[row, busiest] += 1
    return expert, copies


def spread_copies_over_ranks(weights: FloatArray, num_ranks: int) -> IntArray:
    """Step 3: give every rank the same number of copies, with loads as even as a greedy packing makes them.

    Args:
        weights: `[rows, num_replicas]`, the load that each copy bears.
        num_ranks: the ranks of one row, a divisor of `num_replicas`.

    Returns:
        `[rows, num_replicas]`, the replicas, those of the first rank first, and so on.
    """
    return _pack_evenly(weights, num_ranks)


def _pack_evenly(weights: FloatArray, num_packs: int) -> IntArray:
    """Put items into packs of equal size: heaviest first, each into the lightest pack that has room.

    Args:
        weights: `[rows, num_items]`.
        num_packs: a divisor of `num_items`.

    Returns:
        `[rows, num_items]`, the items, pack by pack, each pack in the order in which it was filled.
    """
    rows, num_items = weights.shape
    size = num_items // num_packs
    if size == 1:
        return np.tile(np.arange(num_items), (rows, 1))
    packed = np.empty((rows, num_items), dtype=np.int64)
    total = np.zeros((rows, num_packs))
    count = np.zeros((rows, num_packs), dtype=np.int64)
    row = np.arange(rows)
    for item in np.argsort(-weights, axis=1, kind="stable").T:
        pack = np.where(count < size, total, np.inf).argmin(axis=1)
        packed[row, pack * size + count[row, pack]] = item
        total[row, pack] += weights[row, item]
        count[row, pack] += 1
    return packed


def _check_shared(number: int, things: str, sharers: int, who: str) -> None:
    if number < 1 or sharers < 1 or number % sharers:
        raise PlacementError(
            f"{number} {things} cannot be shared evenly by {sharers} {who}",
            remedy=f"choose a number of {things} that is a positive multiple of the number of {who}",
        )
