"""What one rearrangement costs: the plan and the schedule of the real thing, and a model of the links for the time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from eplb_core.arrays import IntArray
from eplb_core.contract.option_types import ByteSize, Duration
from eplb_core.planning.plan import RearrangementPlan
from eplb_core.scheduling.steps import Copies, Step, Transfers


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """How fast bytes move, per second.

    Attributes:
        rank_rate: what a rank sends, and receives at the same time.
        node_rate: what a node sends to all others, and receives at the same time; None for no limit.
        host_rate: what all ranks of a node move together, where they share one memory; None for no limit.
        copy_rate: what a rank copies from its window into its slots.
        expert: time of an expert that a rank receives or copies, beside the bytes.
        step: time of a step beside the bytes: the ranks agree, copies are started.
        start: time of a rearrangement before its first step: the ranks agree on the plan.
    """

    rank_rate: ByteSize = field(default=ByteSize(200 * 10**9), metadata={"min": 1, "help": "bytes a second of a rank"})
    node_rate: ByteSize | None = field(default=None, metadata={"min": 1, "help": "bytes a second between nodes"})
    host_rate: ByteSize | None = field(default=None, metadata={"min": 1, "help": "bytes a second of a node's ranks"})
    copy_rate: ByteSize = field(default=ByteSize(10**12), metadata={"min": 1, "help": "bytes a second of local copies"})
    expert: Duration = field(default=Duration(0.0), metadata={"help": "time of an expert beside the bytes"})
    step: Duration = field(default=Duration(0.0005), metadata={"help": "time of a step beside the bytes"})
    start: Duration = field(default=Duration(0.001), metadata={"help": "time before the first step"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a rearrangement costs.

    Attributes:
        experts_moved: experts that cross between ranks.
        bytes_moved: bytes that cross between ranks.
        bytes_between_nodes: of these, bytes that cross between nodes.
        rank_bytes_max: bytes that the rank receives that receives most.
        link_bytes_max: bytes from one rank to another, on the pair that has most.
        node_bytes_max: bytes that a node sends to others or receives, whichever is most.
        peers_max: ranks that a rank has traffic with, on the rank that has most.
        steps: bounded steps.
        messages: control messages of a rank: one for the plan, and one for each step, which it decides with the others.
            Without those that share a large schedule among the ranks, or find where ranks of one host meet.
        staging_bytes_max: bytes of the window that a rank uses, on the rank and in the step that use most.
        seconds: the time that it takes, by the model of the links.
    """

    experts_moved: int
    bytes_moved: int
    bytes_between_nodes: int
    rank_bytes_max: int
    link_bytes_max: int
    node_bytes_max: int
    peers_max: int
    steps: int
    messages: int
    staging_bytes_max: int
    seconds: float


def cost_of(plan: RearrangementPlan, steps: list[Step], expert_bytes: IntArray, links: Links) -> Cost:
    """Return what a schedule costs.

    Args:
        plan: what moves.
        steps: the schedule of it.
        expert_bytes: int64 `[layers]`.
        links: how fast bytes move.
    """
    traffic = plan.traffic(expert_bytes)
    between = plan.traffic_between_nodes(expert_bytes)
    peers = ((traffic > 0) | (traffic > 0).T).sum(axis=1)
    seconds = (float(links.start) if steps else 0.0) + sum(_seconds(plan, step, expert_bytes, links) for step in steps)
    return Cost(
        experts_moved=plan.num_transfers,
        bytes_moved=int(traffic.sum()),
        bytes_between_nodes=int(between.sum()),
        rank_bytes_max=int(traffic.sum(axis=0).max(initial=0)),
        link_bytes_max=int(traffic.max(initial=0)),
        node_bytes_max=int(max(between.sum(axis=0).max(initial=0), between.sum(axis=1).max(initial=0))),
        peers_max=int(peers.max(initial=0)),
        steps=len(steps),
        messages=1 + len(steps),
        staging_bytes_max=max((int(step.staged_bytes.max()) for step in steps), default=0),
        seconds=seconds,
    )


@dataclass(frozen=True, slots=True)
class StepBytes:
    """The bytes of one bounded step, each where they are most.

    Attributes:
        rank: what a rank sends, or receives.
        between: what a node sends to others, or receives from them.
        host: what all ranks of a node receive, and copy from the window into slots.
        copied: what a rank copies.
        experts: how many experts a rank receives and copies; not bytes.
    """

    rank: float
    between: float
    host: float
    copied: float
    experts: float


def bytes_of(plan: RearrangementPlan, step: Step, expert_bytes: IntArray) -> StepBytes:
    """Return the bytes of a step of a schedule; arguments as in `cost_of`."""
    transfers, copies = step.transfers, step.copies
    size, copied = expert_bytes[transfers[:, Transfers.LAYER]], expert_bytes[copies[:, Copies.LAYER]]
    source, destination = transfers[:, Transfers.SRC_RANK], transfers[:, Transfers.DST_RANK]
    copier = copies[:, Copies.RANK]
    node = plan.node_of_rank
    crosses = node[source] != node[destination]

    def most(place: IntArray, size: IntArray) -> float:
        return float(np.bincount(place, size, minlength=1).max())

    return StepBytes(
        rank=max(most(source, size), most(destination, size)),
        between=max(most(node[place[crosses]], size[crosses]) for place in (source, destination)),
        host=most(np.concatenate([node[destination], node[copier]]), np.concatenate([size, copied])),
        copied=most(copier, copied),
        experts=float(np.bincount(np.concatenate([destination, copier]), minlength=1).max()),
    )


def _seconds(plan: RearrangementPlan, step: Step, expert_bytes: IntArray, links: Links) -> float:
    """Return the time of one step: the busiest link, then the copies of the rank that has most."""
    most = bytes_of(plan, step, expert_bytes)
    moving = most.rank / links.rank_rate
    if links.node_rate is not None:
        moving = max(moving, most.between / links.node_rate)
    if links.host_rate is not None:
        # One memory: every byte is read and written by one of its ranks, copies too.
        moving = max(moving, most.host / links.host_rate)
    return float(links.step) + moving + most.copied / links.copy_rate + most.experts * float(links.expert)
