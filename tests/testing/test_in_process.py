"""Ranks that are threads: they keep the contract, and what goes wrong on one is raised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from eplb_core import Rearranger, StatelessGroup, create_eplb_communicator
from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.control.groups import TorchGroups
from eplb_core.errors import PeerLostError, TransferMismatchError, UnknownBackendError
from eplb_core.launch.local_ranks import RankEnvironment
from eplb_core.testing import Check, RankContext, Subject, all_checks, in_process
from eplb_core.testing.check import Place, SkippedError

SUBJECT = Subject(config="in_process", stateless=True, background=True)
OF_PROCESSES = (
    "a_stopped_rank_holds_nobody_up_beyond_the_timeout",
    "a_sub_group_has_ranks_of_its_own",
    "it_works_in_the_background",
    "it_leaks_no_threads",  # the other ranks are threads
    "it_leaks_no_file_descriptors",
    "it_leaks_no_memory",
    "it_leaves_nothing_in_shared_memory",
)
"""Checks that look at, or stop, the whole process of a rank, or make process groups."""

CHECKS = [
    check
    for check in all_checks(thorough=False)
    if check.place is Place.RANKS and not check.kills and check.name not in OF_PROCESSES
]


class ThreadContext(RankContext):
    """What a check is given, on a rank that is a thread."""

    def __init__(self, group: StatelessGroup) -> None:
        rank, size = group.rank_in_group, group.world_size
        super().__init__(RankEnvironment(rank, size, rank, size, group.store), SUBJECT)
        self.group = group

    def new_groups(self, ranks: Sequence[int] | None = None) -> TorchGroups:
        return self.group  # type: ignore[return-value]  # a check only passes it on

    def create(
        self, groups: TorchGroups | StatelessGroup | None = None, *, timeout_s: float = 15.0
    ) -> EplbCommunicator:
        arguments = {"timeout": timeout_s}
        return create_eplb_communicator(
            groups or self.group, SUBJECT.config, [], arguments=arguments, registry=in_process.registry()
        )


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_it_keeps_the_contract(check: Check, ranks: int) -> None:
    if ranks < check.least_ranks:
        pytest.skip("it takes more ranks")
    if "cuda" in check.needs:
        pytest.skip("it moves CPU tensors")

    def work(group: StatelessGroup) -> str:
        context = ThreadContext(group)
        try:
            check.function(context)
        except SkippedError as reason:
            return str(reason)
        finally:
            context.finish()
        return ""

    skipped = in_process.run_ranks(ranks, work, timeout_s=check.deadline_s)
    if any(skipped):
        pytest.skip(skipped[0])


def test_experts_are_rearranged_between_threads() -> None:
    old, new = np.array([[0, 1, 2, 3, 4, 5]]), np.array([[5, 0, 4, 1, 3, 2]])

    def work(group: StatelessGroup) -> list[int]:
        mine = slice(2 * group.rank_in_group, 2 * group.rank_in_group + 2)
        weights = [[torch.tensor(old[0, mine]).repeat_interleave(5).view(2, 5)]]
        with create_eplb_communicator(group, "in_process", weights[0], registry=in_process.registry()) as communicator:
            Rearranger(communicator, weights).run(old, new)
        assert torch.equal(weights[0][0], torch.tensor(new[0, mine]).repeat_interleave(5).view(2, 5))
        return [int(row[0]) for row in weights[0][0]]

    assert in_process.run_ranks(3, work) == [[5, 0], [4, 1], [3, 2]]


def test_what_ranks_raise_is_raised_with_the_number_of_the_lowest() -> None:
    def work(group: StatelessGroup) -> None:
        if group.rank_in_group:
            raise PeerLostError(f"I am {group.rank_in_group}")

    with pytest.raises(PeerLostError, match="I am 1") as raised:
        in_process.run_ranks(3, work)
    assert raised.value.__notes__ == ["on rank 1 of 3"]


def test_ranks_that_do_not_match_are_told() -> None:
    def work(group: StatelessGroup) -> None:
        with create_eplb_communicator(group, "in_process", registry=in_process.registry()) as communicator:
            if group.rank_in_group == 0:
                communicator.add_send(torch.zeros(3), 1)
            communicator.execute()

    with pytest.raises(TransferMismatchError, match="rank 0 to rank 1: 1 tensors are sent, 0 are expected"):
        in_process.run_ranks(2, work)


def test_it_is_not_installed() -> None:
    with pytest.raises(UnknownBackendError, match="no backend 'in_process'"):
        in_process.run_ranks(1, lambda group: create_eplb_communicator(group, "in_process"))
