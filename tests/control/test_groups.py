"""What a communicator can be made for: plain groups, groups of some ranks, an engine's own objects, a store alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.control.groups import GroupCoordinator, StatelessGroup, TorchGroups
from eplb_core.errors import InputError
from eplb_core.factory.create import create_eplb_communicator
from tests.support.ranks import Member, Report, Scenario, error_of, run_scenarios

RANKS = 4
HALVES = ((3, 1), (2, 0))  # global ranks in group order
BACKENDS = ("torch_gloo", "torch_nccl", "nixl?window=1MiB")


def swap(group: Any, communicator: EplbCommunicator, mark: int) -> list[int]:
    """Send `mark` to the next rank of the group; return what came from the one before."""
    landing = torch.full((100,), -1, dtype=torch.int64)
    communicator.add_send(torch.full((100,), mark), (group.rank_in_group + 1) % group.world_size)
    communicator.add_recv(landing, (group.rank_in_group - 1) % group.world_size)
    communicator.execute()
    return landing.unique().tolist()


def both_halves_at_once(member: Member, config: str) -> tuple[int, list[int]]:
    """Return the rank in the half that this rank belongs to, and the global rank that its data came from."""
    torch_groups = [dist.new_group(list(ranks), sort_ranks=False) for ranks in HALVES]
    mine = next(number for number, ranks in enumerate(HALVES) if member.rank in ranks)
    groups = TorchGroups(torch_groups[mine])
    with create_eplb_communicator(groups, config) as communicator:
        return groups.rank_in_group, swap(groups, communicator, member.rank)


def the_world_and_a_half_at_once(member: Member, config: str) -> tuple[list[int], list[int]]:
    halves = [dist.new_group(list(ranks)) for ranks in HALVES]
    half = TorchGroups(halves[0 if member.rank in HALVES[0] else 1])
    world = TorchGroups()
    with create_eplb_communicator(world, config) as large, create_eplb_communicator(half, config) as small:
        return swap(world, large, member.rank), swap(half, small, 10 + member.rank)


def an_object_with_the_right_attributes(member: Member, config: str) -> list[int]:
    coordinator = SimpleNamespace(
        rank_in_group=member.rank,
        world_size=RANKS,
        cpu_group=dist.group.WORLD,
        device_group=None,
        device_communicator=None,
        unique_name="ep:0",
    )
    assert isinstance(coordinator, GroupCoordinator)
    with create_eplb_communicator(coordinator, config) as communicator:
        return swap(coordinator, communicator, member.rank)


def groups_of_other_ranks_are_refused(member: Member) -> dict[str, Any]:
    some = dist.new_group([0, 1])
    same = dist.new_group(list(range(RANKS)))
    assert TorchGroups(None, same).world_size == RANKS
    return error_of(lambda: TorchGroups(None, some))


def a_group_that_this_rank_is_not_in_is_refused(member: Member) -> dict[str, Any]:
    some = dist.new_group([0, 1])
    return error_of(lambda: TorchGroups(some))


def a_lone_rank_has_nobody_to_send_to(member: Member, config: str) -> dict[str, Any]:
    alone = [dist.new_group([rank]) for rank in range(RANKS)][member.rank]
    with create_eplb_communicator(TorchGroups(alone), config) as communicator:
        communicator.execute()
        return error_of(lambda: communicator.add_send(torch.zeros(1), 1))


# --- without any process group ---------------------------------------------------------------------------------------


def stateless(member: Member, name: str) -> StatelessGroup:
    return StatelessGroup(member.rank, member.world_size, dist.PrefixStore(name, member.environment.store))


def nixl_needs_no_process_group(member: Member) -> list[int]:
    group = stateless(member, "first")
    with create_eplb_communicator(group, "nixl?window=1MiB") as communicator:
        assert not dist.is_initialized()
        return swap(group, communicator, member.rank)


def a_store_serves_one_communicator_after_another(member: Member) -> list[list[int]]:
    received = []
    group = stateless(member, "again")
    for _ in range(3):
        with create_eplb_communicator(group, "nixl?window=1MiB") as communicator:
            received.append(swap(group, communicator, member.rank))
    return received


def auto_takes_what_works_without_a_process_group(member: Member) -> str:
    group = stateless(member, "auto")
    with create_eplb_communicator(group, "auto") as communicator:
        swap(group, communicator, member.rank)
        return communicator.binding.config


def an_engine_s_object_may_have_a_store_and_no_groups(member: Member) -> list[int]:
    return swap_with_coordinator(member, store=dist.PrefixStore("engine", member.environment.store))


def an_engine_s_object_may_keep_its_store_in_another(member: Member) -> list[int]:
    store = dist.PrefixStore("elastic", member.environment.store)
    return swap_with_coordinator(member, tcp_store_group=SimpleNamespace(store=store))


def swap_with_coordinator(member: Member, **more: Any) -> list[int]:
    coordinator = SimpleNamespace(
        rank_in_group=member.rank,
        world_size=member.world_size,
        cpu_group=None,
        device_group=None,
        device_communicator=None,
        **more,
    )
    with create_eplb_communicator(coordinator, "nixl?window=1MiB") as communicator:
        return swap(coordinator, communicator, member.rank)


def gloo_is_refused(member: Member) -> dict[str, Any]:
    return error_of(lambda: create_eplb_communicator(stateless(member, "gloo"), "torch_gloo"))


def torch_groups_need_an_initialised_torch(member: Member) -> dict[str, Any]:
    return error_of(TorchGroups)


def nothing_to_meet_at_is_refused(member: Member) -> dict[str, Any]:
    nothing = SimpleNamespace(
        rank_in_group=0, world_size=2, cpu_group=None, device_group=None, device_communicator=None
    )
    return error_of(lambda: create_eplb_communicator(nothing, "nixl"))


WITH_GROUPS = (both_halves_at_once, the_world_and_a_half_at_once, an_object_with_the_right_attributes)
STATELESS = (
    nixl_needs_no_process_group,
    a_store_serves_one_communicator_after_another,
    auto_takes_what_works_without_a_process_group,
    an_engine_s_object_may_have_a_store_and_no_groups,
    an_engine_s_object_may_keep_its_store_in_another,
    gloo_is_refused,
    torch_groups_need_an_initialised_torch,
    nothing_to_meet_at_is_refused,
)


@pytest.fixture(scope="module")
def report() -> Report:
    """All that needs a process group, with four ranks."""
    scenarios = [
        Scenario(f"{function.__name__} {config}", function, (config,))
        for config in BACKENDS
        for function in (*WITH_GROUPS, a_lone_rank_has_nobody_to_send_to)
    ]
    refusals = (groups_of_other_ranks_are_refused, a_group_that_this_rank_is_not_in_is_refused)
    return run_scenarios(RANKS, [*scenarios, *(Scenario(function.__name__, function) for function in refusals)])


@pytest.fixture(scope="module")
def stateless_report() -> Report:
    """All that has to work without one, with three ranks."""
    return run_scenarios(3, [Scenario(function.__name__, function) for function in STATELESS], process_group=False)


@pytest.mark.parametrize("config", BACKENDS)
def test_ranks_are_those_of_the_group_also_where_their_order_differs(report: Report, config: str) -> None:
    assert report.returned(f"both_halves_at_once {config}") == [(1, [2]), (1, [3]), (0, [0]), (0, [1])]


@pytest.mark.parametrize("config", BACKENDS)
def test_overlapping_groups_do_not_disturb_one_another(report: Report, config: str) -> None:
    expected = [([3], [12]), ([0], [13]), ([1], [10]), ([2], [11])]
    assert report.returned(f"the_world_and_a_half_at_once {config}") == expected


@pytest.mark.parametrize("config", BACKENDS)
def test_any_object_with_the_attributes_is_accepted(report: Report, config: str) -> None:
    assert report.returned(f"an_object_with_the_right_attributes {config}") == [[3], [0], [1], [2]]


@pytest.mark.parametrize("config", BACKENDS)
def test_a_group_of_one_rank_works_and_has_nobody_to_send_to(report: Report, config: str) -> None:
    errors = report.returned(f"a_lone_rank_has_nobody_to_send_to {config}")
    assert {error["type"] for error in errors} == {"InvalidTransferError"}


def test_a_device_group_of_other_ranks_is_refused_with_both(report: Report) -> None:
    for rank, error in enumerate(report.returned("groups_of_other_ranks_are_refused")):
        assert error["type"] == "InputError"
        if rank < 2:  # the others are no members of the second group
            assert "[0, 1, 2, 3] and [0, 1]" in error["text"]


def test_a_group_without_this_rank_is_refused(report: Report) -> None:
    types = [error["type"] for error in report.returned("a_group_that_this_rank_is_not_in_is_refused")]
    assert types == [None, None, "InputError", "InputError"]


def test_a_store_is_all_that_nixl_needs(stateless_report: Report) -> None:
    assert stateless_report.returned("nixl_needs_no_process_group") == [[2], [0], [1]]


def test_one_store_serves_several_communicators(stateless_report: Report) -> None:
    received = stateless_report.returned("a_store_serves_one_communicator_after_another")
    assert received == [[[2]] * 3, [[0]] * 3, [[1]] * 3]


def test_auto_takes_a_backend_that_needs_no_process_group(stateless_report: Report) -> None:
    assert stateless_report.returned("auto_takes_what_works_without_a_process_group") == ["nixl"] * 3


@pytest.mark.parametrize(
    "name", ["an_engine_s_object_may_have_a_store_and_no_groups", "an_engine_s_object_may_keep_its_store_in_another"]
)
def test_an_object_with_a_store_and_no_groups_is_accepted(stateless_report: Report, name: str) -> None:
    assert stateless_report.returned(name) == [[2], [0], [1]]


def test_a_backend_that_needs_a_process_group_is_refused_on_every_rank(stateless_report: Report) -> None:
    for error in stateless_report.returned("gloo_is_refused"):
        assert "StatelessGroupError" in error["type"]
        assert "stateless" in error["text"]


@pytest.mark.parametrize("name", ["torch_groups_need_an_initialised_torch", "nothing_to_meet_at_is_refused"])
def test_a_group_without_anything_to_meet_at_is_refused(stateless_report: Report, name: str) -> None:
    for error in stateless_report.returned(name):
        assert error["type"] == "InputError"
        assert "StatelessGroup" in error["text"]


def test_every_rank_exits_in_order(report: Report, stateless_report: Report) -> None:
    assert report.exit_codes == [0] * RANKS
    assert stateless_report.exit_codes == [0] * 3


@pytest.mark.parametrize(
    ("rank", "size", "said"),
    [(7, 3, "no rank 7 in a group of 3"), (1, 1, "no rank 1"), (-1, 2, "no rank -1"), ("0", 2, "rank_in_group is '0'")],
)
def test_a_rank_that_is_not_in_the_group_is_refused(rank: Any, size: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        StatelessGroup(rank, size, dist.HashStore())


def test_what_is_no_store_is_refused() -> None:
    with pytest.raises(InputError, match="the store is a str"):
        StatelessGroup(0, 2, "127.0.0.1:29500")  # type: ignore[arg-type]
