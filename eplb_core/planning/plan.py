"""From two placements to what has to cross between ranks, and where every slot's new bytes come from.

A plan says *what* moves; `eplb_core.scheduling.schedule` says in which bounded steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import numpy.typing as npt

from eplb_core.arrays import IntArray
from eplb_core.errors import InputError, PlacementError
from eplb_core.planning.holders import SendCounts, choose_holders, choose_relays
from eplb_core.planning.placement import EMPTY, align_slots, check_pair, check_shapes, lost_slots

_LARGEST_TABLE = 2**22
"""Up to this many keys are looked up in a table of all that can be, which is several times as fast as a search."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RearrangementPlan:
    """What moves between two placements. Plain read-only int64 arrays, sorted by layer.

    A *transfer* is one expert that crosses from one rank to another, once however many slots there need it. A *move* is
    one slot that gets another expert: out of a transfer, or out of another slot of the same rank. Slot numbers in
    transfers and moves are local to their rank. What they read are the contents of the old placement, except that a
    *relayed* transfer reads a slot that another transfer has filled.

    Attributes:
        num_ranks: the number of ranks.
        old: `[num_layers, num_slots]`, the placement before.
        new: `[num_layers, num_slots]`, the placement after; with `keep_slots` or lost experts not what was asked for.
        node_of_rank: `[num_ranks]`, the node that each rank runs on.
        transfer_layer: `[T]`.
        transfer_expert: `[T]`, logical expert.
        transfer_src_rank: `[T]`.
        transfer_src_slot: `[T]`, slot of the source rank that is read.
        transfer_dst_rank: `[T]`.
        transfer_after: `[T]`, index of the transfer that fills the slot that this one reads, -1 if it is not relayed.
        move_layer: `[M]`.
        move_rank: `[M]`, the rank whose slot is overwritten.
        move_slot: `[M]`, the slot that is overwritten.
        move_transfer: `[M]`, index of the transfer that brings the bytes, -1 if they are on the rank already.
        move_source: `[M]`, the slot of the same rank that holds the bytes, -1 if they come by a transfer.
        lost: `[K, 3]`: layer, slot counted over all ranks, and the expert that was wanted there, of which the old
            placement has no copy. These slots are empty in `new`.
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
    transfer_after: IntArray
    move_layer: IntArray
    move_rank: IntArray
    move_slot: IntArray
    move_transfer: IntArray
    move_source: IntArray
    lost: IntArray

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
    def num_between_nodes(self) -> int:
        """How many experts cross between two nodes."""
        return int(np.count_nonzero(self._crosses_nodes()))

    @property
    def num_relayed(self) -> int:
        """How many experts are relayed inside a node, by a rank that received them itself."""
        return int(np.count_nonzero(self.transfer_after >= 0))

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

    def traffic_between_nodes(self, expert_bytes: npt.ArrayLike) -> IntArray:
        """Return the bytes that each node sends to each other one, int64 `[num_nodes (source), num_nodes]`.

        Nodes are in ascending order of their numbers. The diagonal is zero: what stays inside a node is not counted.

        Args:
            expert_bytes: bytes of one expert, one number or `[num_layers]`.
        """
        numbers, node = np.unique(self.node_of_rank, return_inverse=True)
        matrix = np.zeros((len(numbers), len(numbers)), dtype=np.int64)
        crosses = self._crosses_nodes()
        source, destination = node[self.transfer_src_rank[crosses]], node[self.transfer_dst_rank[crosses]]
        np.add.at(
            matrix, (source, destination), layer_bytes(expert_bytes, self.num_layers)[self.transfer_layer[crosses]]
        )
        return matrix

    def summary(self, expert_bytes: npt.ArrayLike | None = None) -> str:
        """Return one line for people, with the bytes if the experts' sizes are given."""
        crossing = f"{_count(self.num_transfers, 'expert crosses', 'experts cross')} between ranks"
        if expert_bytes is not None:
            crossing += f" ({self.bytes_moved(expert_bytes) / 1e6:.1f} MB)"
        if len(np.unique(self.node_of_rank)) > 1:
            crossing += f", {self.num_between_nodes} of them between nodes"
            if expert_bytes is not None:
                crossing += f" ({self.traffic_between_nodes(expert_bytes).sum() / 1e6:.1f} MB)"
            crossing += f" and {self.num_relayed} relayed inside one"
        text = (
            f"{self.num_moves} of {_count(self.new.size, 'slot changes', 'slots change')} in "
            f"{_count(self.num_layers, 'layer', 'layers')} on {_count(self.num_ranks, 'rank', 'ranks')}: "
            f"{crossing}, {self.num_local_moves} copied on their rank, {self.num_duplicates} out of a shared transfer; "
            f"{_count(self.num_cleared, 'slot is', 'slots are')} cleared"
        )
        if len(self.lost):
            text += f"; {_count(len(self.lost), 'slot is', 'slots are')} left empty since no rank has the expert"
        return text

    def __str__(self) -> str:
        """Return the summary."""
        return self.summary()

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        """Two plans are equal if all their arrays are."""
        if not isinstance(other, RearrangementPlan):
            return NotImplemented
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    __hash__ = None  # type: ignore[assignment]  # arrays are compared by value, which no stable hash follows

    def _crosses_nodes(self) -> npt.NDArray[np.bool_]:
        crosses: npt.NDArray[np.bool_] = (
            self.node_of_rank[self.transfer_src_rank] != self.node_of_rank[self.transfer_dst_rank]
        )
        return crosses


