"""Placements: which logical expert lies in which physical slot, whether that is valid, and how evenly it loads ranks.

A placement is an int64 array `[num_layers, num_slots]`, physical slot -> logical expert, -1 for an empty slot. Rank `r`
of `num_ranks` owns the slots `r * S` to `r * S + S - 1`, with `S = num_slots / num_ranks`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eplb_core.arrays import FloatArray, IntArray
from eplb_core.errors import InputError, LostExpertsError, PlacementError

EMPTY = -1
"""What a placement holds for a slot without an expert."""

_LARGEST_EXPERT = 2**31 - 1
_LARGEST_TABLE = 2**22  # entries; a larger one takes longer than a search


def as_array(placement: object) -> npt.ArrayLike:
    """Return a placement so that numpy can read it: a torch tensor may lie on any device.

    Raises:
        PlacementError: it is None, or a tensor that cannot be read.
    """
    if placement is None:
        raise PlacementError("the new placement is None")
    if callable(getattr(placement, "detach", None)) and callable(getattr(placement, "cpu", None)):
        try:
            read: npt.ArrayLike = placement.detach().cpu().numpy()  # type: ignore[attr-defined]
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise PlacementError("a placement cannot be read", why=f"{type(error).__name__}: {error}") from error
        return read
    return placement  # type: ignore[return-value]  # `check_placement` says what it is not


def check_placement(
    placement: npt.ArrayLike, num_ranks: int, *, num_logical: int | None = None, name: str = "placement"
) -> IntArray:
    """Return `placement` as a C-contiguous int64 array `[num_layers, num_slots]`, or say what is wrong with it.

    Args:
        placement: anything that numpy reads as a two-dimensional array of integers.
        num_ranks: the number of ranks that share the slots evenly.
        num_logical: the number of logical experts of each layer, if it is known.
        name: what messages call the placement.

    Raises:
        PlacementError: not two-dimensional, not of integers, no slots, slots that the ranks cannot share evenly, or a
            value that is neither -1 nor a logical expert. The message names the first such layer and slot.
    """
    if num_ranks < 1:
        raise PlacementError(f"{name}: the number of ranks is {num_ranks}, but must be at least 1")
    try:
        array = np.asarray(placement)
    except ValueError as error:
        raise PlacementError(f"{name} is not an array", why=str(error)) from error
    if array.ndim != 2:
        raise PlacementError(
            f"{name} has {array.ndim} dimensions",
            where=f"shape {array.shape}",
            remedy="give an array of shape [num_layers, num_slots]",
        )
    if array.dtype.kind not in "iu":
        raise PlacementError(
            f"{name} holds {array.dtype} values",
            why="a logical expert is an integer",
            remedy="convert it to int64",
        )
    num_slots = array.shape[1]
    if num_slots == 0 or num_slots % num_ranks:
        raise PlacementError(
            f"{name} has {num_slots} slots, which {num_ranks} ranks cannot share evenly",
            remedy="the number of slots must be a positive multiple of the number of ranks",
        )
    largest = _LARGEST_EXPERT if num_logical is None else num_logical - 1
    wrong = (array < EMPTY) | (array > largest)
    if wrong.any():
        layer, slot = (int(i) for i in np.argwhere(wrong)[0])
        raise PlacementError(
            f"{name} names logical expert {int(array[layer, slot])}, which does not exist",
            where=f"layer {layer}, slot {slot} of rank {slot // (num_slots // num_ranks)}",
            why=f"valid are 0 to {largest}, and {EMPTY} for an empty slot",
        )
    return np.ascontiguousarray(array, dtype=np.int64)


def check_pair(old: npt.ArrayLike, new: npt.ArrayLike, num_ranks: int) -> tuple[IntArray, IntArray]:
    """Check two placements, and that the first can be rearranged into the second.

    Args:
        old: `[num_layers, num_slots]`, where the experts are.
        new: the same shape, where they shall be.
        num_ranks: the number of ranks that share the slots.

    Returns:
        Both as C-contiguous int64 arrays.

    Raises:
        PlacementError: one of them is not valid, or their shapes differ.
        LostExpertsError: `new` needs an expert of which `old` has no copy in that layer.
    """
    old_array, new_array = check_shapes(old, new, num_ranks)
    lost = lost_slots(old_array, new_array)
    if lost.size:
        raise LostExpertsError({(layer, expert) for layer, _, expert in lost.tolist()})
    return old_array, new_array


def check_shapes(old: npt.ArrayLike, new: npt.ArrayLike, num_ranks: int) -> tuple[IntArray, IntArray]:
    """Do what `check_pair` does, but let `new` have experts of which `old` has no copy."""
    old_array = check_placement(old, num_ranks, name="the old placement")
    new_array = check_placement(new, num_ranks, name="the new placement")
    if old_array.shape != new_array.shape:
        raise PlacementError(
            f"the old placement has shape {list(old_array.shape)}, the new one {list(new_array.shape)}",
            why="a rearrangement keeps the number of layers and of slots",
            remedy="say both in the ranks of one group: eplb_core.planning.generations.remap_placement does that",
        )
    return old_array, new_array


def lost_slots(old: IntArray, new: IntArray) -> IntArray:
    """Return the slots whose new expert has no copy in the old placement, both valid and of one shape.

    Returns:
        int64 `[K, 3]`: layer, slot counted over all ranks, logical expert; sorted by layer and slot.
    """
    width = 1 + max(int(old.max(initial=EMPTY)), int(new.max(initial=EMPTY)))
    wanted = (new != old) & (new != EMPTY)
    if len(old) * (width + 1) <= _LARGEST_TABLE:
        has = np.zeros((len(old), width + 1), dtype=np.bool_)  # the last column answers for empty slots
        rows = np.arange(len(old))[:, None]
        has[rows, old] = True
        wanted &= ~has[rows, new]
    layer, slot = np.nonzero(wanted)
    expert = new[layer, slot]
    if not len(layer):
        return np.empty((0, 3), dtype=np.int64)
    held_layer, held_slot = np.nonzero(old != EMPTY)
    lost = ~np.isin(layer * width + expert, held_layer * width + old[held_layer, held_slot])
    return np.stack([layer[lost], slot[lost], expert[lost]], axis=1)


def align_slots(old: IntArray, new: IntArray, num_ranks: int) -> IntArray:
    """Return `new` with the slots of each rank re-ordered so that as many as can be hold what they held in `old`.

    Each rank has the same experts as in `new`, each as often. As many copies of an expert as the rank has in both
    placements keep their slots; what arrives takes the slot that `new` gives it, if that is free, or else another one.
    An empty slot counts as an expert here: it stays empty if the rank has empty slots in `new`.

    Args:
        old: int64 `[num_layers, num_slots]`, a valid placement.
        new: the same shape.
        num_ranks: the number of ranks that share the slots.
    """
    per_rank = old.shape[1] // num_ranks
    width = 2 + max(int(old.max(initial=EMPTY)), int(new.max(initial=EMPTY)))
    before, after = old.reshape(-1), new.reshape(-1)
    same = before == after
    rank = np.arange(before.size) // per_rank * width
    old_key, new_key = rank + before + 1, rank + after + 1
    # Of several copies, those that are in their places already come first.
    kept = _occurrence(old_key, same) < _count(new_key, old_key)
    arrives = _occurrence(new_key, same) >= _count(old_key, new_key)
    aligned = np.where(kept, before, after)
    displaced = arrives & kept  # its slot is kept for another expert of the rank
    free = ~kept & ~arrives  # its expert in `new` has kept another slot
    aligned[free] = after[displaced]
    return aligned.reshape(old.shape)


def load_per_rank(placement: npt.ArrayLike, loads: npt.ArrayLike, num_ranks: int) -> FloatArray:
    """Return the load that each rank bears, float64 `[num_layers, num_ranks]`.

    An expert's load is split evenly over its copies.

    Args:
        placement: `[num_layers, num_slots]`.
        loads: `[num_layers, num_logical]`, how often each logical expert is chosen, in any unit.
        num_ranks: the number of ranks that share the slots.

    Raises:
        InputError: the loads do not fit the placement, or are negative or not finite.
        PlacementError: the placement is not valid, or an expert with a load has no copy.
    """
    load_array = check_loads(loads)
    num_layers, num_logical = load_array.shape
    array = check_placement(placement, num_ranks, num_logical=num_logical)
    if array.shape[0] != num_layers:
        raise InputError(f"the loads have {num_layers} layers, the placement {array.shape[0]}")
    layer, slot = np.nonzero(array != EMPTY)
    key = layer * num_logical + array[layer, slot]
    copies = np.bincount(key, minlength=num_layers * num_logical).reshape(num_layers, num_logical)
    lost = np.argwhere((copies == 0) & (load_array > 0))
    if lost.size:
        raise PlacementError(
            f"logical expert {int(lost[0, 1])} has a load, but no copy in the placement",
            where=f"layer {int(lost[0, 0])}",
        )
    share = np.zeros(array.shape, dtype=np.float64)
    share[layer, slot] = (load_array / np.maximum(copies, 1)).reshape(-1)[key]
    per_rank: FloatArray = share.reshape(num_layers, num_ranks, -1).sum(axis=2)
    return per_rank


def imbalance(placement: npt.ArrayLike, loads: npt.ArrayLike, num_ranks: int) -> FloatArray:
    """Return each layer's largest load of a rank divided by the mean load, float64 `[num_layers]`.

    1.0 is perfect balance, `num_ranks` is all on one rank. A layer without any load counts as balanced. Arguments and
    errors are those of `load_per_rank`.
    """
    per_rank = load_per_rank(placement, loads, num_ranks)
    mean = per_rank.mean(axis=1)
    result = np.ones(len(per_rank), dtype=np.float64)
    np.divide(per_rank.max(axis=1, initial=0.0), mean, out=result, where=mean > 0)
    return result


def check_loads(loads: npt.ArrayLike) -> FloatArray:
    """Return `loads` as float64 `[num_layers, num_logical]`.

    Raises:
        InputError: not a two-dimensional array of numbers, a load that is negative or not finite, or loads so large
            that their sum is not finite.
    """
    try:
        array = np.asarray(loads, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise InputError("the loads are not an array of numbers", why=str(error)) from error
    if array.ndim != 2:
        raise InputError(
            f"the loads have {array.ndim} dimensions",
            where=f"shape {array.shape}",
            remedy="give an array of shape [num_layers, num_logical]",
        )
    wrong = np.argwhere(~(np.isfinite(array) & (array >= 0)))
    if wrong.size:
        layer, expert = (int(i) for i in wrong[0])
        raise InputError(
            f"the load {array[layer, expert]} is not a finite, non-negative number",
            where=f"layer {layer}, expert {expert}",
        )
    with np.errstate(over="ignore"):
        too_large = np.flatnonzero(~np.isfinite(array.sum(axis=1)))
    if too_large.size:
        raise InputError("the loads are too large to be added up", where=f"layer {int(too_large[0])}")
    return array


def contiguous_placement(num_layers: int, num_logical: int, num_slots: int, num_ranks: int) -> IntArray:
    """Return a placement to start from, int64 `[num_layers, num_slots]`, the same in every layer.

    Each rank holds a contiguous block of the logical experts, every expert once. The slots that are left on a rank hold
    second copies of the experts that lie half of the ranks away, so that copies sit on different ranks (and nodes).

    Raises:
        PlacementError: fewer slots than experts, or slots that the ranks cannot share evenly.
    """
    if min(num_logical, num_ranks) < 1 or num_layers < 0:
        raise PlacementError(f"cannot place {num_logical} logical experts of {num_layers} layers on {num_ranks} ranks")
    if num_slots < num_logical:
        raise PlacementError(
            f"{num_slots} slots cannot hold {num_logical} logical experts",
            remedy="use more slots, or more ranks",
        )
    if num_slots % num_ranks:
        raise PlacementError(f"{num_slots} slots cannot be shared evenly by {num_ranks} ranks")
    experts = np.arange(num_logical, dtype=np.int64)
    blocks = np.array_split(experts, num_ranks)
    first = np.cumsum([0] + [len(block) for block in blocks])
    per_rank = num_slots // num_ranks
    rows = []
    for rank, block in enumerate(blocks):
        opposite = int(first[(rank + max(1, num_ranks // 2)) % num_ranks])
        others = np.roll(experts, -opposite)
        if len(block) < num_logical:
            others = others[~np.isin(others, block)]
        rows.append(np.concatenate([block, others[np.arange(per_rank - len(block)) % len(others)]]))
    return np.tile(np.concatenate(rows), (num_layers, 1))


def _occurrence(key: IntArray, first: npt.NDArray[np.bool_]) -> IntArray:
    """Return for each element how many with the same key come before it; those that are `first` do, then in order."""
    order = np.argsort(key * 2 + ~first, kind="stable")
    in_order = key[order]
    position = np.arange(len(key))
    begins = np.diff(in_order, prepend=-1) != 0
    occurrence = np.empty_like(position)
    occurrence[order] = position - np.maximum.accumulate(np.where(begins, position, 0))
    return occurrence


def _count(keys: IntArray, wanted: IntArray) -> IntArray:
    """Return how often `keys` holds each of `wanted`."""
    in_order = np.sort(keys)
    count: IntArray = np.searchsorted(in_order, wanted, "right") - np.searchsorted(in_order, wanted, "left")
    return count
