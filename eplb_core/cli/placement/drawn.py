"""What a placement, or the change between two, looks like as numbers: for tables, documents and plots alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eplb_core.cli.parameters import parse_layers
from eplb_core.cli.placement.ranks import ranks_of
from eplb_core.errors import InputError
from eplb_core.inputs.placement_formats import read_placement_file
from eplb_core.planning.placement import EMPTY, check_placement, load_per_rank

if TYPE_CHECKING:
    from eplb_core.planning.plan import RearrangementPlan


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A placement as it is drawn.

    Attributes:
        source: the file.
        format: the format of the file.
        placement: int64 `[layers, slots]`, -1 = empty; the layers that were chosen.
        layers: the number of each row: the model's own where the file has it.
        num_ranks: the ranks that share the slots.
        loads: float64 `[layers, experts]`, or None.
    """

    source: Path
    format: str
    placement: NDArray[np.int64]
    layers: tuple[int, ...]
    num_ranks: int
    loads: NDArray[np.float64] | None = None

    @property
    def slots_per_rank(self) -> int:
        """Slots of one rank in a layer."""
        return int(self.placement.shape[1]) // self.num_ranks

    @property
    def num_experts(self) -> int:
        """Logical experts of a layer: the highest number, and 1."""
        return int(self.placement.max(initial=EMPTY)) + 1

    def copies(self) -> NDArray[np.int64]:
        """Return in how many slots each expert is, int64 `[layers, experts]`."""
        return np.stack([np.bincount(row[row != EMPTY], minlength=self.num_experts) for row in self.placement]).astype(
            np.int64
        )

    def by_rank(self, row: int) -> list[list[int]]:
        """Return the experts of each rank in one layer, slot by slot."""
        slots: list[list[int]] = self.placement[row].reshape(self.num_ranks, -1).tolist()
        return slots

    def relative_loads(self) -> NDArray[np.float64] | None:
        """Return the load of each rank divided by the mean of its layer, float64 `[layers, ranks]`, if loads are known.

        A layer without load counts as even.
        """
        if self.loads is None:
            return None
        load = load_per_rank(self.placement, self.loads, self.num_ranks)
        mean = load.mean(axis=1, keepdims=True)
        relative: NDArray[np.float64] = np.divide(load, mean, out=np.ones_like(load), where=mean > 0)
        return relative

    def imbalances(self) -> list[float] | None:
        """Return the largest load of a rank divided by the mean load of each layer, if loads are known."""
        relative = self.relative_loads()
        return None if relative is None else relative.max(axis=1).tolist()

    def document(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        imbalances, copies = self.imbalances(), self.copies()
        return {
            "source": str(self.source),
            "source_format": self.format,
            "ranks": self.num_ranks,
            "slots": int(self.placement.shape[1]),
            "experts": self.num_experts,
            "layers": [
                {
                    "layer": name,
                    "ranks": self.by_rank(row),
                    "copies": copies[row].tolist(),
                    "empty_slots": int(np.count_nonzero(self.placement[row] == EMPTY)),
                    "imbalance": None if imbalances is None else imbalances[row],
                }
                for row, name in enumerate(self.layers)
            ],
        }


def read_drawn(source: Path, ranks: int | None, layers: str | None, loads: Path | None) -> Drawn:
    """Read a placement, and the loads that it is to be judged by.

    Args:
        source: a placement in any of the formats.
        ranks: how many ranks share the slots; None for what the file says.
        layers: `COUNT` or `START:STOP`: the rows to keep; None for all.
        loads: recorded loads of these layers, or None.

    Raises:
        InputError: a file cannot be read, or they do not fit one another.
        PlacementError: the placement is not valid.
    """
    file = read_placement_file(source)
    num_ranks = ranks_of(file, ranks, source, needed=True)
    rows = parse_layers(layers, len(file.placement))
    placement = check_placement(file.placement, num_ranks, name=str(source))
    recorded = None
    if loads is not None:
        from eplb_core.inputs.loads import read_loads

        recorded = read_loads(loads)
        if len(recorded) != len(placement):
            raise InputError(
                f"the loads have {len(recorded)} layers, the placement {len(placement)}", where=f"{loads}, {source}"
            )
        recorded = recorded[list(rows)]
    names = file.layer_ids or tuple(range(len(placement)))
    return Drawn(source, file.format, placement[list(rows)], tuple(names[row] for row in rows), num_ranks, recorded)


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """The change from one placement to another.

    Attributes:
        old: the placement before.
        new: the one after, as it is reached: with slots kept, its slots may be in another order than in the file.
        plan: what moves.
        expert_bytes: the size of an expert, or None if it is not known.
    """

    old: Drawn
    new: Drawn
    plan: RearrangementPlan
    expert_bytes: int | None

    def traffic(self) -> NDArray[np.int64]:
        """Return what each rank sends to each other: bytes, or experts where their size is not known."""
        return self.plan.traffic(1 if self.expert_bytes is None else self.expert_bytes)

    def per_layer(self) -> list[dict[str, Any]]:
        """Return what changes in each layer."""
        plan = self.plan
        crossing = np.bincount(plan.transfer_layer, minlength=plan.num_layers)
        changed = np.bincount(plan.move_layer, minlength=plan.num_layers)
        local = np.bincount(plan.move_layer[plan.move_transfer < 0], minlength=plan.num_layers)
        cleared = np.count_nonzero((plan.old != EMPTY) & (plan.new == EMPTY), axis=1)
        before, after = self.old.imbalances(), self.new.imbalances()
        return [
            {
                "layer": name,
                "slots_changed": int(changed[row] + cleared[row]),
                "experts_remote": int(crossing[row]),
                "slots_local": int(local[row]),
                "slots_cleared": int(cleared[row]),
                "imbalance_before": None if before is None else before[row],
                "imbalance_after": None if after is None else after[row],
            }
            for row, name in enumerate(self.old.layers)
        ]

    def come_and_gone(self, row: int) -> list[tuple[list[int], list[int]]]:
        """Return which experts each rank gets in a layer that it did not hold, and which it no longer holds."""
        ranks = []
        for held, holds in zip(self.old.by_rank(row), self.new.by_rank(row), strict=True):
            before, after = set(held) - {EMPTY}, set(holds) - {EMPTY}
            ranks.append((sorted(after - before), sorted(before - after)))
        return ranks

    def document(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        plan = self.plan
        layers = self.per_layer()
        for row, layer in enumerate(layers):
            layer["ranks"] = [{"gets": gets, "loses": loses} for gets, loses in self.come_and_gone(row)]
        sends = zip(
            plan.transfer_layer.tolist(),
            plan.transfer_expert.tolist(),
            plan.transfer_src_rank.tolist(),
            plan.transfer_src_slot.tolist(),
            plan.transfer_dst_rank.tolist(),
            strict=True,
        )
        return {
            "old": str(self.old.source),
            "new": str(self.new.source),
            "ranks": self.old.num_ranks,
            "nodes": len(set(plan.node_of_rank.tolist())),
            "slots": int(self.old.placement.shape[1]),
            "slots_changed": sum(layer["slots_changed"] for layer in layers),
            "experts_remote": plan.num_transfers,
            "experts_between_nodes": plan.num_between_nodes,
            "slots_local": plan.num_local_moves,
            "slots_cleared": plan.num_cleared,
            "expert_bytes": self.expert_bytes,
            "bytes_remote": None if self.expert_bytes is None else plan.bytes_moved(self.expert_bytes),
            "experts_from_to": plan.traffic(1).tolist(),
            "layers": layers,
            "transfers": [
                {
                    "layer": self.old.layers[layer],
                    "expert": expert,
                    "from_rank": source,
                    "from_slot": slot,
                    "to_rank": destination,
                }
                for layer, expert, source, slot, destination in sends
            ],
        }
