"""Groups whose ranks come and go: a group of its own for each membership, and placements carried from one to the next.

A membership is called a generation. Its ranks are numbered anew, from 0, so a placement of one generation has to be
said in the ranks of the other before weights can move: `remap_placement` does that, in both directions. Which rank
becomes which is a dict, rank -> rank in the other generation; `rank_mapping` makes it from the members of both.

- To grow: make the new generation's communicator while the old one still works, remap the old placement, rearrange on
  the new one. The slots of ranks that joined count as empty.
- To shrink: remap the placement that is wanted to the ranks of the old generation, rearrange there, so that the ranks
  that leave hand over what they hold; then make the new generation's communicator and close the old one.
- To go on without ranks that died: remap the placement that the failed rearrangement left behind to the survivors.
  Slots of the dead are gone, and experts that only they held are lost (`LostExpertsError`, or a loader).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from eplb_core.arrays import IntArray
from eplb_core.errors import PlacementError
from eplb_core.planning.placement import EMPTY, check_placement

GONE = -1
"""What a mapping may say of a rank that is not in the other generation; it may leave it out as well."""


def rank_mapping(before: Sequence[Hashable], after: Sequence[Hashable]) -> dict[int, int]:
    """Return rank -> rank in the next generation, for every member of both.

    Swap the arguments for the mapping back.

    Args:
        before: the members of one generation in the order of their ranks: anything that names a process for as long as
            it lives, such as its rank at the start, or host and process id.
        after: those of the next one. Members that are not in `before` have joined, others may have left.

    Raises:
        PlacementError: a generation has one member twice.
    """
    new_rank: dict[Hashable, int] = {}
    for members, which in ((before, "before"), (after, "after")):
        new_rank = {member: rank for rank, member in enumerate(members)}
        if len(new_rank) < len(members):
            twice = next(member for rank, member in enumerate(members) if new_rank[member] != rank)
            raise PlacementError(f"{twice!r} is a member of the generation {which} twice")
    return {rank: new_rank[member] for rank, member in enumerate(before) if member in new_rank}


def reverse_mapping(new_rank_of: Mapping[int, int]) -> dict[int, int]:
    """Return the mapping back, new rank -> old rank, without ranks that are gone.

    Raises:
        PlacementError: two ranks have the same new rank.
    """
    stays = {rank: new for rank, new in as_mapping(new_rank_of).items() if new != GONE}
    _check_distinct(stays)
    return {new: rank for rank, new in stays.items()}


def as_mapping(new_rank_of: object) -> dict[int, int]:
    """Return a mapping from rank to rank as a dict of plain numbers.

    Raises:
        PlacementError: it is no mapping, or a rank in it is not a whole number.
    """
    if not isinstance(new_rank_of, Mapping):
        raise PlacementError(
            f"a mapping from rank to rank is a {type(new_rank_of).__name__}",
            remedy="give a dict, old rank -> new rank; rank_mapping makes one of the members of both generations",
        )
    for rank in (*new_rank_of.keys(), *new_rank_of.values()):
        if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
            raise PlacementError(f"the mapping names rank {rank!r}, which is not a whole number")
    return {int(rank): int(new) for rank, new in new_rank_of.items()}


def remap_placement(
    placement: npt.ArrayLike, num_ranks: int, new_rank_of: Mapping[int, int], new_num_ranks: int
) -> IntArray:
    """Return the same placement in the ranks of another generation, int64 `[num_layers, new_num_slots]`.

    Every rank keeps its number of slots. Slots of a rank that is not in `new_rank_of` are left out, those of a new
    rank that nobody becomes are empty (-1). So a mapping of the survivors to themselves empties the slots of the dead,
    and one to all ranks in another order re-orders them.

    Args:
        placement: `[num_layers, num_slots]`, what each slot holds.
        num_ranks: the number of ranks that share its slots.
        new_rank_of: rank -> its rank in the other generation, for each rank that is in both; -1, or no entry, for a
            rank that is not.
        new_num_ranks: the number of ranks of the other generation.

    Raises:
        PlacementError: the placement is not valid, or the mapping names a rank that does not exist, or names one twice.
    """
    array = check_placement(placement, num_ranks)
    new_rank_of = as_mapping(new_rank_of)
    stays = {rank: new for rank, new in new_rank_of.items() if new != GONE}
    _check_mapping(stays, num_ranks, new_num_ranks)
    for rank in new_rank_of.keys() - stays.keys():
        _check_exists([rank], num_ranks, "old")
    slots = array.shape[1] // num_ranks
    remapped = np.full((array.shape[0], new_num_ranks * slots), EMPTY, dtype=np.int64)
    for old, new in stays.items():
        remapped[:, new * slots : (new + 1) * slots] = array[:, old * slots : (old + 1) * slots]
    return remapped


def _check_mapping(new_rank_of: Mapping[int, int], num_ranks: int, new_num_ranks: int) -> None:
    if new_num_ranks < 1:
        raise PlacementError(f"the new number of ranks is {new_num_ranks}, but must be at least 1")
    _check_exists(new_rank_of.keys(), num_ranks, "old")
    _check_exists(new_rank_of.values(), new_num_ranks, "new")
    _check_distinct(new_rank_of)


def _check_exists(ranks: Iterable[int], count: int, which: str) -> None:
    outside = [rank for rank in ranks if not 0 <= rank < count]
    if outside:
        raise PlacementError(
            f"the mapping names {which} rank {outside[0]}, which does not exist",
            why=f"the {which} ranks are 0 to {count - 1}",
        )


def _check_distinct(new_rank_of: Mapping[int, int]) -> None:
    old_ranks: dict[int, list[int]] = {}
    for rank, new in new_rank_of.items():
        old_ranks.setdefault(new, []).append(rank)
    for new, ranks in sorted(old_ranks.items()):
        if len(ranks) > 1:
            raise PlacementError(f"the mapping makes old ranks {', '.join(map(str, ranks))} all new rank {new}")
