"""Stream order: what was enqueued before is seen, what is enqueued afterwards is safe. Only where there is a GPU."""

from __future__ import annotations

import torch

from eplb_core.testing.check import Check, expect
from eplb_core.testing.context import RankContext

_DELAY_CYCLES = 100_000_000  # about 50 ms on the device: long enough that whoever does not wait is caught
_NUMEL = 1 << 20
_ROUNDS = 4


def work_enqueued_before_is_seen(context: RankContext) -> None:
    """A transfer sees what was enqueued before it on the current stream, however late the device comes to it."""
    _late_fill(context, None)


def work_enqueued_before_on_the_communicators_stream_is_seen(context: RankContext) -> None:
    """A transfer sees what was enqueued before it on the stream that was given to set_stream()."""
    stream = torch.cuda.Stream(context.device)
    context.communicator.set_stream(stream)
    try:
        with torch.cuda.stream(stream):
            _late_fill(context, stream)
    finally:
        context.communicator.set_stream(None)


def work_enqueued_afterwards_may_overwrite_what_was_sent(context: RankContext) -> None:
    """On return, work on the stream may overwrite sent tensors and read received ones, with no synchronisation."""
    after, before = (context.rank + 1) % context.world_size, (context.rank - 1) % context.world_size
    outgoing = torch.zeros(_NUMEL, dtype=torch.int32, device=context.device)
    landing, seen = torch.zeros_like(outgoing), torch.zeros_like(outgoing)
    context.communicator.register([outgoing])
    context.communicator.register([landing], landing=True)
    for number in range(_ROUNDS):
        outgoing.fill_(10 * number + context.rank)
        context.communicator.add_send(outgoing, after)
        context.communicator.add_recv(landing, before)
        context.communicator.execute()
        outgoing.fill_(-1)
        seen.copy_(landing)
        landing.fill_(-2)
        torch.cuda.synchronize()
        expect(bool((seen == 10 * number + before).all()), f"round {number}: overwritten data was received")


def _late_fill(context: RankContext, stream: torch.cuda.Stream | None) -> None:
    after, before = (context.rank + 1) % context.world_size, (context.rank - 1) % context.world_size
    outgoing = torch.zeros(_NUMEL, dtype=torch.int32, device=context.device)
    landing = torch.zeros_like(outgoing)
    context.communicator.register([outgoing])
    context.communicator.register([landing], landing=True)
    for number in range(1, 1 + _ROUNDS):
        torch.cuda._sleep(_DELAY_CYCLES)
        outgoing.fill_(10 * number + context.rank)
        landing.fill_(-1)
        context.communicator.add_send(outgoing, after)
        context.communicator.add_recv(landing, before)
        context.communicator.execute()
        seen = landing.clone()
        (stream or torch.cuda.current_stream(context.device)).synchronize()
        expect(bool((seen == 10 * number + before).all()), f"round {number}: the transfer did not wait for the stream")


CHECKS = (
    Check(work_enqueued_before_is_seen, needs=("cuda",)),
    Check(work_enqueued_before_on_the_communicators_stream_is_seen, needs=("cuda",)),
    Check(work_enqueued_afterwards_may_overwrite_what_was_sent, needs=("cuda",)),
)
"""The checks of this module."""
