"""The control plane and the meeting that it begins with, over a real store, each rank a thread."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from eplb_core.control.plane import ControlPlane
from eplb_core.control.rendezvous import meet
from eplb_core.control.store_connection import StoreConnection
from eplb_core.control.torch_timeout import torch_timeout
from eplb_core.errors import ControlPlaneError

RANKS = 4
SHORT_S, LONG_S = 0.3, 20.0


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(RANKS) as pool:
        yield pool


def on_every_rank(threads: ThreadPoolExecutor, call: Callable[[int], Any], ranks: range = range(RANKS)) -> list[Any]:
    started: list[Future[Any]] = [threads.submit(call, rank) for rank in ranks]
    return [each.result(LONG_S) for each in started]


# --- gathering -------------------------------------------------------------------------------------------------------


def test_every_rank_gets_all_messages_in_rank_order(store: dist.Store, threads: ThreadPoolExecutor) -> None:
    def gather(rank: int) -> list[bytes]:
        return ControlPlane(store, rank, RANKS).all_gather("names", b"\x00\xff" + bytes([rank]) * rank, LONG_S)

    assert on_every_rank(threads, gather) == [[b"\x00\xff" + bytes([r]) * r for r in range(RANKS)]] * RANKS


def test_rounds_are_kept_apart_and_no_more_than_two_stay(store: dist.Store, threads: ThreadPoolExecutor) -> None:
    def gather(rank: int) -> list[list[bytes]]:
        control = ControlPlane(store, rank, RANKS)
        return [control.all_gather("a round", f"{rank}:{number}".encode(), LONG_S) for number in range(20)]

    rounds = on_every_rank(threads, gather)
    assert rounds == [[[f"{r}:{number}".encode() for r in range(RANKS)] for number in range(20)]] * RANKS
    assert store.num_keys() <= 2 * RANKS


def test_scopes_do_not_meet(store: dist.Store, threads: ThreadPoolExecutor) -> None:
    def gather(rank: int) -> tuple[list[bytes], list[bytes]]:
        control = ControlPlane(store, rank, RANKS)
        first, second = control.scoped("a"), control.scoped("b")
        if rank % 2:  # the order in which scopes are used is each rank's own affair
            return first.all_gather("a", b"a", LONG_S), second.all_gather("b", b"b", LONG_S)
        started = threading.Thread(target=second.all_gather, args=("b", b"b", LONG_S))
        started.start()
        a = first.all_gather("a", b"a", LONG_S)
        started.join(LONG_S)
        return a, [b"b"] * RANKS

    assert on_every_rank(threads, gather) == [([b"a"] * RANKS, [b"b"] * RANKS)] * RANKS


def test_a_rank_that_does_not_answer_is_named(store: dist.Store, threads: ThreadPoolExecutor) -> None:
    def gather(rank: int) -> tuple[int, ...]:
        with pytest.raises(
            ControlPlaneError, match=r"ranks 1, 3 did not answer within 0.3 s, while gathering tea"
        ) as e:
            ControlPlane(store, rank, RANKS).all_gather("tea", b"", SHORT_S)
        return e.value.missing

    assert on_every_rank(threads, gather, range(0, RANKS, 2)) == [(1, 3)] * 2


def test_a_store_that_is_gone_is_told_from_a_missing_rank() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore(
        "127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=5)
    )
    control = ControlPlane(client, 0, 1)
    control.barrier("breakfast", LONG_S)
    del server
    with pytest.raises(ControlPlaneError, match=r"the store .* is gone") as error:
        control.barrier("lunch", SHORT_S)
    assert error.value.missing == ()


def test_what_is_published_can_be_fetched_before_and_after(store: dist.Store, threads: ThreadPoolExecutor) -> None:
    def trade(rank: int) -> bytes:
        control = ControlPlane(store, rank, 2)
        if rank == 0:
            control.publish("recipe/1", b"\x00tea")
            return b""
        return control.fetch(0, "recipe/1", LONG_S)

    assert on_every_rank(threads, trade, range(2)) == [b"", b"\x00tea"]


def test_what_nobody_publishes_names_the_rank_that_should_have(store: dist.Store) -> None:
    with pytest.raises(ControlPlaneError, match="rank 1 did not answer") as error:
        ControlPlane(store, 0, 2).fetch(1, "recipe/1", SHORT_S)
    assert error.value.missing == (1,)


@pytest.mark.parametrize("kind", ["hash", "tcp"])
def test_asking_what_is_settled_settles_nothing(kind: str) -> None:
    made = dist.HashStore() if kind == "hash" else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    control, other = ControlPlane(made, 0, 2), ControlPlane(made, 1, 2).scoped("of another")
    assert control.settled("tea") is None
    assert not made.check(["tea"])
    assert control.settle("tea", b"\x00green") == b"\x00green"
    assert control.settled("tea") == b"\x00green"
    assert control.settle("tea", b"black") == b"\x00green"
    assert other.settled("tea") is None


# --- meeting ---------------------------------------------------------------------------------------------------------


def test_ranks_that_meet_get_one_name_and_another_each_time(store: dist.Store, threads: ThreadPoolExecutor) -> None:
    names = set()
    for _ in range(5):
        agreed = on_every_rank(threads, lambda rank: meet(StoreConnection(store), "here", rank, RANKS, LONG_S))
        assert len(set(agreed)) == 1
        names.add(agreed[0])
    assert len(names) == 5
    assert store.num_keys() == RANKS


@pytest.mark.parametrize("earlier", [0, 1], ids=["the first time", "after they have met before"])
@pytest.mark.parametrize("missing", [0, RANKS - 1])
def test_a_rank_that_does_not_come_is_named_by_all(
    store: dist.Store, threads: ThreadPoolExecutor, missing: int, earlier: int
) -> None:
    for _ in range(earlier):
        on_every_rank(threads, lambda rank: meet(StoreConnection(store), "here", rank, RANKS, LONG_S))

    def come(rank: int) -> tuple[int, ...]:
        if rank == missing:
            return (missing,)
        with pytest.raises(ControlPlaneError, match=f"rank {missing} did not come within 0.3 s") as error:
            meet(StoreConnection(store), "here", rank, RANKS, SHORT_S)
        return error.value.missing

    assert on_every_rank(threads, come) == [(missing,)] * RANKS


def test_ranks_meet_after_some_have_tried_alone_however_often(store: dist.Store, threads: ThreadPoolExecutor) -> None:
    for rank, tries in ((0, 3), (2, 1)):
        for _ in range(tries):
            with pytest.raises(ControlPlaneError):
                meet(StoreConnection(store), "here", rank, RANKS, 0.05)
    assert len(set(on_every_rank(threads, lambda rank: meet(StoreConnection(store), "here", rank, RANKS, LONG_S)))) == 1


def test_a_rank_that_begins_again_meets_those_that_still_wait(store: dist.Store, threads: ThreadPoolExecutor) -> None:
    waiting = [threads.submit(meet, StoreConnection(store), "here", rank, RANKS, LONG_S) for rank in (1, 2)]
    with pytest.raises(ControlPlaneError):
        meet(StoreConnection(store), "here", 0, RANKS, 0.05)
    again = [threads.submit(meet, StoreConnection(store), "here", rank, RANKS, LONG_S) for rank in (0, 3)]
    assert len({each.result(LONG_S) for each in (*waiting, *again)}) == 1


@pytest.mark.parametrize(
    ("seconds", "milliseconds"), [(2.0, 2000), (1.99999, 2000), (0.0991, 100), (0.0, 1), (-3.0, 1), (0.0004, 1)]
)
def test_no_wait_of_torch_is_shorter_than_what_was_asked_for(seconds: float, milliseconds: int) -> None:
    assert torch_timeout(seconds) == datetime.timedelta(milliseconds=milliseconds)
