"""A bystander of a paced job, which exchanges nothing, is told of a failure at the question that it waits at."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from eplb_core.contract.communicator import PendingTransfer
from eplb_core.errors import PeerLostError
from eplb_core.launch.local_ranks import RankEnvironment
from eplb_core.rearrange.step_runner import StepRunner
from tests.rearrange.test_job_faults import OLD, ROW, begin, ended, outcome_of

BURST_BYTES = 64 << 10  # the smallest burst of a pace


def one_rank_dies_over_pairs(environment: RankEnvironment, rows: int) -> dict[str, Any]:
    """The same over a transport where a rank hears of its peers alone, as the one-sided ones are.

    The transport is the one thing that stands in for a real one: it takes a step of rank 0, which exchanges nothing, as
    moved at once, and tells rank 1 at the first burst from rank 2 that rank 2 is gone.
    """
    new = OLD.copy()
    new[:, 2 : 2 + rows], new[:, 4 : 4 + rows] = OLD[:, 4 : 4 + rows], OLD[:, 2 : 2 + rows]
    _, _, start = begin(environment, "torch_gloo", OLD, new, pace=f"{BURST_BYTES}B/s")

    def transfer(*arguments: object) -> PendingTransfer:
        if environment.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if environment.rank == 1:
            raise PeerLostError("rank 2 is gone", peers=[2], phase="read")
        return PendingTransfer(None)

    StepRunner.transfer_slices = transfer  # type: ignore[method-assign, assignment]
    return outcome_of(start().wait)


@pytest.mark.parametrize("rows", [1, 2], ids=["the step is one burst", "the step is two bursts"])
def test_a_bystander_of_a_paced_job_is_told_at_the_question_that_it_waits_at(rows: int) -> None:
    assert ROW < BURST_BYTES < 2 * ROW  # so a step takes as many bursts as experts go into a rank

    bystander, peer, _ = ended(one_rank_dies_over_pairs, rows)

    for outcome in (bystander, peer):
        assert outcome.result is not None, outcome.message
        # Without the answer, the bystander's own timeout would end it, and blame rank 1, which lives, too.
        assert (outcome.result["error"], outcome.result["peers"]) == ("PeerLostError", (2,)), outcome.result
        assert outcome.result["placement"].tolist() == OLD.tolist()
