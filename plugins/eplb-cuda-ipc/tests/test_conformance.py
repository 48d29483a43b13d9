"""The contract, by eplb's conformance kit: over the stand-in on any machine, over CUDA where there is a GPU."""

from __future__ import annotations

import pytest
from own_checks import FAILURES, ON_ANY_DEVICE, ON_STANDIN, RESCUE

from eplb_core.testing import BackendConformance


class TestStandin(BackendConformance):
    config = "cuda_ipc_standin"
    ranks = (3,)
    stateless = True
    background = True
    extra_checks = (*ON_STANDIN, *RESCUE)


class TestTwoRanks(BackendConformance):
    config = "cuda_ipc_standin"
    ranks = (2,)
    stateless = True
    background = True
    checks = (
        "nothing_queued_is_a_round_like_any_other",
        "every_dtype_arrives_bit_for_bit",
        "odd_sizes_arrive",
        "tensors_without_elements_are_sent",
        "sent_tensors_may_be_overwritten_on_return",
        "the_statistics_count_the_payload",
    )
    extra_checks = (*ON_STANDIN, *FAILURES)


class TestFourRanksAndASmallWindow(BackendConformance):
    config = "cuda_ipc_standin?packed=64KiB"
    ranks = (4,)
    stateless = True
    background = True
    checks = (
        "messages_of_a_pair_keep_their_order",
        "many_small_tensors_arrive",
        "uneven_traffic_arrives",
        "every_rank_sends_to_every_other",
        "several_transfers_may_be_under_way",
        "a_plan_that_all_trust_is_moved_all_the_same",
    )
    extra_checks = ON_STANDIN


@pytest.mark.gpu
class TestOnAGpu(BackendConformance):
    """All ranks share the machine's GPUs, one if there is one."""

    config = "cuda_ipc"
    devices = ("cuda",)
    ranks = (2, 4)
    stateless = True
    background = True
    extra_checks = (*ON_ANY_DEVICE, *RESCUE)
