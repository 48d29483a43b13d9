"""What a backend that writes `move` alone gets: an empty queue, statistics, errors of one kind, an end after them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from eplb_core import BackendContext, CommonOptions, Duration, TransferStats
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import (
    CommunicatorClosedError,
    ControlPlaneError,
    PeerLostError,
    TransferError,
    TransferMismatchError,
    TransferOverflowError,
    TransferTimeoutError,
)
from eplb_core.transport import Payloads, QueuedCommunicator


class Copying(QueuedCommunicator):
    """Rank 0 of one rank. It moves nothing, and does what the test says in the middle."""

    path = "nowhere"

    def __init__(self, middle: Callable[[], Any] = lambda: None) -> None:
        control = ControlPlane(dist.HashStore(), 0, 1)
        context = BackendContext(rank=0, world_size=1, device=torch.device("cpu"), control=control)
        super().__init__(context, CommonOptions(timeout=Duration(5.0)), [torch.zeros(1)])
        self.middle = middle
        self.told: list[TransferError] = []
        self.released = 0

    def move(self, sends: Payloads, recvs: Payloads) -> TransferStats | None:
        found: TransferStats | None = self.middle()
        return found

    def give_up(self, error: TransferError) -> None:
        self.told.append(error)
        raise OSError("the peers cannot be told")

    def release(self) -> None:
        self.released += 1
        raise RuntimeError("a part of it failed")


def raising(error: BaseException) -> Callable[[], None]:
    def middle() -> None:
        raise error

    return middle


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), TransferError, "this rank ran out of memory"),
        (MemoryError(), TransferError, "this rank ran out of memory .*: MemoryError"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), TransferError, "ran out of memory"),
        (RuntimeError("invalid argument"), TransferError, "failed on this rank: RuntimeError: invalid argument"),
        (KeyError(3), TransferError, "failed on this rank: KeyError: 3"),
        (OSError("broken pipe"), TransferError, "failed on this rank: OSError: broken pipe"),
        (TimeoutError("it did not return"), TransferTimeoutError, "did not end in time on this rank"),
        (ControlPlaneError("rank 2 did not answer", missing=[2]), TransferTimeoutError, "rank 2 did not answer"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_a_library_raises_leaves_as_a_transfer_error_and_ends_the_communicator(
    error: Exception, kind: type[TransferError], words: str
) -> None:
    communicator = Copying(raising(error))
    with pytest.raises(TransferError, match=words) as raised:
        communicator.execute()
    assert type(raised.value) is kind
    assert raised.value.__cause__ is error
    assert not raised.value.usable
    assert raised.value.peers == tuple(getattr(error, "missing", ()))
    assert communicator.told == [raised.value]
    for call in (communicator.execute, lambda: communicator.add_payloads({}, {})):
        with pytest.raises(CommunicatorClosedError, match=raised.value.what):
            call()
    assert len(communicator.told) == 1


def test_a_transfer_error_leaves_as_it_is() -> None:
    error = PeerLostError("rank 3 is gone", peers=[3])
    communicator = Copying(raising(error))
    with pytest.raises(PeerLostError) as raised:
        communicator.execute()
    assert raised.value is error
    assert communicator.told == [error]


def test_after_a_usable_error_it_goes_on() -> None:
    communicator = Copying(raising(TransferOverflowError("too much", usable=True)))
    with pytest.raises(TransferOverflowError):
        communicator.execute()
    communicator.middle = lambda: None
    communicator.execute()
    assert communicator.told == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=lambda error: type(error).__name__)
def test_what_ends_the_process_leaves_as_it_is_and_closes_first(error: BaseException) -> None:
    communicator = Copying(raising(error))
    with pytest.raises(type(error)):
        communicator.execute()
    with pytest.raises(CommunicatorClosedError):
        communicator.execute()


def test_the_statistics_are_what_was_queued_and_what_move_knows() -> None:
    known = TransferStats(phases={"read": 0.5}, paths={1: "ib"}, descriptors=8, descriptors_merged=2)
    communicator = Copying(lambda: known)
    assert communicator.last_stats is None
    communicator.execute()
    stats = communicator.last_stats
    assert stats is not None
    assert (list(stats.phases), stats.phases["read"], stats.paths) == (["agree", "read"], 0.5, {1: "ib"})
    assert (stats.descriptors, stats.descriptors_merged, stats.messages) == (8, 2, 0)

    communicator.middle = lambda: None
    communicator.execute()
    assert communicator.last_stats is not None
    assert list(communicator.last_stats.phases) == ["agree", "move"]


def test_releasing_is_done_once_though_it_fails() -> None:
    communicator = Copying()
    with pytest.raises(RuntimeError, match="a part of it failed"):
        communicator.close()
    communicator.close()
    assert communicator.released == 1
    with pytest.raises(CommunicatorClosedError, match="it was closed"):
        communicator.execute()


class Refusing(QueuedCommunicator):
    """It has no room on rank 1."""

    moved = False

    def refuse(self, sends: Payloads, recvs: Payloads) -> TransferError | None:
        if self.context.rank != 1:
            return None
        return TransferOverflowError("rank 1 has no room", usable=True)

    def move(self, sends: Payloads, recvs: Payloads) -> None:
        self.moved = True


def test_what_one_rank_refuses_is_raised_on_every_rank_and_nothing_moves() -> None:
    store = dist.HashStore()

    def one(rank: int) -> tuple[type, bool, bool]:
        context = BackendContext(
            rank=rank, world_size=3, device=torch.device("cpu"), control=ControlPlane(store, rank, 3)
        )
        communicator = Refusing(context, CommonOptions(timeout=Duration(20.0)))
        communicator.add_send(torch.zeros(4), (rank + 1) % 3)
        communicator.add_recv(torch.zeros(4), (rank - 1) % 3)
        with pytest.raises(TransferError, match="rank 1 has no room") as raised:
            communicator.execute()
        return type(raised.value), raised.value.usable, communicator.moved

    with ThreadPoolExecutor(3) as threads:
        outcomes = list(threads.map(one, range(3)))
    mismatch = (TransferMismatchError, True, False)
    assert outcomes == [mismatch, (TransferOverflowError, True, False), mismatch]
