"""Whether a rearrangement pays: the time that it blocks the model against the time that every later step saves.

The part of a step that waits for the most loaded rank grows with the imbalance, max / mean, of each layer, but only
above a knee: published fits find no gain below 1.03 to 1.10, where other work hides the difference. So an imbalance
below the knee counts as the knee.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from eplb_core.contract.option_types import ByteSize, Duration
from eplb_core.errors import InputError
from eplb_core.planning.placement import check_shapes, imbalance
from eplb_core.policies.movement import crossing_slots


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """What moving costs and what balance is worth, to be measured where it is used.

    Attributes:
        rate: bytes a second that a rank receives while experts move (`eplb bench`, `gb_per_s` by the ranks).
        step: seconds of one step of the model with the old placement.
        steps: steps until the next rebalance, over which the gain is counted.
        moe_share: share of a step's time that grows with the load of the most loaded rank.
        knee: an imbalance (max / mean) below it saves no time.
        blocked: share of the moving time that the model stands still: 1 if it waits, near 0 in the background.
        overhead: seconds of a rearrangement that do not depend on the bytes, such as planning.
    """

    rate: ByteSize = field(default=ByteSize(10**10), metadata={"min": 1, "help": "bytes a second into a rank"})
    step: Duration = field(default=Duration(0.05), metadata={"help": "time of one step of the model"})
    steps: int = field(default=10_000, metadata={"min": 0, "help": "steps until the next rebalance"})
    moe_share: float = field(
        default=0.5, metadata={"min": 0, "max": 1, "help": "share of a step that grows with the most loaded rank"}
    )
    knee: float = field(
        default=1.05, metadata={"min": 1, "help": "imbalance (max / mean) below which nothing is saved"}
    )
    blocked: float = field(
        default=1.0, metadata={"min": 0, "max": 1, "help": "share of the moving time that the model stands still"}
    )
    overhead: Duration = field(default=Duration(0.1), metadata={"help": "time of a rearrangement beside the bytes"})


@dataclass(frozen=True, slots=True, kw_only=True)
class WorthDecision:
    """Whether it pays, and the numbers behind that.

    Attributes:
        worth_it: whether `gain_s` exceeds `cost_s`.
        imbalance_before: max / mean of the ranks' loads, mean over the layers.
        imbalance_after: the same, after.
        bytes_moved: bytes that cross between ranks.
        busiest_rank_bytes: bytes that the rank receives that receives most.
        moving_s: seconds that the bytes take.
        cost_s: seconds that the model loses by moving.
        saved_s_per_step: seconds that each later step takes less; negative if it takes longer.
        gain_s: that, over all steps until the next rebalance.
        pays_after_steps: steps until the cost is earned back; None if it never is.
    """

    worth_it: bool
    imbalance_before: float
    imbalance_after: float
    bytes_moved: int
    busiest_rank_bytes: int
    moving_s: float
    cost_s: float
    saved_s_per_step: float
    gain_s: float
    pays_after_steps: int | None

    def __str__(self) -> str:
        """Return one sentence for people."""
        verdict = "worth it" if self.worth_it else "not worth it"
        back = "never pays" if self.pays_after_steps is None else f"pays after {self.pays_after_steps:,} steps"
        return (
            f"{verdict}: imbalance {self.imbalance_before:.3f} -> {self.imbalance_after:.3f} saves "
            f"{self.saved_s_per_step * 1e3:.3f} ms a step, {self.gain_s:.3g} s until the next rebalance; moving "
            f"{self.busiest_rank_bytes / 1e6:,.1f} MB into the busiest rank costs {self.cost_s:.3g} s and {back}"
        )


def should_rebalance(
    old: npt.ArrayLike,
    new: npt.ArrayLike,
    loads: npt.ArrayLike,
    num_ranks: int,
    expert_bytes: npt.ArrayLike,
    model: CostModel | None = None,
) -> WorthDecision:
    """Return whether it pays to rearrange `old` into `new`, with the numbers behind the decision.

    The same arguments give the same decision on every rank.

    Args:
        old: `[num_layers, num_slots]`, where the experts are, -1 = empty.
        new: the same shape, where they would be.
        loads: `[num_layers, num_logical]`, what the experts will bear, in any unit.
        num_ranks: ranks that share the slots evenly.
        expert_bytes: bytes of one expert, one number or `[num_layers]`.
        model: what moving costs and what balance is worth; None for the defaults, which fit no machine in particular.

    Raises:
        InputError: the loads cannot be used, or the sizes are not one number or one a layer.
        PlacementError: a placement is not valid, or they do not fit one another.
    """
    model = CostModel() if model is None else model
    old_array, new_array = check_shapes(old, new, num_ranks)
    sizes = np.asarray(expert_bytes)
    if sizes.shape not in ((), (len(old_array),)) or sizes.dtype.kind not in "iu" or bool((sizes < 0).any()):
        raise InputError(
            f"the bytes of one expert must be one non-negative integer, or one for each of the {len(old_array)} layers",
            where=f"shape {list(sizes.shape)} of {sizes.dtype}",
        )
    before, after = imbalance(old_array, loads, num_ranks), imbalance(new_array, loads, num_ranks)
    received = crossing_slots(old_array, new_array, num_ranks)
    by_rank = (received * np.broadcast_to(sizes.astype(np.int64), len(old_array))[:, None]).sum(axis=0)
    busiest = int(by_rank.max(initial=0))
    moving_s = busiest / float(model.rate)
    cost_s = model.blocked * moving_s + (float(model.overhead) if busiest else 0.0)
    counted_before, counted_after = (float(np.maximum(each, model.knee).sum()) for each in (before, after))
    share = 1 - counted_after / counted_before if counted_before else 0.0
    saved = float(model.step) * model.moe_share * share
    return WorthDecision(
        worth_it=saved * model.steps > cost_s,
        imbalance_before=float(before.mean()) if len(before) else 1.0,
        imbalance_after=float(after.mean()) if len(after) else 1.0,
        bytes_moved=int(by_rank.sum()),
        busiest_rank_bytes=busiest,
        moving_s=moving_s,
        cost_s=cost_s,
        saved_s_per_step=saved,
        gain_s=saved * model.steps,
        pays_after_steps=int(np.ceil(cost_s / saved)) if saved > 0 else None,
    )
