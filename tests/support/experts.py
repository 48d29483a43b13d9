"""The experts of one rank, each filled with its number, and a rearranger over them whose ranks meet where one likes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.rearrange.rearranger import Rearranger
from tests.support.ranks import Member

PLACES = ("at the store", "on a board")
"""Where the ranks meet: in memory that they share once they have met a few times."""

UNTIL_A_BOARD = 4
LAYERS, SLOTS, ROW = 3, 2, 1000


class Experts:
    """The experts of one rank, each filled with its number; and a rearranger over them."""

    def __init__(self, member: Member, config: str, place: str = PLACES[0]) -> None:
        self.rank, self.world_size = member.rank, member.world_size
        self.first = np.tile(np.arange(SLOTS * member.world_size), (LAYERS, 1))
        self.second = np.roll(self.first, SLOTS, axis=1)
        self.weights = [[torch.zeros(SLOTS, ROW, dtype=torch.int32)] for _ in range(LAYERS)]
        self.fill(self.first)
        self.communicator: EplbCommunicator = member.communicator(config, self.weights[0])
        self.rearranger = Rearranger(self.communicator, self.weights)
        calls = self.rearranger._calls
        if place == PLACES[0]:
            calls._control.meet_at_board = lambda name, deadline: (None, [])  # type: ignore[method-assign]
        for _ in range(UNTIL_A_BOARD if place == PLACES[1] else 0):
            self.rearranger.run(self.first, self.first)
        assert (calls._board is not None) == (place == PLACES[1])

    def fill(self, placement: Any) -> None:
        for layer, (tensor,) in enumerate(self.weights):
            for slot in range(SLOTS):
                tensor[slot] = int(placement[layer, self.rank * SLOTS + slot])

    def wrong(self, placement: Any) -> list[tuple[int, int]]:
        """Return layer and slot wherever a slot of this rank does not hold what the placement says, in every word."""
        return [
            (layer, slot)
            for layer, (tensor,) in enumerate(self.weights)
            for slot in range(SLOTS)
            if not torch.equal(tensor[slot], torch.full_like(tensor[slot], placement[layer, self.rank * SLOTS + slot]))
        ]

    def goes_on(self) -> dict[str, Any]:
        """Rearrange there and back, at once and beside inference, and compare all slots each time."""
        wrong = []
        there = self.rearranger.run(self.first, self.second)
        wrong += self.wrong(self.second)
        self.rearranger.start(self.second, self.first).wait(30)
        wrong += self.wrong(self.first)
        self.communicator.close()
        return {"wrong": wrong, "moved": there.moved}


def everybody_is_here(member: Member, place: str) -> None:
    store = member.environment.store
    if store.add(f"here {place}", 1) == member.world_size:
        store.set(f"all {place}", "yes")
    store.wait([f"all {place}"])
