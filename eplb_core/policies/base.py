"""What a policy is, what it may be asked, and what it answers.

A policy turns loads into a placement: arrays in, arrays out, no torch. `BalancePolicy` is all that it must have. It may
also have

- `decide(request)`, which is asked instead of `rebalance` and also says which plan it made, layer by layer;
- `options`, a frozen dataclass of typed options, and `with_options(options)`, which returns a policy that uses them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from eplb_core.errors import InputError
from eplb_core.planning.placement import check_loads

if TYPE_CHECKING:
    import numpy.typing as npt

    from eplb_core.arrays import FloatArray, IntArray


@runtime_checkable
class BalancePolicy(Protocol):
    """Decides where experts shall be."""

    @property
    def name(self) -> str:
        """The name that it is registered under."""

    @property
    def summary(self) -> str:
        """One line for people."""

    def rebalance(
        self,
        loads: npt.ArrayLike,
        *,
        num_slots: int,
        num_ranks: int,
        num_nodes: int = 1,
        num_groups: int = 1,
        old: IntArray | None = None,
    ) -> IntArray:
        """Return a placement for these loads; the same arguments give the same placement on every rank.

        Args:
            loads: `[num_layers, num_logical]`, how often each logical expert is chosen, in any unit.
            num_slots: physical slots of all ranks together, at least `num_logical`.
            num_ranks: ranks that share the slots evenly.
            num_nodes: nodes that share the ranks evenly, in rank order.
            num_groups: groups that the router picks experts from (group-limited routing), in expert order.
            old: `[num_layers, num_slots]`, where experts are now, for policies that avoid needless moves.

        Returns:
            int64 `[num_layers, num_slots]`, physical slot -> logical expert, every expert at least once.

        Raises:
            InputError: the loads cannot be used.
            PlacementError: the counts do not fit one another.
        """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementRequest:
    """What a policy is asked. All but `loads` and `expert_bytes` is as in `BalancePolicy.rebalance`.

    Attributes:
        loads: `[num_layers, num_logical]`, or a window of them, `[steps, num_layers, num_logical]`.
        num_slots: physical slots of all ranks together.
        num_ranks: ranks that share the slots evenly.
        num_nodes: nodes that share the ranks evenly, in rank order.
        num_groups: groups that the router picks experts from, in expert order.
        old: `[num_layers, num_slots]`, where experts are now, or None.
        expert_bytes: bytes of one expert of each layer, `[num_layers]`, or None if all are alike or it is not known.
    """

    loads: npt.ArrayLike
    num_slots: int
    num_ranks: int
    num_nodes: int = 1
    num_groups: int = 1
    old: IntArray | None = None
    expert_bytes: npt.ArrayLike | None = None

    def window(self) -> FloatArray:
        """Return the loads as float64 `[steps, num_layers, num_logical]`, one step if there is no window.

        Raises:
            InputError: the loads have another shape, or are not finite numbers from 0 on.
        """
        try:
            array = np.asarray(self.loads, dtype=np.float64)
        except (ValueError, TypeError) as error:
            raise InputError("the loads are not an array of numbers", why=str(error)) from error
        if array.ndim != 3:
            return check_loads(array)[None]
        if not len(array):
            raise InputError("the window of loads has no step", where=f"shape {list(array.shape)}")
        steps, num_layers, num_logical = array.shape
        return check_loads(array.reshape(steps * num_layers, num_logical)).reshape(array.shape)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementDecision:
    """What a policy answers.

    Attributes:
        placement: int64 `[num_layers, num_slots]`.
        plans: for each layer, which plan it got, such as `hierarchical`, `global`, `kept` or `incremental`.
        notes: what people may want to know about the choice, one sentence each.
        nodes_kept: whether the plan keeps the experts of a group on one node.
    """

    placement: IntArray
    plans: tuple[str, ...]
    notes: tuple[str, ...] = ()
    nodes_kept: bool = False

    def ran(self) -> str:
        """Return which plans ran, in words."""
        return plans_in_words(self.plans)


class DecidingPolicy:
    """The `rebalance` of policies that decide on requests: the placement of the decision."""

    __slots__ = ()

    @abstractmethod
    def decide(self, request: PlacementRequest) -> PlacementDecision:
        """Return the placement, and which plan each layer got."""

    def rebalance(
        self,
        loads: npt.ArrayLike,
        *,
        num_slots: int,
        num_ranks: int,
        num_nodes: int = 1,
        num_groups: int = 1,
        old: IntArray | None = None,
    ) -> IntArray:
        """Return the placement that `decide` decides on; arguments and errors as in `BalancePolicy.rebalance`."""
        return self.decide(
            PlacementRequest(
                loads=loads,
                num_slots=num_slots,
                num_ranks=num_ranks,
                num_nodes=num_nodes,
                num_groups=num_groups,
                old=old,
            )
        ).placement


def plans_in_words(plans: Sequence[str]) -> str:
    """Return the plans of all layers, the most frequent first, such as `incremental in 50 layers, kept in 8`."""
    counted = Counter(plans).most_common()
    if len(counted) < 2:
        return "".join(name for name, _ in counted)
    (first, often), *others = counted
    layers = "layer" if often == 1 else "layers"
    return ", ".join([f"{first} in {often} {layers}", *(f"{name} in {count}" for name, count in others)])


def decide(policy: BalancePolicy, request: PlacementRequest) -> PlacementDecision:
    """Ask a policy, also one that has `rebalance` only.

    Such a policy gets the sum of a window of loads, and its name stands for the plan that ran.

    Raises:
        InputError: the loads cannot be used.
        PlacementError: the counts do not fit one another.
    """
    asked: Any = getattr(policy, "decide", None)
    if asked is not None:
        decision: PlacementDecision = asked(request)
        return decision
    placement = policy.rebalance(
        request.window().sum(axis=0),
        num_slots=request.num_slots,
        num_ranks=request.num_ranks,
        num_nodes=request.num_nodes,
        num_groups=request.num_groups,
        old=request.old,
    )
    return PlacementDecision(placement=placement, plans=(policy.name,) * len(placement))
