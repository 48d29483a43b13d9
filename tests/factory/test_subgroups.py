"""Groups that are a part of the world, whose ranks are not the global ones; and memory profiling, on every rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from eplb_core.control.groups import TorchGroups
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.factory.profiling import reserve_profile_buffers
from eplb_core.rearrange.rearranger import Rearranger
from tests.support.ranks import Member, Report, Scenario, run_scenarios

BACKENDS = ("torch_gloo", "torch_nccl", "nixl")


def a_group_of_the_last_ranks_uses_its_own_numbers(member: Member, config: str) -> tuple[int, float]:
    """Global ranks 1 and 2 of three are ranks 0 and 1 of the group."""
    group = dist.new_group([1, 2])
    if member.rank == 0:
        return (-1, 0.0)
    groups = TorchGroups(group)
    with create_eplb_communicator(groups, config) as communicator:
        other = 1 - groups.rank_in_group
        landing = torch.zeros(5)
        communicator.add_send(torch.full((5,), float(member.rank)), other)
        communicator.add_recv(landing, other)
        communicator.execute()
    return (groups.rank_in_group, float(landing.mean()))


def experts_are_rearranged_inside_such_a_group(member: Member, config: str) -> list[float]:
    group = dist.new_group([1, 2])
    if member.rank == 0:
        return []
    groups = TorchGroups(group)
    mine = [0.0, 1.0] if groups.rank_in_group == 0 else [2.0, 3.0]
    weights = [[torch.tensor(mine).reshape(2, 1).repeat(1, 4)]]
    with create_eplb_communicator(groups, config, weights[0]) as communicator:
        Rearranger(communicator, weights).run([[0, 1, 2, 3]], [[3, 0, 1, 2]])
    return weights[0][0][:, 0].tolist()


def profiling_leaves_a_communicator_that_works(member: Member, config: str) -> tuple[bool, int]:
    weights = [torch.zeros(4, 1000)]
    with create_eplb_communicator(TorchGroups(), config, weights) as communicator:
        before = communicator.last_stats
        grown = reserve_profile_buffers(communicator, weights)
        moved = communicator.last_stats is not before
        communicator.execute()
    return (moved, grown)


SCENARIOS = (
    a_group_of_the_last_ranks_uses_its_own_numbers,
    experts_are_rearranged_inside_such_a_group,
    profiling_leaves_a_communicator_that_works,
)


@pytest.fixture(scope="module")
def report() -> Report:
    return run_scenarios(
        3,
        [
            Scenario(f"{function.__name__} {config}", function, (config,))
            for config in BACKENDS
            for function in SCENARIOS
        ],
    )


@pytest.mark.parametrize("config", BACKENDS)
def test_ranks_are_those_of_the_group(report: Report, config: str) -> None:
    assert report.returned(f"a_group_of_the_last_ranks_uses_its_own_numbers {config}") == [
        (-1, 0.0),
        (0, 2.0),
        (1, 1.0),
    ]


@pytest.mark.parametrize("config", BACKENDS)
def test_weights_are_right_in_a_group_that_is_a_part_of_the_world(report: Report, config: str) -> None:
    assert report.returned(f"experts_are_rearranged_inside_such_a_group {config}") == [[], [3.0, 0.0], [1.0, 2.0]]


@pytest.mark.parametrize(("config", "needed"), [("torch_gloo", True), ("torch_nccl", True), ("nixl", False)])
def test_profiling_transfers_something_only_where_the_transport_needs_it(
    report: Report, config: str, needed: bool
) -> None:
    assert report.returned(f"profiling_leaves_a_communicator_that_works {config}") == [(needed, 0)] * 3


def test_every_rank_exits_in_order(report: Report) -> None:
    assert report.exit_codes == [0, 0, 0]
