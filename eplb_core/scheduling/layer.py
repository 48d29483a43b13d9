"""What has to happen in one layer, what it may use, and what came out: the input and the output of cutting a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MOVE_COLUMNS = 5
"""How many numbers of `LayerMoves.moves` belong to one move."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What each rank may use in one step, in bytes.

    Attributes:
        window: experts received into the window, and slots saved.
        sends: experts sent.
        receives: experts received.
    """

    window: int
    sends: int
    receives: int


class Use:
    """What each rank uses in one step, in bytes; lists by rank, see `Budget`."""

    __slots__ = ("receives", "sends", "window")

    def __init__(self, num_ranks: int) -> None:
        self.window = [0] * num_ranks
        self.sends = [0] * num_ranks
        self.receives = [0] * num_ranks


class SlotMap:
    """Where the slots of a layer are, the same for all layers. Slots are numbered over all ranks.

    Attributes:
        num_ranks: the number of ranks.
        rank_of: slot -> its rank.
        node_of: slot -> the node of its rank.
        levels: of these two those that tell slots apart: all, or only the ranks if there is one node.
        in_turn: all slots, the first one of every rank, then the second ones, and so on.
    """

    __slots__ = ("in_turn", "levels", "node_of", "num_ranks", "rank_of")

    def __init__(self, node_of_rank: Sequence[int], slots_per_rank: int) -> None:
        self.num_ranks = len(node_of_rank)
        self.rank_of = [rank for rank in range(self.num_ranks) for _ in range(slots_per_rank)]
        self.node_of = [node for node in node_of_rank for _ in range(slots_per_rank)]
        self.levels = [self.rank_of, self.node_of] if len(set(node_of_rank)) > 1 else [self.rank_of]
        num_slots = len(self.rank_of)
        self.in_turn = [slot for first in range(slots_per_rank) for slot in range(first, num_slots, slots_per_rank)]


@dataclass(frozen=True, slots=True)
class LayerTask:
    """What has to happen in a layer.

    Attributes:
        old: `[num_slots]`, the experts before.
        new: `[num_slots]`, the experts after; each has a copy in `old`.
        expert_bytes: bytes of an expert in the window.
        planned_source: `expert * num_ranks + destination rank` -> the rank that the plan reads it from, preferred if it
            can be.
        places: where the slots are; a source on the same node is read if there is one.
        relay: whether an expert crosses to a node without a copy only once, and is read there by the others.
    """

    old: Sequence[int]
    new: Sequence[int]
    expert_bytes: int
    planned_source: Mapping[int, int]
    places: SlotMap
    relay: bool = False


@dataclass(slots=True)
class LayerMoves:
    """The moves of one layer, part after part. Those of a part run together.

    There are thousands of moves in a schedule, so they are plain numbers in one list: no object for each, and one array
    of all in the end.

    Attributes:
        moves: `MOVE_COLUMNS` numbers for each move: slot, expert, source slot, transfer, 1 if it lands. Transfers
            are counted from 0. A move with a source and a transfer begins this transfer, and the bytes land in the
            slot, or else in the window. One without a source (-1) has its bytes out of the window, from an earlier
            transfer of its part. One without a transfer (-1) is copied on its rank.
        vacated: slots that are empty when a part has ended.
        ends: for each part: its step, the number of its moves, and of its vacated slots. None is without both.
    """

    moves: list[int] = field(default_factory=list)
    vacated: list[int] = field(default_factory=list)
    ends: list[tuple[int, int, int]] = field(default_factory=list)
