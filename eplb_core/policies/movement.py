"""The same plan with fewer moves: ranks are relabelled, and what stays on a rank keeps its slot."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from eplb_core.arrays import IntArray
from eplb_core.errors import PlacementError
from eplb_core.planning.placement import EMPTY, align_slots, check_shapes
from eplb_core.policies.assignment import assign

CountArray = npt.NDArray[np.int16]


def minimize_movement(
    old: npt.ArrayLike, new: npt.ArrayLike, num_ranks: int, *, num_nodes: int = 1, relabel: bool = True
) -> IntArray:
    """Return a placement that loads ranks as `new` does, and receives as few slots anew as that allows.

    What one rank holds in `new` is given to the rank that already holds most of it, and within each rank what stays
    keeps its slot. So the loads of the ranks are those of `new` in another order, and the imbalance is the same.

    Args:
        old: `[num_layers, num_slots]`, where the experts are, -1 = empty.
        new: the same shape, where a policy wants them.
        num_ranks: ranks that share the slots evenly.
        num_nodes: nodes whose ranks must stay together, in rank order: nodes are relabelled as a whole, and ranks
            within them. 1 lets any rank take the place of any other.
        relabel: False only keeps slots: every rank gets what `new` gives it.

    Returns:
        int64 `[num_layers, num_slots]`.

    Raises:
        PlacementError: a placement is not valid, they do not fit one another, or the nodes cannot share the ranks.
    """
    old, new = check_shapes(old, new, num_ranks)
    if num_nodes < 1 or num_ranks % num_nodes:
        raise PlacementError(f"{num_ranks} ranks cannot be shared evenly by {num_nodes} nodes")
    if relabel and new.size:
        new = np.stack([relabelled(*rows, num_ranks, num_nodes) for rows in zip(old, new, strict=True)])
    return align_slots(old, new, num_ranks)


def relabelled(old: IntArray, new: IntArray, num_ranks: int, num_nodes: int) -> IntArray:
    """Return one layer of `new` with its ranks in the order that keeps most of `old`, both int64 `[num_slots]`."""
    if np.array_equal(old, new):
        return new
    kept = _kept(old, new, num_ranks)
    if num_nodes == 1:
        source = assign(kept)
    else:
        inside = num_ranks // num_nodes
        blocks = kept.reshape(num_nodes, inside, num_nodes, inside).swapaxes(1, 2)
        within = [[assign(block) for block in row] for row in blocks]
        value = np.array(
            [
                [int(block[np.arange(inside), taken].sum()) for block, taken in zip(row, chosen, strict=True)]
                for row, chosen in zip(blocks, within, strict=True)
            ]
        )
        node_of = assign(value)
        source = np.concatenate([node * inside + within[here][node] for here, node in enumerate(node_of.tolist())])
    return new.reshape(num_ranks, -1)[source].reshape(-1)


def copies_on_ranks(placement: IntArray, num_ranks: int, num_logical: int) -> CountArray:
    """Return how many copies of each expert each rank holds, int16 `[num_ranks, num_logical]`, of one layer."""
    count = np.zeros((num_ranks, num_logical), dtype=np.int16)
    slot = np.flatnonzero(placement != EMPTY)
    np.add.at(count, (slot // (len(placement) // num_ranks), placement[slot]), 1)
    return count


def slots_anew(old: IntArray, new: IntArray, num_ranks: int) -> IntArray:
    """Return how many slots of each rank hold what the rank did not hold before, int64 `[num_layers, num_ranks]`.

    A second copy of an expert on a rank counts too, although it does not cross between ranks. Empty slots do not.
    """
    num_logical = 1 + max(int(old.max(initial=EMPTY)), int(new.max(initial=EMPTY)))
    anew = np.zeros((len(old), num_ranks), dtype=np.int64)
    for layer, (before, after) in enumerate(zip(old, new, strict=True)):
        had, has = (copies_on_ranks(row, num_ranks, num_logical) for row in (before, after))
        anew[layer] = np.maximum(has - had, 0).sum(axis=1)
    return anew


def crossing_slots(old: IntArray, new: IntArray, num_ranks: int) -> IntArray:
    """Return how many experts each rank receives from others, int64 `[num_layers, num_ranks]`.

    An expert that a rank needs in several slots crosses once, and one that it holds already does not.
    """
    num_logical = 1 + max(int(old.max(initial=EMPTY)), int(new.max(initial=EMPTY)))
    crossing = np.zeros((len(old), num_ranks), dtype=np.int64)
    for layer, (before, after) in enumerate(zip(old, new, strict=True)):
        had, has = (copies_on_ranks(row, num_ranks, num_logical) for row in (before, after))
        crossing[layer] = ((has > 0) & (had == 0)).sum(axis=1)
    return crossing


def _kept(old: IntArray, new: IntArray, num_ranks: int) -> IntArray:
    """Return how many slots are kept if a rank (row) gets what another one (column) holds in `new`."""
    num_logical = 1 + max(int(old.max(initial=EMPTY)), int(new.max(initial=EMPTY)))
    had, has = (copies_on_ranks(row, num_ranks, num_logical) for row in (old, new))
    kept = np.zeros((num_ranks, num_ranks), dtype=np.float32)
    for often in range(1, int(min(had.max(initial=0), has.max(initial=0))) + 1):
        # Small whole numbers: exact in float32, whose products are many times as fast.
        kept += (had >= often).astype(np.float32) @ (has >= often).astype(np.float32).T
    return kept.astype(np.int64)
