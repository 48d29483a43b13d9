"""A rank that dies beside a background job is the one that all others blame, also those that wait for it in vain."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch

from eplb_core.errors import EplbError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import Outcome, RankEnvironment, collect_local_ranks
from eplb_core.rearrange.job import RearrangeJob
from eplb_core.rearrange.rearranger import Rearranger
from eplb_core.rearrange.step_runner import StepRunner

TIMEOUT_S = 4.0
LIMIT_S = 60.0  # for a busy machine; far below commit_timeout_s, which would be waited for otherwise
NEVER_S = 3600.0
ROW = 50_000
RANKS = 3


def begin(environment: RankEnvironment, config: str, old: Any, new: Any, **more: Any) -> tuple[Any, Rearranger, Any]:
    """Return a communicator, a rearranger with two slots of 50 kB a rank, and a function that starts a job."""
    from eplb_core.control.groups import TorchGroups

    environment.init_process_group()
    joined = "&" if "?" in config else "?"
    mine = old[:, 2 * environment.rank : 2 * environment.rank + 2]
    weights = [
        [torch.stack([torch.full((ROW,), expert, dtype=torch.uint8) for expert in layer])] for layer in mine.tolist()
    ]
    communicator = create_eplb_communicator(TorchGroups(), f"{config}{joined}timeout={TIMEOUT_S:g}s", weights[0])
    rearranger = Rearranger(communicator, weights)
    environment.store.add("ready", 1)
    environment.store.wait(["ready"])

    def start() -> RearrangeJob:
        return rearranger.start(old, new, commit_timeout_s=NEVER_S, **more)

    return communicator, rearranger, start


def outcome_of(call: Any) -> dict[str, Any]:
    began = time.monotonic()
    try:
        result = call()
    except EplbError as error:
        return {
            "error": type(error).__name__,
            "text": str(error),
            "peers": getattr(error, "peers", ()),
            "seconds": time.monotonic() - began,
            "placement": getattr(error, "placement", None),
        }
    return {"error": "", "result": result, "seconds": time.monotonic() - began}


OLD = np.arange(6).reshape(1, 6).repeat(6, axis=0)
BETWEEN_1_AND_2 = OLD[:, [0, 1, 4, 5, 2, 3]]


def one_rank_dies(environment: RankEnvironment, config: str, pace: str | None) -> dict[str, Any]:
    """Ranks 1 and 2 exchange experts, rank 0 has nothing to do; rank 2 dies when it should send."""
    _, _, start = begin(environment, config, OLD, BETWEEN_1_AND_2, pace=pace)
    if environment.rank == 2:

        def die(*arguments: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        StepRunner.transfer_slices = die  # type: ignore[method-assign, assignment]
    return outcome_of(start().wait)


def ended(target: Any, *arguments: Any) -> list[Outcome]:
    outcomes = collect_local_ranks(target, RANKS, arguments, timeout_s=100.0, grace_s=90.0)
    for outcome in outcomes:
        assert outcome.error is None, outcome.trace
    return outcomes


@pytest.mark.parametrize("pace", ["100kB/s", "20GB/s", None])
def test_a_bystander_blames_the_rank_that_died_and_nobody_else(pace: str | None) -> None:
    bystander, peer, _ = ended(one_rank_dies, "torch_gloo", pace)
    for outcome in (bystander, peer):
        assert outcome.result is not None, outcome.message
        assert outcome.result["peers"] == (2,), outcome.result
        assert outcome.result["seconds"] < LIMIT_S
