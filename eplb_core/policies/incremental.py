"""The policy that starts from where the experts are, and moves the fewest that reach its target.

DeepSeek's algorithm says how good each layer can be; a local search from the old placement gets there with a fraction
of its moves (`incremental_search`). Where the search fails, the fresh plan itself is taken, its ranks relabelled so
that as much as possible stays. So no layer is ever worse than the fresh plan's, unless a budget or another target
allows it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from eplb_core.arrays import FloatArray, IntArray
from eplb_core.contract.option_types import ByteSize
from eplb_core.errors import InputError, PlacementError
from eplb_core.planning.placement import align_slots, check_placement
from eplb_core.policies.base import DecidingPolicy, PlacementDecision, PlacementRequest
from eplb_core.policies.deepseek import DeepSeekOptions, DeepSeekPolicy
from eplb_core.policies.incremental_budget import search_within_budget
from eplb_core.policies.incremental_layer import LayerTask, plan_layer
from eplb_core.policies.incremental_noise import margin_of


@dataclass(frozen=True, slots=True)
class IncrementalOptions:
    """What is good enough, and what it may cost.

    Attributes:
        within: how far above the fresh plan's highest load a layer may stay: 0.01 is 1 %.
        imbalance: the highest load of a rank over the mean that is good enough, whatever the fresh plan has; None aims
            at the fresh plan.
        max_moves: the most slots that a rank may receive anew, over all layers; None for no limit.
        max_bytes: the most bytes that a rank may receive; None for no limit.
        z: how many standard deviations of the difference between the most loaded rank and the target count as noise.
            Thousands of ranks and layers are looked at, so that few are too few.
        counts: whether loads are counts of tokens, whose noise is known without a window.
        bursts: how many standard deviations between the steps of a window are added to each expert's load.
        groups: whether the experts of a group stay on one node: as the nodes allow, never, or else an error.
        effort: how many ways of searching are tried in each layer.
    """

    within: float = field(default=0.0, metadata={"min": 0, "help": "stay so far above the fresh plan, such as 0.01"})
    imbalance: float | None = field(
        default=None, metadata={"min": 1, "help": "the highest over the mean load that is good enough"}
    )
    max_moves: int | None = field(default=None, metadata={"min": 0, "help": "the most slots that a rank receives anew"})
    max_bytes: ByteSize | None = field(default=None, metadata={"help": "the most bytes that a rank receives"})
    z: float = field(default=6.0, metadata={"min": 0, "help": "so many standard deviations of a load are noise"})
    counts: bool = field(default=False, metadata={"help": "loads are counts of tokens, with the noise of counts"})
    bursts: float = field(
        default=0.0, metadata={"min": 0, "help": "standard deviations of a window that are added to its mean"}
    )
    groups: Literal["auto", "keep", "ignore"] = field(
        default="auto", metadata={"help": "whether groups of experts stay on one node"}
    )
    effort: int = field(default=3, metadata={"min": 1, "max": 4, "help": "how many ways of searching are tried"})


@dataclass(frozen=True, slots=True)
class IncrementalPolicy(DecidingPolicy):
    """Swap and copy experts until every layer is as good as the fresh plan.

    Attributes:
        values: its options.
    """

    name: str = "incremental"
    summary: str = "starts from the old placement and moves the fewest experts that make it as good as a fresh plan"
    options: type = IncrementalOptions
    values: IncrementalOptions = IncrementalOptions()

    def with_options(self, options: IncrementalOptions) -> IncrementalPolicy:
        """Return the policy with other options."""
        return dataclasses.replace(self, values=options)

    def decide(self, request: PlacementRequest) -> PlacementDecision:
        """Plan every layer, and say for each how: kept, incremental, fresh relabelled, or fresh.

        Without an old placement the fresh plan is the answer.

        Raises:
            InputError: the loads are not numbers, negative, not finite, or of another shape.
            PlacementError: the counts do not divide one another, there are fewer slots than experts, the old placement
                is not valid, or groups must be kept and cannot.
        """
        options = self.values
        window = request.window()
        loads = window.mean(axis=0)
        if options.bursts and len(window) > 1:
            loads = loads + options.bursts * window.std(axis=0, ddof=1)
        plan: Literal["auto", "hierarchical", "global"] = (
            "global" if options.groups == "ignore" else "hierarchical" if options.groups == "keep" else "auto"
        )
        fresh = DeepSeekPolicy(values=DeepSeekOptions(plan=plan)).decide(dataclasses.replace(request, loads=loads))
        if request.old is None:
            return dataclasses.replace(
                fresh,
                plans=tuple(f"fresh {plan}" for plan in fresh.plans),
                notes=(*fresh.notes, "there is no old placement to start from"),
            )
        old = check_placement(request.old, request.num_ranks, num_logical=loads.shape[1], name="the old placement")
        if old.shape != (len(loads), request.num_slots):
            raise PlacementError(
                f"the old placement has shape {list(old.shape)}, but there are {len(loads)} layers of "
                f"{request.num_slots} slots",
                remedy="omit the old placement to plan anew",
            )
        target_plan = fresh.placement if options.imbalance is None else None
        margin = margin_of(old, target_plan, window, request.num_ranks, options.z, counts=options.counts)
        tasks = self._tasks(request, old, loads, fresh, margin)
        budget = self._budget(request, len(loads))
        if budget is not None:
            rows, plans = search_within_budget(tasks, *budget)
        else:
            answers = [plan_layer(task, options.effort) for task in tasks]
            rows, plans = [row for row, _ in answers], [how for _, how in answers]
        return PlacementDecision(
            placement=align_slots(old, np.stack(rows) if rows else old, request.num_ranks),
            plans=tuple(plans),
            notes=fresh.notes,
            nodes_kept=fresh.nodes_kept,
        )

    def _tasks(
        self,
        request: PlacementRequest,
        old: IntArray,
        loads: FloatArray,
        fresh: PlacementDecision,
        margin: FloatArray,
    ) -> list[LayerTask]:
        kept = fresh.nodes_kept
        return [
            LayerTask(
                old=old[layer],
                load=np.ascontiguousarray(loads[layer]),
                fresh=fresh.placement[layer],
                num_ranks=request.num_ranks,
                num_nodes=request.num_nodes if kept else 1,
                num_groups=request.num_groups if kept else 1,
                within=self.values.within,
                imbalance=self.values.imbalance,
                margin=float(margin[layer]),
            )
            for layer in range(len(old))
        ]

    def _budget(self, request: PlacementRequest, num_layers: int) -> tuple[int | None, int | None, IntArray] | None:
        if self.values.max_moves is None and self.values.max_bytes is None:
            return None
        sizes = np.asarray(1 if request.expert_bytes is None else request.expert_bytes)
        if self.values.max_bytes is not None and request.expert_bytes is None:
            raise InputError(
                "a budget of bytes needs the size of an expert", remedy="give expert_bytes, or use max_moves instead"
            )
        if sizes.dtype.kind not in "iu" or sizes.shape not in ((), (num_layers,)) or (sizes < 0).any():
            raise InputError(
                f"the bytes of one expert must be one non-negative integer, or one for each of the {num_layers} layers",
                where=f"shape {list(sizes.shape)} of {sizes.dtype}",
            )
        return self.values.max_moves, self.values.max_bytes, np.broadcast_to(sizes.astype(np.int64), num_layers)


POLICY = IncrementalPolicy()
"""The target of the entry point."""
