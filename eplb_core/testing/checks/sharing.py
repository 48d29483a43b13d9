"""Who else is there: other communicators, other groups, groups without process groups, other threads."""

from __future__ import annotations

import concurrent.futures

import torch
import torch.distributed as dist

from eplb_core.control.groups import StatelessGroup
from eplb_core.testing.check import Check, expect
from eplb_core.testing.context import RankContext
from eplb_core.testing.traffic import Message, Traffic, exchange, ring

_EPOCHS = 20
_THREAD_S = 30.0


def two_communicators_do_not_disturb_one_another(context: RankContext) -> None:
    """What is queued on one communicator is not moved by another one of the same ranks."""
    first, second = context.communicator, context.fresh()
    one, other = (Traffic(context, ring(context.world_size, nbytes), epoch=nbytes) for nbytes in (640, 1280))
    one.queue(first)
    other.queue(second)
    second.execute()
    other.verify_received()
    one.verify_nothing_arrived()
    first.execute()
    one.verify_received()


def a_sub_group_has_ranks_of_its_own(context: RankContext) -> None:
    """In a group of some of the ranks, ranks are counted within that group."""
    members = list(range(1, context.world_size))
    groups = context.new_groups(members)
    if context.rank not in members:
        return
    communicator = context.kept(context.create(groups))
    inside = members.index(context.rank)
    if inside > 1:
        communicator.execute()
        return
    nbytes = 4096
    outgoing = torch.full((nbytes,), context.rank, dtype=torch.uint8, device=context.device)
    landing = torch.zeros_like(outgoing)
    communicator.register([outgoing])
    communicator.register([landing], landing=True)
    communicator.add_send(outgoing, 1 - inside)
    communicator.add_recv(landing, 1 - inside)
    communicator.execute()
    expect(bool((landing == members[1 - inside]).all()), f"wrong bytes from rank {1 - inside} of the sub-group")


def a_group_without_process_groups_is_enough(context: RankContext) -> None:
    """A backend that declares stateless groups needs nothing but a store."""
    store = dist.PrefixStore(f"step {context.step}/stateless", context.environment.store)
    communicator = context.kept(context.create(StatelessGroup(context.rank, context.world_size, store)))
    exchange(context, communicator, ring(context.world_size, 100_032))


def it_works_in_the_background(context: RankContext) -> None:
    """A backend that declares it may run in the background works on a thread of its own, beside other work."""
    communicator = context.communicator
    matrix = torch.ones(128, 128, device=context.device)
    token = torch.ones(1)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        for epoch in range(_EPOCHS):
            traffic = Traffic(context, ring(context.world_size, 64 << 10), epoch)
            traffic.queue(communicator)
            transfer = thread.submit(communicator.execute)
            for _ in range(3):
                matrix = (matrix @ matrix).clamp(0, 1)
                dist.all_reduce(token)
                token.fill_(1)
            transfer.result(_THREAD_S)
            traffic.verify_received()


def a_group_of_one_rank_has_nothing_to_move(context: RankContext) -> None:
    """A communicator of a single rank can be made, executed and closed."""
    groups = [context.new_groups([rank]) for rank in range(context.world_size)]
    communicator = context.kept(context.create(groups[context.rank]))
    communicator.execute()


def a_rank_may_send_what_it_has_just_received(context: RankContext) -> None:
    """Data goes round: what was received in one transfer is sent on in the next."""
    after, before = (context.rank + 1) % context.world_size, (context.rank - 1) % context.world_size
    held = torch.full((10_048,), context.rank, dtype=torch.uint8, device=context.device)
    free = torch.zeros_like(held)
    context.communicator.register([held, free])
    for _ in range(context.world_size):
        context.communicator.add_send(held, after)
        context.communicator.add_recv(free, before)
        context.communicator.execute()
        held, free = free, held
    expect(bool((held == context.rank).all()), "what went once round all ranks came back changed")


def two_ranks_are_enough_for_traffic_of_a_larger_group(context: RankContext) -> None:
    """Ranks without traffic take part and are not held up."""
    exchange(context, context.communicator, [Message(0, context.world_size - 1, 256_000)])


CHECKS = (
    Check(two_communicators_do_not_disturb_one_another),
    Check(a_sub_group_has_ranks_of_its_own, least_ranks=3),
    Check(a_group_without_process_groups_is_enough, needs=("stateless",)),
    Check(it_works_in_the_background, needs=("background",)),
    Check(a_group_of_one_rank_has_nothing_to_move),
    Check(a_rank_may_send_what_it_has_just_received),
    Check(two_ranks_are_enough_for_traffic_of_a_larger_group, least_ranks=3),
)
"""The checks of this module."""
