"""What a policy is: it decides on a new placement from the loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy.typing as npt

    from eplb_core.arrays import IntArray


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
