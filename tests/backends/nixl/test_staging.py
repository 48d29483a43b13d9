"""Staging memory stays within the `window` option whatever the number of ranks, the mode and the experts' size."""

from __future__ import annotations

import datetime
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_core.control.groups import StatelessGroup
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment, run_local_ranks
from eplb_core.rearrange.rearranger import Rearranger

WINDOW = 1 << 20
LAYERS, SLOTS = 2, 3
SIZES = (250_000, 64)  # of an expert's tensors: larger than a slot and than either transport window, and a scale


def rearranged(environment: RankEnvironment, sizes_of_groups: list[int]) -> dict[tuple[int, str], tuple[int, bool]]:
    """Rearrange in groups of the first ranks; return the most staging memory, and whether every byte was right."""
    found = {}
    for world_size, mode in product(sizes_of_groups, ("packed", "direct")):
        name = f"{world_size} {mode}"
        store = dist.PrefixStore(name, environment.store)
        if environment.rank < world_size:
            found[world_size, mode] = _rearrange(StatelessGroup(environment.rank, world_size, store), mode)
            store.set(f"done {environment.rank}", "")
        store.wait([f"done {rank}" for rank in range(world_size)], datetime.timedelta(seconds=60))
    return found


def _rearrange(group: StatelessGroup, mode: str) -> tuple[int, bool]:
    rank, world_size = group.rank_in_group, group.world_size
    drawn = np.random.default_rng(world_size)
    old, new = (
        np.stack([drawn.permutation(world_size * SLOTS) for _ in range(LAYERS)]).astype(np.int64) for _ in range(2)
    )
    mine = slice(rank * SLOTS, (rank + 1) * SLOTS)
    weights = [[_experts(layer, old[layer, mine], nbytes) for nbytes in SIZES] for layer in range(LAYERS)]
    with create_eplb_communicator(group, f"nixl?window=1MiB&mode={mode}&timeout=20s", weights[0]) as communicator:
        most = communicator.staging_bytes
        result = Rearranger(communicator, weights).run(old, new)
        most = max(most, communicator.staging_bytes, result.staging_bytes)
    right = all(
        torch.equal(weights[layer][number], _experts(layer, new[layer, mine], nbytes))
        for layer in range(LAYERS)
        for number, nbytes in enumerate(SIZES)
    )
    return most, right and np.array_equal(result.placement, new)


def _experts(layer: int, experts: np.ndarray, nbytes: int) -> torch.Tensor:
    """Return uint8 `[slots, nbytes]`: bytes that depend on layer, expert and place."""
    rows = [np.random.default_rng([layer, int(e), nbytes]).integers(0, 256, nbytes, dtype=np.uint8) for e in experts]
    return torch.from_numpy(np.stack(rows))


def check(sizes_of_groups: list[int]) -> None:
    everyone = run_local_ranks(rearranged, max(sizes_of_groups), (sizes_of_groups,), timeout_s=110)
    for rank, found in enumerate(everyone):
        assert {size for size, _ in found} == {size for size in sizes_of_groups if size > rank}
        for case, (most, right) in found.items():
            assert right, case
            assert 0 < most <= WINDOW, case


def test_two_and_four_ranks_stay_within_the_window() -> None:
    check([2, 4])


@pytest.mark.nightly
def test_eight_ranks_stay_within_the_window() -> None:
    check([2, 4, 8])
