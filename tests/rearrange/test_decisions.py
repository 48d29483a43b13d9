"""Ranks of one host that go on rearranging decide in a journal: no message to the store, one outcome for all."""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_core.control.groups import TorchGroups
from eplb_core.control.journal_record import JournalRecord, _Entry
from eplb_core.errors import TransferError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment, collect_local_ranks
from eplb_core.rearrange.rearranger import Rearranger
from tests.rearrange.test_rearrange import SLOTS, fill, random_placement, wrong_slots

RUNS = 8
ASKED = ("set", "get", "add", "wait", "check", "compare_set", "multi_get", "delete_key")


def count_messages(counted: Counter[str]) -> None:
    """Count from now on what this process asks stores."""
    for name in ASKED:
        asked = getattr(dist.PrefixStore, name)

        def ask(self: dist.Store, *arguments: Any, name: str = name, asked: Any = asked) -> Any:
            counted[name] += 1
            return asked(self, *arguments)

        setattr(dist.PrefixStore, name, ask)


def rearranges(environment: RankEnvironment, dies: str) -> dict[str, Any]:
    """Rearrange again and again; in the end rank 1 may die before it says yes to the second step, or after it."""
    rng = np.random.default_rng(31)
    weights = [[torch.zeros(SLOTS, 4001, dtype=torch.uint8)] for _ in range(4)]
    placements = [random_placement(rng, 4, environment.world_size) for _ in range(RUNS + 1)]
    fill(weights, placements[0], environment.rank)
    environment.init_process_group()
    communicator = create_eplb_communicator(TorchGroups(), "nixl?timeout=3s", weights[0])
    rearranger = Rearranger(communicator, weights, window_bytes=6 * 4352, in_place="never")
    counted: Counter[str] = Counter()
    decide = JournalRecord.decide
    steps = []

    def deciding(record: JournalRecord, key: str) -> Any:
        if dies and len(steps) == RUNS - 1 and environment.rank == 1 and key == "step 1":
            if dies == "after":
                record._append(_Entry(record._call, key, environment.rank))
            os.kill(os.getpid(), signal.SIGKILL)
        return decide(record, key)

    JournalRecord.decide = deciding  # type: ignore[method-assign]
    placement, error = placements[0], ""
    for number in range(RUNS):
        if number == RUNS // 2:
            count_messages(counted)
        try:
            result = rearranger.run(placement, placements[number + 1])
        except TransferError as failure:
            placement = np.full_like(placement, 99) if failure.placement is None else failure.placement
            error = f"{type(failure).__name__} {failure.peers}"
            break
        placement = result.placement
        steps.append(result.steps)
    told = {
        "error": error,
        "messages": dict(counted) if not dies else {},
        "steps": steps,
        "placement": placement,
        "wrong": wrong_slots(weights, placement, environment.rank),
    }
    communicator.close()
    return told


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_rearranging_again_asks_the_store_nothing(ranks: int) -> None:
    for outcome in collect_local_ranks(rearranges, ranks, ("",), timeout_s=60.0, grace_s=60.0):
        assert outcome.succeeded, outcome
        assert outcome.result["messages"] == {}
        assert (outcome.result["error"], outcome.result["wrong"]) == ("", [])
        assert max(outcome.result["steps"]) > 1


@pytest.mark.parametrize("dies", ["before", "after"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_survivors_of_a_rank_that_dies_at_a_vote_hold_the_same(ranks: int, dies: str) -> None:
    outcomes = collect_local_ranks(rearranges, ranks, (dies,), timeout_s=60.0, grace_s=60.0)
    survivors = [outcome for outcome in outcomes if outcome.rank != 1]
    for outcome in survivors:
        assert outcome.succeeded, outcome
        # Where the second step is the last one, and rank 1 had said yes to it, nothing is left that could fail.
        assert "(1,)" in outcome.result["error"] or dies == "after"
        assert outcome.result["wrong"] == []
        assert np.array_equal(outcome.result["placement"], survivors[0].result["placement"])
