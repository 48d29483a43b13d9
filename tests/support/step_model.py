"""Performs steps with tokens for experts; knows slots, windows and the rules in the docstring of `Step` only.

Slots hold tokens `(layer, expert)`; windows hold one token for each 256 bytes and are poisoned before every step.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from eplb_core.scheduling.schedule import ALIGNMENT, Step

POISON = ("poison", -1)
EMPTIED = ("emptied", -1)


@dataclass
class Model:
    """What all slots of all ranks really hold, and the checks that any step must pass."""

    old: np.ndarray
    new: np.ndarray
    num_ranks: int
    sizes: list[int]
    window_bytes: int
    slots: dict[tuple[int, int, int], tuple[object, int]] = field(default_factory=dict)  # (layer, rank, slot)
    transfers: list[tuple[int, int, int, int]] = field(default_factory=list)  # (layer, expert, from rank, to rank)
    landed: int = 0  # transfers that went into slots
    most_sent: int = 0
    most_received: int = 0
    most_staged: int = 0

    def __post_init__(self) -> None:
        self.per_rank = self.old.shape[1] // self.num_ranks
        for (layer, slot), expert in np.ndenumerate(self.old):
            self.slots[layer, *divmod(slot, self.per_rank)] = (layer, int(expert)) if expert >= 0 else EMPTIED

    def blocks(self, layer: int) -> int:
        return -(-self.sizes[layer] // ALIGNMENT)

    def run(self, steps: list[Step]) -> None:
        placement = self.old
        for step in steps:
            self.run_one(step, placement)
            placement = step.apply(placement)
            for layer, slot in np.argwhere(placement < 0):
                self.slots[int(layer), *divmod(int(slot), self.per_rank)] = EMPTIED
            self.check_slots(placement)
            self.check_nothing_lost(placement)

    def run_one(self, step: Step, placement: np.ndarray) -> None:
        windows = defaultdict(lambda: [POISON] * (self.window_bytes // ALIGNMENT))
        taken: dict[int, Counter[int]] = defaultdict(Counter)
        sent, received = Counter(), Counter()

        def store(rank: int, offset: int, layer: int, token: tuple[object, int]) -> None:
            assert offset % ALIGNMENT == 0
            first, count = offset // ALIGNMENT, self.blocks(layer)
            assert first + count <= len(windows[rank]), "it does not fit into the window"
            for block in range(first, first + count):
                assert taken[rank][block] == 0, "two experts overlap in the window"
                taken[rank][block] += 1
                windows[rank][block] = token

        def load(rank: int, offset: int, layer: int) -> tuple[object, int]:
            first, count = offset // ALIGNMENT, self.blocks(layer)
            (token,) = set(windows[rank][first : first + count])
            return token

        landed = {}
        for layer, expert, src_rank, src_slot, dst_rank, kind, destination in step.transfers.tolist():
            assert src_rank != dst_rank
            token = self.slots[layer, src_rank, src_slot]
            assert token == (layer, expert)
            if kind == 1:
                store(dst_rank, destination, layer, token)
            else:
                assert placement[layer, dst_rank * self.per_rank + destination] < 0, "the slot is in use"
                assert (layer, dst_rank, destination) not in landed, "two experts land in one slot"
                landed[layer, dst_rank, destination] = token
                self.landed += 1
            sent[src_rank] += self.blocks(layer) * ALIGNMENT
            received[dst_rank] += self.blocks(layer) * ALIGNMENT
            self.transfers.append((layer, expert, src_rank, dst_rank))
        self.slots.update(landed)  # when all have been read: what is read in a step is as it was before it

        by_level = groupby(step.copies.tolist(), key=lambda copy: (copy[0], copy[2]))
        seen = []
        for (rank, level), group in by_level:
            seen.append((rank, level))
            copies = list(group)
            read = {(layer, src) for _, layer, _, kind, src, _, _ in copies if kind == 0}
            written = [(layer, dst) for _, layer, _, _, _, kind, dst in copies if kind == 0]
            assert len(written) == len(set(written)), "one slot is written twice in a level"
            assert not read & set(written), "a level overwrites what it reads"
            for _, layer, _, src_kind, src, dst_kind, dst in reversed(copies):
                token = load(rank, src, layer) if src_kind == 1 else self.slots[layer, rank, src]
                if dst_kind == 1:
                    assert (level, src_kind) == (0, 0), "only slots are saved, and only at level 0"
                    store(rank, dst, layer, token)
                else:
                    assert level > 0
                    self.slots[layer, rank, dst] = token
        assert seen == sorted(set(seen)), "copies are sorted by rank and level"

        staged = [max((block + 1 for block in taken[rank]), default=0) * ALIGNMENT for rank in range(self.num_ranks)]
        assert step.staged_bytes.tolist() == staged
        self.most_sent = max(self.most_sent, *sent.values(), 0)
        self.most_received = max(self.most_received, *received.values(), 0)
        self.most_staged = max(self.most_staged, *staged)

    def check_slots(self, placement: np.ndarray) -> None:
        for (layer, slot), expert in np.ndenumerate(placement):
            if expert >= 0:
                assert self.slots[layer, *divmod(slot, self.per_rank)] == (layer, expert)

    def check_nothing_lost(self, placement: np.ndarray) -> None:
        for before, now, after in zip(self.old, placement, self.new, strict=True):
            assert set(before) & set(after) - {-1} <= set(now)
