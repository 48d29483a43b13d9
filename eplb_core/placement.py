"""Placements: which logical expert lies in which physical slot, whether that is valid, and how evenly it loads ranks.

A placement is an int64 array `[num_layers, num_slots]`, physical slot -> logical expert, -1 for an empty slot. Rank `r`
of `num_ranks` owns the slots `r * S` to `r * S + S - 1`, with `S = num_slots / num_ranks`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eplb_core.errors import InputError, PlacementError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

EMPTY = -1
"""What a placement holds for a slot without an expert."""

_LARGEST_EXPERT = 2**31 - 1


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
        PlacementError: one of them is not valid, their shapes differ, or `new` needs an expert of which `old` has no
            copy in that layer. The message names the layer and the experts.
    """
    old_array = check_placement(old, num_ranks, name="the old placement")
    new_array = check_placement(new, num_ranks, name="the new placement")
    if old_array.shape != new_array.shape:
        raise PlacementError(
            f"the old placement has shape {list(old_array.shape)}, the new one {list(new_array.shape)}",
            why="a rearrangement keeps the number of layers and of slots",
        )
    width = 1 + max(int(old_array.max(initial=EMPTY)), int(new_array.max(initial=EMPTY)))
    old_keys = _held_experts(old_array, width)
    missing = np.setdiff1d(_held_experts(new_array, width), old_keys, assume_unique=True)
    if missing.size:
        layer = int(missing[0]) // width
        experts = [int(key) % width for key in missing if int(key) // width == layer]
        shown = ", ".join(map(str, experts[:8])) + (", ..." if len(experts) > 8 else "")
        layers = np.unique(missing // width).size
        raise PlacementError(
            f"the new placement needs logical experts of which no rank has a copy: {shown}",
            where=f"layer {layer}" + (f" and {layers - 1} more layers" if layers > 1 else ""),
            why="weights can only be moved from a slot of the old placement",
            remedy="load these experts from the checkpoint, or leave them out of the new placement",
        )
    return old_array, new_array


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


def _held_experts(placement: IntArray, width: int) -> IntArray:
    """Return the sorted, distinct keys `layer * width + expert` of all experts that `placement` holds."""
    layer, slot = np.nonzero(placement != EMPTY)
    return np.unique(layer * width + placement[layer, slot])
