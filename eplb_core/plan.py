"""From two placements to what has to cross between ranks, and where every slot's new bytes come from.

A plan says *what* moves; `eplb_core.schedule` says in which bounded steps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from eplb_core.errors import InputError, PlacementError
from eplb_core.placement import EMPTY, IntArray, check_pair

_FORMAT = "eplb-plan/1"


@dataclass(frozen=True, slots=True, eq=False)
class RearrangementPlan:
    """What moves between two placements. Plain read-only int64 arrays, sorted by layer.

    A *transfer* is one expert that crosses from one rank to another, once however many slots there need it. A *move* is
    one slot that gets another expert: out of a transfer, or out of another slot of the same rank. Slot numbers in
    transfers and moves are local to their rank; expert contents are those of the old placement.

    Attributes:
        num_ranks: the number of ranks.
        old: `[num_layers, num_slots]`, the placement before.
        new: `[num_layers, num_slots]`, the placement after.
        node_of_rank: `[num_ranks]`, the node that each rank runs on.
        transfer_layer: `[T]`.
        transfer_expert: `[T]`, logical expert.
        transfer_src_rank: `[T]`.
        transfer_src_slot: `[T]`, slot of the source rank that is read.
        transfer_dst_rank: `[T]`.
        move_layer: `[M]`.
        move_rank: `[M]`, the rank whose slot is overwritten.
        move_slot: `[M]`, the slot that is overwritten.
        move_transfer: `[M]`, index of the transfer that brings the bytes, -1 if they are on the rank already.
        move_source: `[M]`, the slot of the same rank that holds the bytes, -1 if they come by a transfer.
    """

    num_ranks: int
    old: IntArray
    new: IntArray
    node_of_rank: IntArray
    transfer_layer: IntArray
    transfer_expert: IntArray
    transfer_src_rank: IntArray
    transfer_src_slot: IntArray
    transfer_dst_rank: IntArray
    move_layer: IntArray
    move_rank: IntArray
    move_slot: IntArray
    move_transfer: IntArray
    move_source: IntArray

    def __post_init__(self) -> None:
        """Make the arrays read-only, so that a plan can be shared."""
        for field in fields(self):
            if field.name != "num_ranks":
                getattr(self, field.name).setflags(write=False)

    @property
    def num_layers(self) -> int:
        """The number of layers of both placements."""
        return int(self.old.shape[0])

    @property
    def slots_per_rank(self) -> int:
        """The number of slots of one rank in one layer."""
        return int(self.old.shape[1]) // self.num_ranks

    @property
    def num_moves(self) -> int:
        """How many slots get another expert."""
        return len(self.move_layer)

    @property
    def num_transfers(self) -> int:
        """How many experts cross between two ranks."""
        return len(self.transfer_layer)

    @property
    def num_local_moves(self) -> int:
        """How many slots are filled out of another slot of the same rank."""
        return int(np.count_nonzero(self.move_transfer < 0))

    @property
    def num_duplicates(self) -> int:
        """How many slots are filled by a transfer that fills another slot of the same rank too."""
        return self.num_moves - self.num_local_moves - self.num_transfers

    @property
    def num_cleared(self) -> int:
        """How many slots lose their expert and get none."""
        return int(np.count_nonzero((self.old != EMPTY) & (self.new == EMPTY)))

    def bytes_moved(self, expert_bytes: npt.ArrayLike) -> int:
        """Return the bytes that cross between ranks.

        Args:
            expert_bytes: bytes of one expert, one number or `[num_layers]`.
        """
        return int(layer_bytes(expert_bytes, self.num_layers)[self.transfer_layer].sum())

    def traffic(self, expert_bytes: npt.ArrayLike) -> IntArray:
        """Return the bytes that each rank sends to each other, int64 `[num_ranks (source), num_ranks (destination)]`.

        Args:
            expert_bytes: bytes of one expert, one number or `[num_layers]`.
        """
        matrix = np.zeros((self.num_ranks, self.num_ranks), dtype=np.int64)
        size = layer_bytes(expert_bytes, self.num_layers)[self.transfer_layer]
        np.add.at(matrix, (self.transfer_src_rank, self.transfer_dst_rank), size)
        return matrix

    def summary(self, expert_bytes: npt.ArrayLike | None = None) -> str:
        """Return one line for people, with the bytes if the experts' sizes are given."""
        crossing = f"{self.num_transfers} experts cross between ranks"
        if expert_bytes is not None:
            crossing += f" ({self.bytes_moved(expert_bytes) / 1e6:.1f} MB)"
        return (
            f"{self.num_moves} of {self.new.size} slots change in {self.num_layers} layers on {self.num_ranks} ranks: "
            f"{crossing}, {self.num_local_moves} are copied on their rank, "
            f"{self.num_duplicates} share a transfer; {self.num_cleared} slots are cleared"
        )

    def __str__(self) -> str:
        """Return the summary."""
        return self.summary()

    def __eq__(self, other: object) -> bool:
        """Two plans are equal if all their arrays are."""
        if not isinstance(other, RearrangementPlan):
            return NotImplemented
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    __hash__ = None  # type: ignore[assignment]  # arrays are compared by value, which no stable hash follows

    def to_json(self) -> str:
        """Return the plan as JSON text that `from_json` reads back to an equal plan."""
        content: dict[str, Any] = {"format": _FORMAT, "num_ranks": self.num_ranks}
        content |= {f.name: getattr(self, f.name).tolist() for f in fields(self) if f.name != "num_ranks"}
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> RearrangementPlan:
        """Read a plan that `to_json` wrote, and check that it turns its old placement into its new one.

        Raises:
            InputError: the text is not a plan.
            PlacementError: its placements are not valid, or its transfers and moves do not fit them.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise InputError("this is not a rearrangement plan", why=f"not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise InputError("this is not a rearrangement plan", why=f"it has no format {_FORMAT!r}")
        names = [f.name for f in fields(cls)]
        missing = sorted(set(names) - content.keys())
        if missing:
            raise InputError("this rearrangement plan is not complete", why="no " + ", ".join(missing))
        num_ranks = content["num_ranks"]
        if type(num_ranks) is not int or num_ranks < 1:
            raise InputError(f"a rearrangement plan for {num_ranks!r} ranks cannot be")
        old, new = check_pair(content["old"], content["new"], num_ranks)
        arrays = {name: _int_vector(content[name], name) for name in names[3:]}
        plan = cls(num_ranks, old, new, **arrays)
        _check_consistent(plan)
        return plan


def plan_rearrangement(
    old: npt.ArrayLike, new: npt.ArrayLike, num_ranks: int, node_of_rank: npt.ArrayLike | None = None
) -> RearrangementPlan:
    """Plan how to get from one placement to another.

    A slot that already holds the right expert does nothing. An expert that several slots of one rank need crosses once.
    It is taken from the same rank if that holds it, else from a rank of the same node, else from any; among several
    holders from the one with the fewest sends in this layer, then in all. The same input gives the same plan anywhere.

    Args:
        old: `[num_layers, num_slots]`, where the experts are, -1 = empty.
        new: the same shape, where they shall be, -1 = left empty.
        num_ranks: the number of ranks that share the slots evenly.
        node_of_rank: `[num_ranks]`, any integer that is the same for ranks of one node; None puts all on one node.

    Raises:
        PlacementError: a placement is not valid, they do not fit one another, or `node_of_rank` has a wrong length.
    """
    old, new = check_pair(old, new, num_ranks)
    old, new = old.copy(), new.copy()
    nodes = np.zeros(num_ranks, dtype=np.int64) if node_of_rank is None else np.array(node_of_rank, dtype=np.int64)
    if nodes.shape != (num_ranks,):
        raise PlacementError(f"the nodes of {num_ranks} ranks were given with shape {list(nodes.shape)}")
    per_rank = old.shape[1] // num_ranks
    width = 1 + max(int(old.max(initial=EMPTY)), int(new.max(initial=EMPTY)))

    layer, slot = np.nonzero((new != old) & (new != EMPTY))
    rank = slot // per_rank
    held_layer, held_slot = np.nonzero(old != EMPTY)
    held_expert = old[held_layer, held_slot]
    held_rank, held_local = np.divmod(held_slot, per_rank)
    # Of several slots, one that stays as it is comes first: reading it delays nothing and needs no save.
    preference = np.where(new[held_layer, held_slot] == held_expert, 0, per_rank) + held_local

    need = (layer * num_ranks + rank) * width + new[layer, slot]
    held = np.sort(((held_layer * num_ranks + held_rank) * width + held_expert) * (2 * per_rank) + preference)
    found = np.searchsorted(held, need * (2 * per_rank))
    candidate = held[np.minimum(found, max(len(held) - 1, 0))] if len(held) else np.zeros_like(need)
    is_local = candidate // (2 * per_rank) == need
    source = np.where(is_local, candidate % per_rank, -1)

    crossing, which = np.unique(need[~is_local], return_inverse=True)
    rank_key, expert = np.divmod(crossing, max(width, 1))
    transfer_layer, dst_rank = np.divmod(rank_key, num_ranks)
    transfer = np.full(len(need), -1, dtype=np.int64)
    transfer[~is_local] = which

    holder = np.sort(((held_layer * width + held_expert) * num_ranks + held_rank) * (2 * per_rank) + preference)
    holder_key = holder // (2 * per_rank)
    holder = holder[np.diff(holder_key, prepend=-1) != 0]  # one slot of each rank
    group, holder_rank = np.divmod(holder // (2 * per_rank), num_ranks)
    wanted = transfer_layer * width + expert
    begin, end = np.searchsorted(group, wanted, "left"), np.searchsorted(group, wanted, "right")
    chosen = _choose_holders(begin, end, holder_rank, transfer_layer, dst_rank, nodes)
    return RearrangementPlan(
        num_ranks=num_ranks,
        old=old,
        new=new,
        node_of_rank=nodes,
        transfer_layer=transfer_layer,
        transfer_expert=expert,
        transfer_src_rank=holder_rank[chosen],
        transfer_src_slot=holder[chosen] % per_rank,
        transfer_dst_rank=dst_rank,
        move_layer=layer,
        move_rank=rank,
        move_slot=slot % per_rank,
        move_transfer=transfer,
        move_source=source,
    )


def layer_bytes(expert_bytes: npt.ArrayLike, num_layers: int) -> IntArray:
    """Return the bytes of one expert of each layer, int64 `[num_layers]`, from one number or one a layer.

    Raises:
        InputError: another length, not integers, or negative.
    """
    array = np.asarray(expert_bytes)
    if array.ndim == 0:
        array = np.full(num_layers, array)
    if array.shape != (num_layers,) or array.dtype.kind not in "iu" or bool((array < 0).any()):
        raise InputError(
            f"the bytes of one expert must be one non-negative integer, or one for each of the {num_layers} layers",
            where=f"shape {list(array.shape)} of {array.dtype}",
        )
    return array.astype(np.int64)


def _choose_holders(
    begin: IntArray,
    end: IntArray,
    holder_rank: IntArray,
    layer: IntArray,
    dst_rank: IntArray,
    nodes: IntArray,
) -> IntArray:
    """Choose for each transfer one of the holders `begin` to `end - 1`, so that sends are spread over ranks.

    Transfers without a choice are counted first. The others choose greedily, those with the fewest holders first, all
    layers side by side, a few transfers of each layer at a time: a choice does not see those of the same round, which
    hardly unbalances anything and keeps the number of rounds, and so the time, bounded.

    Returns:
        `[T]`, index into the holders.
    """
    num_ranks = len(nodes)
    chosen = begin.copy()
    if not len(chosen):
        return chosen
    num_layers = int(layer.max()) + 1
    count = end - begin
    forced = count == 1
    sends = np.bincount(layer[forced] * num_ranks + holder_rank[begin[forced]], minlength=num_layers * num_ranks)
    total = sends.reshape(num_layers, num_ranks).sum(axis=0)
    free = np.flatnonzero(~forced)
    if not len(free):
        return chosen
    free = free[np.lexsort((free, count[free], layer[free]))]
    per_layer = np.bincount(layer[free], minlength=num_layers)
    position = np.arange(len(free)) - np.repeat(np.cumsum(per_layer) - per_layer, per_layer)
    rounds = position // (1 + int(per_layer.max()) // 64)
    free = free[np.argsort(rounds, kind="stable")]
    for batch in np.split(free, np.cumsum(np.bincount(rounds))[:-1]):
        options = begin[batch, None] + np.arange(int(count[batch].max()))
        exists = options < end[batch, None]
        options = np.where(exists, options, begin[batch, None])
        ranks = holder_rank[options]
        here = layer[batch, None] * num_ranks
        cost = (nodes[ranks] != nodes[dst_rank[batch], None]).astype(np.int64)
        cost = (cost << 20) + sends[here + ranks]
        cost = (cost << 28) + total[ranks]
        # Ties go to the next rank after the destination, so that requests of one round do not all meet at rank 0.
        cost = cost * num_ranks + (ranks - dst_rank[batch, None]) % num_ranks
        best = options[np.arange(len(batch)), np.where(exists, cost, np.iinfo(np.int64).max).argmin(axis=1)]
        chosen[batch] = best
        sends += np.bincount(layer[batch] * num_ranks + holder_rank[best], minlength=len(sends))
        total += np.bincount(holder_rank[best], minlength=num_ranks)
    return chosen


def _int_vector(values: object, name: str) -> IntArray:
    """Return a JSON list of integers as int64 `[n]`."""
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise InputError(f"{name!r} of a rearrangement plan is not a list of integers")
    return np.array(values, dtype=np.int64)


def _check_consistent(plan: RearrangementPlan) -> None:
    """Check that transfers and moves exist, read what they say, and together make the new placement."""
    per_rank, num_layers = plan.slots_per_rank, plan.num_layers
    bounds = {
        "node_of_rank": None,
        "transfer_layer": (0, num_layers),
        "transfer_expert": (0, None),
        "transfer_src_rank": (0, plan.num_ranks),
        "transfer_src_slot": (0, per_rank),
        "transfer_dst_rank": (0, plan.num_ranks),
        "move_layer": (0, num_layers),
        "move_rank": (0, plan.num_ranks),
        "move_slot": (0, per_rank),
        "move_transfer": (-1, plan.num_transfers),
        "move_source": (-1, per_rank),
    }
    for name, bound in bounds.items():
        values = getattr(plan, name)
        length = {"n": plan.num_ranks, "t": plan.num_transfers, "m": plan.num_moves}[name[0]]
        if len(values) != length:
            raise PlacementError(f"{name!r} of the plan has {len(values)} values instead of {length}")
        if bound and (bool((values < bound[0]).any()) or (bound[1] is not None and bool((values >= bound[1]).any()))):
            raise PlacementError(f"{name!r} of the plan has a value outside of {bound[0]} to {bound[1]}")
    source = plan.transfer_src_rank * per_rank + plan.transfer_src_slot
    remote = plan.move_transfer >= 0
    index = plan.move_transfer[remote]
    moved = np.full(plan.num_moves, EMPTY)
    moved[remote] = plan.transfer_expert[index]
    moved[~remote] = plan.old[plan.move_layer[~remote], plan.move_rank[~remote] * per_rank + plan.move_source[~remote]]
    result = np.where(plan.new == EMPTY, EMPTY, plan.old)
    result[plan.move_layer, plan.move_rank * per_rank + plan.move_slot] = moved
    consistent = (
        np.array_equal(plan.old[plan.transfer_layer, source], plan.transfer_expert)
        and bool((plan.move_source[~remote] >= 0).all())
        and np.array_equal(plan.transfer_layer[index], plan.move_layer[remote])
        and np.array_equal(plan.transfer_dst_rank[index], plan.move_rank[remote])
        and np.array_equal(result, plan.new)
    )
    if not consistent:
        raise PlacementError("the transfers and moves of the plan do not turn its old placement into its new one")
