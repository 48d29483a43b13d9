"""Groups whose ranks come and go: a group of its own for each membership, and placements carried from one to the next.

A membership is called a generation. Its ranks are numbered anew, from 0, so a placement of one generation has to be
said in the ranks of the other before weights can move: `remap_placement` does that, in both directions.

- To grow: make the new generation's communicator while the old one still works, remap the old placement, rearrange on
  the new one. The slots of ranks that joined count as empty.
- To shrink: remap the placement that is wanted to the ranks of the old generation, rearrange there, so that the ranks
  that leave hand over what they hold; then make the new generation's communicator and close the old one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from eplb_core.errors import PlacementError
from eplb_core.groups import StatelessGroup
from eplb_core.placement import EMPTY, IntArray, check_placement


def remap_placement(
    placement: npt.ArrayLike, num_ranks: int, new_rank_of: Mapping[int, int], new_num_ranks: int
) -> IntArray:
    """Return the same placement in the ranks of another generation, int64 `[num_layers, new_num_slots]`.

    Every rank keeps its number of slots. Slots of a rank that is not in `new_rank_of` are left out, those of a new
    rank that nobody becomes are empty (-1).

    Args:
        placement: `[num_layers, num_slots]`, what each slot holds.
        num_ranks: the number of ranks that share its slots.
        new_rank_of: rank -> its rank in the other generation, for each rank that is in both.
        new_num_ranks: the number of ranks of the other generation.

    Raises:
        PlacementError: the placement is not valid, or the mapping names a rank that does not exist, or names one twice.
    """
    array = check_placement(placement, num_ranks)
    _check_mapping(new_rank_of, num_ranks, new_num_ranks)
    slots = array.shape[1] // num_ranks
    remapped = np.full((array.shape[0], new_num_ranks * slots), EMPTY, dtype=np.int64)
    for old, new in new_rank_of.items():
        remapped[:, new * slots : (new + 1) * slots] = array[:, old * slots : (old + 1) * slots]
    return remapped


def generation_group(
    store: dist.Store, generation: int, rank: int, world_size: int, device_communicator: object | None = None
) -> StatelessGroup:
    """Return the group of one generation, whose messages cannot meet those of another one at the same store.

    Args:
        store: outlives every rank: hosted outside the workers, or by the one that starts them.
        generation: a number that no other membership at this store has, the same on every rank.
        rank: this process's rank in the generation.
        world_size: the number of ranks in it.
        device_communicator: the engine's device communicator of these ranks, or None.
    """
    return StatelessGroup(
        rank, world_size, dist.PrefixStore(f"eplb/generation/{generation}", store), device_communicator
    )


def _check_mapping(new_rank_of: Mapping[int, int], num_ranks: int, new_num_ranks: int) -> None:
    if new_num_ranks < 1:
        raise PlacementError(f"the new number of ranks is {new_num_ranks}, but must be at least 1")
    for ranks, count, which in (
        (new_rank_of.keys(), num_ranks, "old"),
        (new_rank_of.values(), new_num_ranks, "new"),
    ):
        outside = [rank for rank in ranks if not 0 <= rank < count]
        if outside:
            raise PlacementError(
                f"the mapping names {which} rank {outside[0]}, which does not exist",
                why=f"the {which} ranks are 0 to {count - 1}",
            )
    twice = sorted(new for new in set(new_rank_of.values()) if list(new_rank_of.values()).count(new) > 1)
    if twice:
        olds = ", ".join(str(old) for old, new in new_rank_of.items() if new == twice[0])
        raise PlacementError(f"the mapping makes old ranks {olds} all new rank {twice[0]}")
