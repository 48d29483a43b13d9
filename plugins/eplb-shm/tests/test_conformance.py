"""The contract, by eplb's conformance kit."""

from __future__ import annotations

from eplb_core.testing import BackendConformance


class TestShm(BackendConformance):
    config = "shm"
    ranks = (2, 3)
    stateless = True
    background = True


class TestTheSmallestWindow(BackendConformance):
    config = "shm?window=4KiB"
    ranks = (2,)
    stateless = True
    background = True
    checks = (
        "messages_of_a_pair_keep_their_order",
        "odd_sizes_arrive",
        "many_small_tensors_arrive",
        "uneven_traffic_arrives",
        "every_rank_sends_to_every_other",
    )