def plan_rearrangement(
    old: npt.ArrayLike,
    new: npt.ArrayLike,
    num_ranks: int,
    node_of_rank: npt.ArrayLike | None = None,
    *,
    relay: bool | None = None,
    keep_slots: bool = False,
    missing: Literal["raise", "leave_empty"] = "raise",
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
        relay: whether an expert that several ranks of one node need, none of which holds it, crosses to one of them
            only, which sends it on to the others. None relays if nodes are given.
        keep_slots: whether the slots of each rank are re-ordered, so that an expert that stays on a rank keeps its
            slot. Every rank gets the experts that `new` gives it; the plan's `new` says in which slots.
        missing: what to do if `new` needs an expert of which `old` has no copy: raise, or leave its slots empty and
            list them in the plan's `lost`.

    Raises:
        LostExpertsError: `new` needs an expert of which `old` has no copy, and `missing` does not leave it out.
        PlacementError: a placement is not valid, they do not fit one another, or `node_of_rank` has a wrong length.
    """
    nodes = _check_nodes(node_of_rank, num_ranks)
    old, new, lost = _placements(old, new, num_ranks, keep_slots, missing)
    per_rank = old.shape[1] // num_ranks
    differs = old != new
    changed = np.flatnonzero(differs.any(axis=1))  # most layers of a small rearrangement are as they were
    before, after_it = old[changed], new[changed]
    width = 1 + max(int(before.max(initial=EMPTY)), int(after_it.max(initial=EMPTY)))

    layer, slot = np.nonzero(differs[changed] & (after_it != EMPTY))
    rank = slot // per_rank
    held_layer, held_slot = np.nonzero(before != EMPTY)
    held_expert = before[held_layer, held_slot]
    held_rank, held_local = np.divmod(held_slot, per_rank)
    # Of several slots, one that stays as it is comes first: reading it delays nothing and needs no save.
    preference = np.where(after_it[held_layer, held_slot] == held_expert, 0, per_rank) + held_local

    need = (layer * num_ranks + rank) * width + after_it[layer, slot]
    held = np.sort(((held_layer * num_ranks + held_rank) * width + held_expert) * (2 * per_rank) + preference)
    found = np.searchsorted(held, need * (2 * per_rank))
    candidate = held[np.minimum(found, max(len(held) - 1, 0))] if len(held) else np.zeros_like(need)
    is_local = candidate // (2 * per_rank) == need
    source = np.where(is_local, candidate % per_rank, -1)

    crossing, first_move, which = np.unique(need[~is_local], return_index=True, return_inverse=True)
    rank_key, expert = np.divmod(crossing, max(width, 1))
    transfer_layer, dst_rank = np.divmod(rank_key, num_ranks)
    transfer = np.full(len(need), -1, dtype=np.int64)
    transfer[~is_local] = which

    holder = np.sort(((held_layer * width + held_expert) * num_ranks + held_rank) * (2 * per_rank) + preference)
    holder = holder[np.diff(holder // (2 * per_rank), prepend=-1) != 0]  # one slot of each rank
    group, holder_rank = np.divmod(holder // (2 * per_rank), num_ranks)
    wanted = transfer_layer * width + expert
    counts = SendCounts(len(changed), num_ranks)
    after = np.full(len(wanted), -1, dtype=np.int64)
    if node_of_rank is not None if relay is None else relay:
        numbers, node = np.unique(nodes, return_inverse=True)
        key = wanted * len(numbers) + node[dst_rank]
        from_other_node = ~_is_in(key, group * len(numbers) + node[holder_rank])
        after = choose_relays(transfer_layer, dst_rank, key, from_other_node, counts)
    direct = np.flatnonzero(after < 0)
    begin, end = _bounds(group, wanted[direct])
    chosen = choose_holders(transfer_layer[direct], dst_rank[direct], begin, end, holder_rank, nodes, counts)
    src_rank, src_slot = dst_rank[after], (slot[~is_local][first_move] % per_rank)[after]
    src_rank[direct], src_slot[direct] = holder_rank[chosen], holder[chosen] % per_rank
    return RearrangementPlan(
        num_ranks=num_ranks,
        old=old,
        new=new,
        node_of_rank=nodes,
        transfer_layer=changed[transfer_layer],
        transfer_expert=expert,
        transfer_src_rank=src_rank,
        transfer_src_slot=src_slot,
        transfer_dst_rank=dst_rank,
        transfer_after=after,
        move_layer=changed[layer],
        move_rank=rank,
        move_slot=slot % per_rank,
        move_transfer=transfer,
        move_source=source,
        lost=lost,
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


def _check_nodes(node_of_rank: npt.ArrayLike | None, num_ranks: int) -> IntArray:
    if node_of_rank is None:
        return np.zeros(max(num_ranks, 0), dtype=np.int64)
    nodes = np.array(node_of_rank)
    if nodes.shape != (num_ranks,):
        raise PlacementError(f"the nodes of {num_ranks} ranks were given with shape {list(nodes.shape)}")
    if nodes.dtype.kind not in "iu":
        raise PlacementError(f"the nodes of the ranks are given as {nodes.dtype} values instead of integers")
    return nodes.astype(np.int64)


def _placements(
    old: npt.ArrayLike, new: npt.ArrayLike, num_ranks: int, keep_slots: bool, missing: str
) -> tuple[IntArray, IntArray, IntArray]:
    """Return copies of both placements, the new one as it is going to be, and what is lost."""
    if missing == "raise":
        old, new = check_pair(old, new, num_ranks)
    elif missing == "leave_empty":
        old, new = check_shapes(old, new, num_ranks)
    else:
        raise InputError(f"missing={missing!r} is neither 'raise' nor 'leave_empty'")
    old = old.copy()
    new = align_slots(old, new, num_ranks) if keep_slots else new.copy()
    lost = np.empty((0, 3), dtype=np.int64) if missing == "raise" else lost_slots(old, new)
    new[lost[:, 0], lost[:, 1]] = EMPTY
    return old, new, lost


def _is_in(keys: IntArray, held: IntArray) -> npt.NDArray[np.bool_]:
    """Return which of `keys`, from 0 on, are among `held`."""
    size = 1 + max(int(keys.max(initial=-1)), int(held.max(initial=-1)))
    if size > _LARGEST_TABLE:
        return np.isin(keys, held)
    table = np.zeros(size, dtype=np.bool_)
    table[held] = True
    return table[keys]


def _bounds(in_order: IntArray, wanted: IntArray) -> tuple[IntArray, IntArray]:
    """Return where the run of each of `wanted` begins and ends in `in_order`, which is sorted and has them all."""
    if not len(in_order) or int(in_order[-1]) >= _LARGEST_TABLE:
        return np.searchsorted(in_order, wanted, "left"), np.searchsorted(in_order, wanted, "right")
    count = np.bincount(in_order)
    end = np.cumsum(count)
    return (end - count)[wanted], end[wanted]


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
