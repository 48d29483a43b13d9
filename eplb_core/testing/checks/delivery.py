"""What arrives, and what has not changed: the checks of a transfer in which every rank does its part."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import torch

from eplb_core.contract.payload import Payload
from eplb_core.testing.check import Check, expect, skip
from eplb_core.testing.context import RankContext
from eplb_core.testing.traffic import (
    POISON,
    Bytes,
    Message,
    Traffic,
    all_pairs,
    bytes_of,
    content,
    exchange,
    ring,
    tensor_of,
)

# Sizes are multiples of 64 bytes wherever a check is not about sizes, so that a fault with odd ones shows only there.
_LARGE = (64 << 20) + 3


def nothing_queued_is_a_round_like_any_other(context: RankContext) -> None:
    """execute() with nothing queued returns, and the next transfer works."""
    for _ in range(3):
        context.communicator.execute()
    exchange(context, context.communicator, ring(context.world_size, 64))
    context.communicator.execute()


def messages_of_a_pair_keep_their_order(context: RankContext) -> None:
    """The i-th send from s to d pairs with the i-th receive on d from s."""
    messages = [Message(*pair, 320) for _ in range(8) for pair in all_pairs(context.world_size)]
    exchange(context, context.communicator, messages)


def every_dtype_arrives_bit_for_bit(context: RankContext) -> None:
    """Tensors of every dtype arrive bit for bit, small ones and large ones."""
    names = context.subject.dtypes or sorted(
        str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)
    )
    dtypes = [getattr(torch, name) for name in dict.fromkeys(names)]
    small = [Message(0, 1, 64 * dtype.itemsize, dtype) for dtype in dtypes]
    large = [Message(1, 0, 70_016 * dtype.itemsize, dtype) for dtype in dtypes]
    exchange(context, context.communicator, small + large)


def odd_sizes_arrive(context: RankContext) -> None:
    """Sizes that are no multiple of anything arrive to the last byte."""
    for epoch, nbytes in enumerate((1, 3, 63, 4095, 4097, 65_535, 65_537, (1 << 20) + 1)):
        exchange(context, context.communicator, ring(context.world_size, nbytes), epoch)


def a_message_of_64_mib_and_3_bytes_arrives(context: RankContext) -> None:
    """One large message arrives; it is no multiple of any window."""
    limit = context.communicator.transfer_limit_bytes
    if limit is not None and limit < _LARGE:
        skip(f"transfer_limit_bytes is {limit}")
    exchange(context, context.communicator, [Message(0, 1, _LARGE)])


def many_small_tensors_arrive(context: RankContext) -> None:
    """Five hundred small tensors to each of two peers arrive in one transfer."""
    exchange(context, context.communicator, ring(context.world_size, 64) * 500 + ring(context.world_size, 128, step=-1))


def tensors_without_elements_are_sent(context: RankContext) -> None:
    """Zero-size tensors pair up like all others, alone and between others."""
    empty = [Message(0, 1, 0), Message(0, 1, 0, torch.bfloat16), Message(0, 1, 64), Message(1, 0, 0)]
    exchange(context, context.communicator, empty)
    exchange(context, context.communicator, [Message(0, 1, 0)], epoch=1)


def tensors_of_any_shape_arrive(context: RankContext) -> None:
    """Scalars, views into a larger tensor, empty shapes and parameters that require gradients arrive."""
    fill = 7.0 if context.rank == 0 else -1.0
    whole = torch.full((6, 8), fill, device=context.device)
    tensors = [torch.full(shape, fill, device=context.device) for shape in ((), (1,), (2, 3, 4), (3, 0, 2))]
    tensors += [whole[2:4], torch.nn.Parameter(torch.full((32,), fill, device=context.device))]
    if context.subject.must_register:
        context.communicator.register(tensors, landing=context.rank == 1)
    for tensor in tensors:
        if context.rank == 0:
            context.communicator.add_send(tensor, 1)
        elif context.rank == 1:
            context.communicator.add_recv(tensor, 0)
    context.communicator.execute()
    if context.rank == 1:
        expect(all(bool((tensor == 7.0).all()) for tensor in tensors), "a tensor did not arrive")
        expect(bool((whole[:2] == -1.0).all() and (whole[4:] == -1.0).all()), "bytes beside a view were overwritten")


def payloads_are_queued_like_tensors_one_by_one(context: RankContext) -> None:
    """What `add_payloads` queues lies between what `add_send` and `add_recv` queue before and after it."""
    after, before = (context.rank + 1) % context.world_size, (context.rank - 1) % context.world_size
    sent = [torch.full((100,), 10.0 * context.rank + number, device=context.device) for number in range(5)]
    received = [torch.full_like(tensor, -1.0) for tensor in sent]
    communicator = context.communicator
    if context.subject.must_register:
        communicator.register(sent)
        communicator.register(received, landing=True)
    communicator.add_send(sent[0], after)
    communicator.add_payloads({}, {before: [Payload(tensor) for tensor in received[:2]]})
    communicator.add_payloads({after: [Payload(tensor) for tensor in sent[1:3]]}, {})
    communicator.add_recv(received[2], before)
    communicator.add_payloads({after: [Payload(sent[3])]}, {before: [Payload(tensor) for tensor in received[3:]]})
    communicator.add_send(sent[4], after)
    communicator.execute()
    found = [tensor.unique().tolist() for tensor in received]
    expect(found == [[10.0 * before + number] for number in range(5)], f"{found} arrived from rank {before}")


def every_rank_sends_to_every_other(context: RankContext) -> None:
    """All-to-all traffic arrives, several sizes a pair."""
    messages = [Message(*pair, nbytes) for nbytes in (64, 70_016, 640) for pair in all_pairs(context.world_size)]
    exchange(context, context.communicator, messages)


def one_rank_feeds_all_and_is_fed_by_all(context: RankContext) -> None:
    """One-to-all and all-to-one traffic arrives, whichever rank it is."""
    for one in range(context.world_size):
        others = [rank for rank in range(context.world_size) if rank != one]
        exchange(context, context.communicator, [Message(one, rank, 1024 + 64 * rank) for rank in others], one)
        exchange(context, context.communicator, [Message(rank, one, 2048 + 64 * rank) for rank in others], one)


def a_ring_of_ranks_moves_both_ways(context: RankContext) -> None:
    """Ring traffic arrives, with nobody to begin it."""
    for epoch, step in enumerate((1, -1)):
        exchange(context, context.communicator, ring(context.world_size, 100_032, step=step), epoch)


def uneven_traffic_arrives(context: RankContext) -> None:
    """Any number of messages of any size between any pairs arrives, also when some ranks have none."""
    rng = np.random.default_rng(7)
    pairs = all_pairs(context.world_size)
    for epoch in range(6):
        chosen = rng.integers(0, len(pairs), rng.integers(0, 12)).tolist()
        sizes = (rng.integers(1, 3000, len(chosen)) * 64).tolist()
        messages = [Message(pairs[at][0], pairs[at][1], nbytes) for at, nbytes in zip(chosen, sizes, strict=True)]
        exchange(context, context.communicator, messages, epoch)


def bytes_around_a_received_tensor_stay(context: RankContext) -> None:
    """Receiving writes the tensor and nothing before or behind it."""
    margin, nbytes = 256, 1000
    landing = tensor_of(np.full(nbytes + 2 * margin, POISON, np.uint8), torch.uint8, context.device)
    expected = content(0, 1, 0, 0, nbytes)
    outgoing = tensor_of(expected, torch.uint8, context.device)
    if context.subject.must_register:
        context.communicator.register([outgoing])
        context.communicator.register([landing], landing=True)
    if context.rank == 0:
        context.communicator.add_send(outgoing, 1)
    elif context.rank == 1:
        context.communicator.add_recv(landing[margin:-margin], 0)
    context.communicator.execute()
    if context.rank == 1:
        around = np.delete(bytes_of(landing), slice(margin, margin + nbytes))
        expect(bool((around == POISON).all()), f"{int((around != POISON).sum())} bytes around it were written")


def sent_tensors_stay_as_they_were(context: RankContext) -> None:
    """Sending does not change a tensor."""
    messages = [Message(*pair, nbytes) for nbytes in (64, 200_000) for pair in all_pairs(context.world_size)]
    exchange(context, context.communicator, messages).verify_sent()


def received_data_is_there_on_return(context: RankContext) -> None:
    """When execute() returns, every byte has arrived."""
    for epoch in range(3):
        exchange(context, context.communicator, ring(context.world_size, 8 << 20), epoch)


def sent_tensors_may_be_overwritten_on_return(context: RankContext) -> None:
    """When execute() returns, no peer still reads the sent tensors."""
    # Traffic one way only: whoever sends is not held up by something that it receives.
    traffic = Traffic(context, [Message(0, rank, 2 << 20) for rank in range(1, context.world_size)] * 3)
    traffic.queue(context.communicator)
    context.communicator.execute()
    for part in traffic.sends:
        part.tensor.fill_(0x55)
    if context.device.type == "cuda":
        torch.cuda.synchronize()
    context.meet("overwritten")
    traffic.verify_received()


def what_is_sent_is_what_the_tensor_holds_at_execute(context: RankContext) -> None:
    """A queued tensor is read by execute(), not when it is added."""
    tensor = torch.full((4096,), -1, dtype=torch.int32, device=context.device)
    if context.subject.must_register:
        context.communicator.register([tensor], landing=context.rank == 1)
    if context.rank == 0:
        context.communicator.add_send(tensor, 1)
        tensor.fill_(42)
    elif context.rank == 1:
        context.communicator.add_recv(tensor, 0)
    context.communicator.execute()
    expect(context.rank != 1 or bool((tensor == 42).all()), "the content at the time of add_send was sent")


def registered_tensors_serve_a_hundred_epochs(context: RankContext) -> None:
    """The same communicator and the same registered tensors serve a hundred transfers with other content each."""
    after, before = (context.rank + 1) % context.world_size, (context.rank - 1) % context.world_size
    nbytes = 12_800

    def bytes_from(source: int, epoch: int) -> Bytes:
        return content(source, (source + 1) % context.world_size, 0, epoch, nbytes)

    outgoing, landing = (torch.empty(nbytes, dtype=torch.uint8, device=context.device) for _ in range(2))
    context.communicator.register([outgoing])
    context.communicator.register([landing], landing=True)
    for epoch in range(100):
        outgoing.copy_(torch.from_numpy(bytes_from(context.rank, epoch)))
        landing.fill_(POISON)
        context.communicator.add_send(outgoing, after)
        context.communicator.add_recv(landing, before)
        context.communicator.execute()
        expect(np.array_equal(bytes_of(landing), bytes_from(before, epoch)), f"wrong bytes in epoch {epoch}")
        context.meet(f"epoch {epoch}")


def the_queue_is_empty_after_a_transfer(context: RankContext) -> None:
    """Nothing is sent twice: after execute() the queue is empty."""
    traffic = exchange(context, context.communicator, ring(context.world_size, 640))
    for part in traffic.recvs:
        part.tensor.fill_(POISON)
    context.communicator.execute()
    traffic.verify_nothing_arrived()


def no_reference_to_a_moved_tensor_is_kept(context: RankContext) -> None:
    """After execute() the communicator lets go of every tensor that was not registered."""
    if context.subject.must_register:
        skip("registered tensors are kept on purpose")
    tensor = torch.zeros(1024, device=context.device)
    watch = weakref.ref(tensor)
    if context.rank == 0:
        context.communicator.add_send(tensor, 1)
    elif context.rank == 1:
        context.communicator.add_recv(tensor, 0)
    context.communicator.execute()
    del tensor
    gc.collect()
    expect(watch() is None, "a tensor is still referenced after execute()")


def several_transfers_may_be_under_way(context: RankContext) -> None:
    """Up to max_in_flight transfers may be started before the first is waited for; each gets its own bytes."""
    most = context.communicator.max_in_flight
    expect(most >= 1, f"max_in_flight is {most}")
    for group in range(3):
        under_way = []
        for number in range(min(most, 4)):
            traffic = Traffic(context, ring(context.world_size, 200_000), epoch=10 * group + number)
            traffic.queue(context.communicator)
            under_way.append((traffic, context.communicator.start()))
        for traffic, pending in under_way:
            pending.wait()
            traffic.verify_received()


def a_plan_that_all_trust_is_moved_all_the_same(context: RankContext) -> None:
    """After trust_matching(True) the same bytes arrive."""
    context.communicator.trust_matching(True)
    try:
        for epoch, nbytes in enumerate((64, 300_032)):
            messages = [Message(*pair, nbytes) for pair in all_pairs(context.world_size)]
            exchange(context, context.communicator, messages, epoch)
    finally:
        context.communicator.trust_matching(False)


def the_statistics_count_the_payload(context: RankContext) -> None:
    """Where there are statistics, they count the bytes and tensors of this rank in the last transfer."""
    messages = [Message(0, 1, 1024), Message(0, 1, 64), Message(1, 0, 100_032)]
    exchange(context, context.communicator, messages)
    stats = context.communicator.last_stats
    if stats is None:
        skip("last_stats is None")
    expected = {0: (1088, 100_032, 3), 1: (100_032, 1088, 3)}.get(context.rank, (0, 0, 0))
    found = (stats.bytes_sent, stats.bytes_received, stats.messages)
    expect(found == expected, f"bytes sent, bytes received and messages are {found}, not {expected}")


def staging_stays_within_its_limit(context: RankContext) -> None:
    """The staging memory that a transport holds stays within what the configuration allows."""
    for epoch in range(2):
        exchange(context, context.communicator, ring(context.world_size, 1 << 20), epoch)
    held, limit = context.communicator.staging_bytes, context.communicator.staging_limit_bytes
    expect(0 <= held <= limit, f"staging_bytes is {held}, staging_limit_bytes {limit}")


CHECKS = (
    Check(messages_of_a_pair_keep_their_order),
    Check(nothing_queued_is_a_round_like_any_other),
    Check(every_dtype_arrives_bit_for_bit),
    Check(odd_sizes_arrive),
    Check(a_message_of_64_mib_and_3_bytes_arrives),
    Check(many_small_tensors_arrive),
    Check(tensors_without_elements_are_sent),
    Check(tensors_of_any_shape_arrive),
    Check(payloads_are_queued_like_tensors_one_by_one),
    Check(every_rank_sends_to_every_other),
    Check(one_rank_feeds_all_and_is_fed_by_all),
    Check(a_ring_of_ranks_moves_both_ways),
    Check(uneven_traffic_arrives),
    Check(bytes_around_a_received_tensor_stay),
    Check(sent_tensors_stay_as_they_were),
    Check(received_data_is_there_on_return),
    Check(sent_tensors_may_be_overwritten_on_return),
    Check(what_is_sent_is_what_the_tensor_holds_at_execute),
    Check(registered_tensors_serve_a_hundred_epochs),
    Check(the_queue_is_empty_after_a_transfer),
    Check(no_reference_to_a_moved_tensor_is_kept),
    Check(several_transfers_may_be_under_way),
    Check(a_plan_that_all_trust_is_moved_all_the_same),
    Check(the_statistics_count_the_payload),
    Check(staging_stays_within_its_limit),
)
"""The checks of this module."""
