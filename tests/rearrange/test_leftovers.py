"""What rearrangements leave at the store does not grow with their number."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_core.control.groups import StatelessGroup
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.rearrange.rearranger import _MOST_FORGOTTEN, Rearranger

RANKS, SLOTS, LAYERS = 2, 2, 8
OLD = np.tile(np.arange(RANKS * SLOTS), (LAYERS, 1))
NEW = OLD[:, ::-1].copy()


@pytest.mark.parametrize("kind", ["run", "start", "start with a pace", "cancel"])
def test_a_store_does_not_fill_with_what_earlier_rearrangements_left(kind: str) -> None:
    store, together = dist.HashStore(), Barrier(RANKS, timeout=60)

    def rearrange(rearranger: Rearranger) -> None:
        if kind == "run":
            rearranger.run(OLD, NEW)
            return
        job = rearranger.start(OLD, NEW, pace="20MB/s" if kind == "start with a pace" else None)
        if kind == "cancel":
            job.cancel()
        job.wait(60)

    def work(rank: int) -> list[int]:
        weights = [[torch.zeros(SLOTS, 1000)] for _ in range(LAYERS)]
        counts = []
        with create_eplb_communicator(StatelessGroup(rank, RANKS, store), "nixl?window=1MiB", weights[0]) as made:
            rearranger = Rearranger(made, weights)
            for _ in range(20):
                rearrange(rearranger)
                rearranger.run(None, OLD)
                together.wait()
                counts.append(store.num_keys())
                together.wait()
        return counts

    with ThreadPoolExecutor(RANKS) as threads:
        counts, *_ = [made.result(100) for made in [threads.submit(work, rank) for rank in range(RANKS)]]
    assert max(counts) <= counts[0] + 2 * (_MOST_FORGOTTEN + 1)
