"""Four ranks on two nodes move real weights with relays and kept slots: every byte is where the placement says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from eplb_core.arrays import IntArray
from eplb_core.planning.placement import EMPTY
from eplb_core.rearrange.rearranger import Rearranger
from tests.support.ranks import Member, Report, Scenario, run_scenarios

BACKENDS = ("torch_gloo", "nixl?window=1MiB")
NODES = (0, 0, 1, 1)
LAYERS, SLOTS, NUMBERS = 4, 4, 300
WINDOWS = {"all": None, "one expert": 1280}
KEPT = {("torch_gloo", "one expert"), ("nixl?window=1MiB", "all")}


def expert(layer: int, logical: int) -> torch.Tensor:
    """Return one expert: random, and a function of nothing but the arguments."""
    return torch.from_numpy(np.random.default_rng([layer, logical]).standard_normal(NUMBERS).astype(np.float32))


def placement(seed: int) -> IntArray:
    """Return a placement with few experts, each many times: what one node needs and lacks, several ranks there need."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.append(np.arange(6), rng.choice([EMPTY, seed % 6], 10))) for _ in range(LAYERS)]
    return np.array(rows, dtype=np.int64)


def wrong_slots(weights: list[list[torch.Tensor]], now: IntArray, rank: int) -> list[tuple[int, int]]:
    """Return `(layer, slot)` of what is not the expert that the placement says."""
    return [
        (layer, slot)
        for layer, row in enumerate(now[:, rank * SLOTS : (rank + 1) * SLOTS].tolist())
        for slot, logical in enumerate(row)
        if logical != EMPTY and not torch.equal(weights[layer][0][slot], expert(layer, logical))
    ]


def relayed_rearrangements(member: Member, config: str, window: str, keep_slots: bool) -> list[dict[str, Any]]:
    """Go from one placement to the next, by `run` and in the background in turn, and say what is wrong after each."""
    now, told = placement(0), []
    weights = [[torch.full((SLOTS, NUMBERS), -1.0)] for _ in range(LAYERS)]
    for layer, row in enumerate(now[:, member.rank * SLOTS : (member.rank + 1) * SLOTS].tolist()):
        for slot, logical in enumerate(row):
            if logical != EMPTY:
                weights[layer][0][slot] = expert(layer, logical)
    with member.communicator(config) as communicator:
        rearranger = Rearranger(communicator, weights, window_bytes=WINDOWS[window], node_of_rank=NODES)
        for seed in range(1, 7):
            if seed % 2 == 0:
                result = rearranger.start(now, placement(seed), keep_slots=keep_slots).wait(timeout=60)
            else:
                result = rearranger.run(now, placement(seed), keep_slots=keep_slots)
            now = result.placement
            told.append({"wrong": wrong_slots(weights, now, member.rank), "placement": now.tolist(), "seed": seed})
    return told


CASES = [(config, window, (config, window) in KEPT) for config in BACKENDS for window in WINDOWS]


@pytest.fixture(scope="module")
def report() -> Report:
    return run_scenarios(4, [Scenario(str(case), relayed_rearrangements, case) for case in CASES])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_relayed_experts_are_right_to_the_byte(report: Report, case: tuple[str, str, bool]) -> None:
    for runs in report.returned(str(case)):
        assert [run["wrong"] for run in runs] == [[]] * 6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rank_ends_with_the_experts_that_it_was_to_have(report: Report, case: tuple[str, str, bool]) -> None:
    for run in report.returned(str(case))[0]:
        for reached, asked in zip(run["placement"], placement(run["seed"]).tolist(), strict=True):
            for rank in range(4):
                own = slice(rank * SLOTS, (rank + 1) * SLOTS)
                assert Counter(reached[own]) == Counter(asked[own])
                assert case[2] or reached[own] == asked[own]
