"""Runs a policy over a trace of loads: the same placements, plans and schedules as on ranks, but no bytes move."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np

from eplb_core.arrays import IntArray
from eplb_core.errors import InputError
from eplb_core.planning.placement import check_pair, imbalance
from eplb_core.planning.plan import RearrangementPlan, plan_rearrangement
from eplb_core.policies.base import BalancePolicy, PlacementDecision, PlacementRequest, decide
from eplb_core.policies.deepseek import POLICY as FRESH
from eplb_core.policies.movement import minimize_movement, slots_anew
from eplb_core.scheduling.schedule import Step, schedule_steps
from eplb_core.simulate.compared import Moves
from eplb_core.simulate.cost import Cost, Links, cost_of
from eplb_core.simulate.trace import Interval

_ALIGNMENT = 16  # of tensors in a window, as `ExpertWeights` lays them out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setup:
    """What is simulated.

    Attributes:
        num_ranks: ranks that share the slots evenly.
        num_nodes: nodes that share the ranks evenly.
        num_slots: slots of a layer.
        num_groups: groups of experts that the router picks from.
        tensor_bytes: bytes of each tensor of one expert, the same in every layer.
        num_layers: MoE layers.
        window_bytes: staging of a rank for received experts.
        in_place_from: bytes of staging that take as long as a step; None stages everything.
        links: how fast bytes move.
        moves: whether plans are taken as they are, with slots kept, or with ranks relabelled as well.
    """

    num_ranks: int
    num_nodes: int
    num_slots: int
    num_groups: int
    tensor_bytes: tuple[int, ...]
    num_layers: int
    window_bytes: int
    in_place_from: int | None
    links: Links
    moves: Moves = "relabelled"

    @property
    def expert_bytes(self) -> IntArray:
        """Bytes of one expert, int64 `[layers]`."""
        return np.full(self.num_layers, sum(self.tensor_bytes), dtype=np.int64)

    @property
    def staged_bytes(self) -> int:
        """Bytes of one expert in a window, where every tensor starts at a multiple of 16."""
        return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in self.tensor_bytes)

    @property
    def node_of_rank(self) -> IntArray:
        """The node of each rank."""
        node: IntArray = np.arange(self.num_ranks, dtype=np.int64) // (self.num_ranks // self.num_nodes)
        return node


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalance:
    """One rebalance of the simulation.

    Attributes:
        plan: which plan the policy made, in words.
        imbalance_kept: max / mean of the true loads if nothing had moved, mean over the layers.
        imbalance: the same with the new placement.
        imbalance_worst: that of the worst layer.
        slots_anew: slots that hold what their rank did not hold before, as a share of all.
        policy_s: seconds of this process in the policy.
        planning_s: seconds of this process in plan and schedule.
        cost: what the rearrangement costs.
    """

    plan: str
    imbalance_kept: float
    imbalance: float
    imbalance_worst: float
    slots_anew: float
    policy_s: float
    planning_s: float
    cost: Cost

    def document(self) -> dict[str, object]:
        """Return all of it as one flat dictionary."""
        flat = asdict(self)
        return {**{key: value for key, value in flat.items() if key != "cost"}, **flat["cost"]}


def simulate(
    setup: Setup,
    policy: BalancePolicy,
    trace: Iterable[Interval],
    progress: Callable[[int], None] | None = None,
) -> list[Rebalance]:
    """Return what each rebalance but the first, which makes the first placement with a fresh plan, did.

    Args:
        setup: the machine and the model.
        policy: decides on every placement but the first.
        trace: the loads; the first interval makes the first placement.
        progress: told how many rebalances are done.

    Raises:
        InputError: the trace is empty, or a load cannot be used.
        PlacementError: the counts do not fit one another.
    """
    old: IntArray | None = None
    done: list[Rebalance] = []
    for interval in trace:
        request = PlacementRequest(
            loads=interval.seen,
            num_slots=setup.num_slots,
            num_ranks=setup.num_ranks,
            num_nodes=setup.num_nodes,
            num_groups=setup.num_groups,
            old=old,
            expert_bytes=setup.expert_bytes,
        )
        if old is None:
            old = decide(FRESH, request).placement
            continue
        rebalance, old = _rebalance(setup, policy, request, interval, old)
        done.append(rebalance)
        if progress is not None:
            progress(len(done))
    if old is None:
        raise InputError("there are no loads to simulate")
    return done


def simulate_workload(setup: Setup, placements: IntArray) -> list[Cost]:
    """Return the costs of going through a workload's placements, int64 `[steps + 1, layers, slots]`."""
    return [_cost(setup, old, new) for old, new in itertools.pairwise(placements)]


def planned(setup: Setup, old: IntArray, new: IntArray) -> tuple[RearrangementPlan, list[Step]]:
    """Return the plan and the schedule that ranks make for two placements."""
    node_of_rank = setup.node_of_rank if setup.num_nodes > 1 else None
    plan = plan_rearrangement(old, new, setup.num_ranks, node_of_rank)
    steps = schedule_steps(plan, setup.staged_bytes, window_bytes=setup.window_bytes, in_place_from=setup.in_place_from)
    return plan, steps


def _cost(setup: Setup, old: IntArray, new: IntArray) -> Cost:
    plan, steps = planned(setup, old, new)
    return cost_of(plan, steps, setup.expert_bytes, setup.links)


def _rebalance(
    setup: Setup, policy: BalancePolicy, request: PlacementRequest, interval: Interval, old: IntArray
) -> tuple[Rebalance, IntArray]:
    began = time.perf_counter()
    decision = decide(policy, request)
    new = _placed(setup, decision, old)
    decided = time.perf_counter()
    cost = _cost(setup, old, new)
    planned = time.perf_counter()
    kept, after = (imbalance(placement, interval.true, setup.num_ranks) for placement in (old, new))
    rebalance = Rebalance(
        plan=decision.ran(),
        imbalance_kept=float(kept.mean()),
        imbalance=float(after.mean()),
        imbalance_worst=float(after.max()),
        slots_anew=float(slots_anew(old, new, setup.num_ranks).sum() / old.size),
        policy_s=decided - began,
        planning_s=planned - decided,
        cost=cost,
    )
    return rebalance, new


def _placed(setup: Setup, decision: PlacementDecision, old: IntArray) -> IntArray:
    _, new = check_pair(old, decision.placement, setup.num_ranks)
    if setup.moves == "planned":
        return new
    nodes = setup.num_nodes if decision.nodes_kept else 1
    return minimize_movement(old, new, setup.num_ranks, num_nodes=nodes, relabel=setup.moves == "relabelled")
