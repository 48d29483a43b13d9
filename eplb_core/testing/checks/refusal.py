"""What must not be moved: transfers that do not match, tensors and ranks that cannot be queued."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.errors import (
    EplbError,
    InvalidTransferError,
    TransferError,
    TransferMismatchError,
    TransferOverflowError,
)
from eplb_core.testing.check import Check, expect, raised_by, skip
from eplb_core.testing.context import RankContext
from eplb_core.testing.traffic import Message, Traffic, exchange, ring

_LARGEST_OVERFLOW = 512 << 20  # more memory than this is not taken just to see an error


def another_count_is_a_mismatch_everywhere(context: RankContext) -> None:
    """One tensor more on the sending side raises TransferMismatchError on every rank; no byte moves."""
    _mismatch(context, [Message(0, 1, 64), Message(0, 1, 64)], [Message(0, 1, 64)])


def another_size_is_a_mismatch_everywhere(context: RankContext) -> None:
    """Another byte size on the receiving side raises TransferMismatchError on every rank; no byte moves."""
    _mismatch(context, [Message(0, 1, 64), Message(0, 1, 128)], [Message(0, 1, 64), Message(0, 1, 192)])


def another_dtype_is_a_mismatch_everywhere(context: RankContext) -> None:
    """Another dtype of the same size raises TransferMismatchError on every rank; no byte moves."""
    names = (context.subject.dtypes or ("int16", "uint8"))[:2]
    if len(names) < 2:
        skip(f"it moves {names[0]} alone")
    sent, received = (getattr(torch, name) for name in names)
    _mismatch(context, [Message(0, 1, 64, sent)], [Message(0, 1, 64, received)])


def a_receive_that_nobody_sends_is_a_mismatch_everywhere(context: RankContext) -> None:
    """A receive without a send raises TransferMismatchError on every rank, instead of waiting for ever."""
    _mismatch(context, [], [Message(0, 1, 64)])


def after_a_mismatch_the_queue_is_empty_and_the_communicator_works(context: RankContext) -> None:
    """After a mismatch the queue is empty, `usable` is true, and the next transfer works."""
    error = _provoke_mismatch(context, context.communicator)
    expect(error.usable, "usable is false")
    context.communicator.execute()
    exchange(context, context.communicator, ring(context.world_size, 320))


def more_than_the_transfer_limit_is_refused(context: RankContext) -> None:
    """More bytes than transfer_limit_bytes raise TransferOverflowError before a byte moves; none of the ranks waits."""
    limit = context.communicator.transfer_limit_bytes
    if limit is None:
        skip("transfer_limit_bytes is None")
    if limit > _LARGEST_OVERFLOW:
        skip(f"transfer_limit_bytes is {limit}")
    tensor = torch.zeros(limit + 64, dtype=torch.uint8, device=context.device)
    if context.rank == 0:
        context.communicator.add_send(tensor, 1)
    elif context.rank == 1:
        context.communicator.add_recv(tensor, 0)
    error = raised_by(context.communicator.execute, TransferError)
    if context.rank < 2:
        expect(isinstance(error, TransferOverflowError | TransferMismatchError), f"it was {type(error).__name__}")
    expect(not bool(tensor.any()), "bytes were moved all the same")
    exchange(context, context.communicator, ring(context.world_size, 64))


def what_cannot_be_sent_is_refused_at_once(context: RankContext) -> None:
    """Wrong ranks, and tensors that are not contiguous or lie elsewhere, are refused when added; nothing is queued."""
    tensor = torch.zeros(4, 4, device=context.device)
    peer = (context.rank + 1) % context.world_size
    refused = {
        "this rank itself": (tensor, context.rank),
        "a rank beyond the group": (tensor, context.world_size),
        "a negative rank": (tensor, -1),
        "a transposed tensor": (tensor.t(), peer),
        "a tensor with gaps": (tensor[:, 1:], peer),
        "a sparse tensor": (tensor.to_sparse(), peer),
        "a tensor on another device": (tensor.to("meta"), peer),
    }
    for what, (value, rank) in refused.items():
        for add in (context.communicator.add_send, context.communicator.add_recv):
            try:
                add(value, rank)
            except InvalidTransferError:
                continue
            except Exception as error:  # noqa: BLE001 - which one it is, is the finding
                expect(False, f"{add.__name__} of {what} raised {type(error).__name__}, not InvalidTransferError")
            expect(False, f"{add.__name__} took {what}")
    exchange(context, context.communicator, ring(context.world_size, 64))


def _mismatch(context: RankContext, sent: Sequence[Message], received: Sequence[Message]) -> None:
    """Have rank 0 queue `sent` and rank 1 `received`; look at what is raised, and that nothing has arrived."""
    traffic = Traffic(context, sent if context.rank == 0 else received)
    try:
        traffic.queue(context.communicator)
        error = raised_by(context.communicator.execute, TransferMismatchError)
        expect(set(error.peers) <= {0, 1} and error.peers, f"it names the ranks {error.peers}, not 0 and 1")
        traffic.verify_nothing_arrived()
        traffic.verify_sent()
    finally:
        _drain(context)


def _drain(context: RankContext) -> None:
    """Have whatever is left in the queue fail here and not in another check, which would be blamed for it."""
    try:
        context.communicator.execute()
        problem = ""
    except EplbError as error:
        problem = str(error)
    context.tell(f"drained {context.rank}", problem)
    problems = [context.ask(f"drained {rank}") for rank in range(context.world_size)]
    if any(problems):
        context.renew()


def _provoke_mismatch(context: RankContext, communicator: EplbCommunicator) -> TransferMismatchError:
    traffic = Traffic(context, [Message(0, 1, 64)] if context.rank == 0 else [])
    traffic.queue(communicator)
    error: TransferMismatchError = raised_by(communicator.execute, TransferMismatchError)
    return error


CHECKS = (
    Check(another_count_is_a_mismatch_everywhere),
    Check(another_size_is_a_mismatch_everywhere),
    Check(another_dtype_is_a_mismatch_everywhere),
    Check(a_receive_that_nobody_sends_is_a_mismatch_everywhere),
    Check(after_a_mismatch_the_queue_is_empty_and_the_communicator_works),
    Check(more_than_the_transfer_limit_is_refused),
    Check(what_cannot_be_sent_is_refused_at_once),
)
"""The checks of this module."""
