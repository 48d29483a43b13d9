"""Ranks of one host gather in memory that they share: the same answers as the store's, with or without a board."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from eplb_core.control import plane
from eplb_core.control.board import CAPACITY, Board, OwnPage
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import ControlPlaneError
from tests.support.ranks import Member, Scenario, run_scenarios

RANKS = 3
SHORT_S, LONG_S = 0.3, 20.0
FIRST = 2  # the round that a board is made after


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(RANKS) as pool:
        yield pool


def on_ranks(threads: ThreadPoolExecutor, call: Callable[[int], Any], ranks: range = range(RANKS)) -> list[Any]:
    started: list[Future[Any]] = [threads.submit(call, rank) for rank in ranks]
    return [each.result(LONG_S) for each in started]


def gather(control: ControlPlane, number: int) -> list[bytes]:
    """Gather a message whose length differs from rank to rank and from round to round; some do not fit on a board."""
    return control.all_gather("messages", content(control.rank, number), LONG_S)


def content(rank: int, number: int) -> bytes:
    length = [0, 7, CAPACITY, CAPACITY + 1, 100_000][(3 * number + rank) % 5]
    return bytes([1 + rank * 50 + number % 50]) * length


def has_board(control: ControlPlane) -> bool:
    return control._board is not None


def met(store: dist.Store, threads: ThreadPoolExecutor) -> list[ControlPlane]:
    """Return control planes that have a board."""
    planes = [ControlPlane(store, rank, RANKS) for rank in range(RANKS)]
    for _ in range(FIRST + 1):
        on_ranks(threads, lambda rank: planes[rank].barrier("the start", LONG_S))
    assert [has_board(each) for each in planes] == [True] * RANKS
    return planes


# --- the board -------------------------------------------------------------------------------------------------------


def boards() -> list[Board]:
    pages = [OwnPage() for _ in range(RANKS)]
    made = [Board(page, [each.offer for each in pages], rank) for rank, page in enumerate(pages)]
    for page in pages:
        page.close_file()
    return made


@pytest.mark.parametrize("at", ["header", "content"])
def test_a_message_that_is_half_written_is_not_there_yet(at: str) -> None:
    writer, reader, _ = boards()
    writer.write(0, b"the whole message")
    assert reader.read(0, 0) == (True, b"the whole message")
    place = 30 if at == "header" else 70
    writer._own[place] ^= 1
    assert reader.read(0, 0) == (False, None)
    writer._own[place] ^= 1
    assert reader.read(0, 0) == (True, b"the whole message")


def test_a_message_of_another_round_is_not_taken_for_this_one() -> None:
    writer, reader, _ = boards()
    writer.write(0, b"first")
    assert reader.read(0, 2) == (False, None)
    writer.write(2, b"third")
    assert reader.read(0, 0) == (False, None)
    assert reader.read(0, 2) == (True, b"third")


def test_other_ranks_pages_cannot_be_written() -> None:
    one, _, _ = boards()
    with pytest.raises(TypeError):
        one._pages[1][0] = 1


def test_a_page_that_is_not_what_was_offered_is_refused() -> None:
    mine, other, third = OwnPage(), OwnPage(), OwnPage()
    lies = type(other.offer)(other.offer.host, third.offer.path, other.offer.nonce)
    with pytest.raises(OSError, match="another page"):
        Board(mine, [mine.offer, lies], 0)
    with pytest.raises(OSError, match="elsewhere"):
        Board(mine, [mine.offer, type(other.offer)("moon", other.offer.path, other.offer.nonce)], 0)
    for page in (mine, other, third):
        page.close_file()


# --- the control plane with it ---------------------------------------------------------------------------------------


def test_all_messages_arrive_before_and_after_the_board_is_there(
    store: dist.Store, threads: ThreadPoolExecutor
) -> None:
    planes = [ControlPlane(store, rank, RANKS) for rank in range(RANKS)]
    for number in range(40):
        found = on_ranks(threads, lambda rank, number=number: gather(planes[rank], number))
        assert found == [[content(rank, number) for rank in range(RANKS)]] * RANKS
    assert [has_board(each) for each in planes] == [True] * RANKS


def test_nothing_but_the_last_long_messages_stays_at_the_store(store: dist.Store, threads: ThreadPoolExecutor) -> None:
    planes = met(store, threads)
    for number in range(20):
        on_ranks(threads, lambda rank, number=number: gather(planes[rank], number))
    assert store.num_keys() <= RANKS


def test_gathering_on_a_board_asks_the_store_nothing(store: dist.Store, threads: ThreadPoolExecutor) -> None:
    planes = met(store, threads)
    on_ranks(threads, lambda rank: planes[rank].barrier("that what led here is deleted", LONG_S))
    for each in planes:
        each._store = None  # type: ignore[assignment]
    found = on_ranks(threads, lambda rank: planes[rank].all_gather("tea", b"%d" % rank, LONG_S))
    assert found == [[b"0", b"1", b"2"]] * RANKS


def test_one_rank_without_such_memory_leaves_all_to_the_store(
    store: dist.Store, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(OwnPage):
        def __init__(self) -> None:
            raise OSError("no such memory")

    def make(rank: int) -> ControlPlane:
        control = ControlPlane(store, rank, RANKS)
        if rank == 1:
            inner = control._meet_at_board

            def without(this: int, deadline: float) -> Board | None:
                with monkeypatch.context() as patch:
                    patch.setattr(plane, "OwnPage", Elsewhere)
                    return inner(this, deadline)

            control._meet_at_board = without  # type: ignore[method-assign]
        return control

    planes = [make(rank) for rank in range(RANKS)]
    for number in range(8):
        found = on_ranks(threads, lambda rank, number=number: gather(planes[rank], number))
        assert found == [[content(rank, number) for rank in range(RANKS)]] * RANKS
    assert [has_board(each) for each in planes] == [False] * RANKS


def test_a_rank_that_dies_while_a_board_is_made_holds_nobody_up(
    store: dist.Store, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plane, "_BOARD_S", 0.2)
    planes = [ControlPlane(store, rank, RANKS) for rank in range(RANKS)]
    planes[2]._meet_at_board = lambda this, deadline: None  # type: ignore[method-assign]  # it has said its word, and is gone
    for number in range(FIRST + 1):
        found = on_ranks(threads, lambda rank, number=number: gather(planes[rank], number))
        assert found == [[content(rank, number) for rank in range(RANKS)]] * RANKS

    def next_round(rank: int) -> tuple[int, ...]:
        with pytest.raises(
            ControlPlaneError, match=r"rank 2 did not answer within 0.3 s, while gathering tea"
        ) as error:
            planes[rank].all_gather("tea", b"", SHORT_S)
        return error.value.missing

    assert on_ranks(threads, next_round, range(2)) == [(2,)] * 2
    assert not has_board(planes[0])
    assert not has_board(planes[1])


def test_who_is_late_for_the_verdict_takes_the_one_that_stands(store: dist.Store, threads: ThreadPoolExecutor) -> None:
    planes = [ControlPlane(store, rank, RANKS) for rank in range(RANKS)]
    settled = planes[0].settled
    late = []

    def never_sees(name: str) -> bytes | None:
        late.append(settled(name))
        return None

    planes[0].settled = never_sees  # type: ignore[method-assign]
    for number in range(6):
        found = on_ranks(threads, lambda rank, number=number: gather(planes[rank], number))
        assert found == [[content(rank, number) for rank in range(RANKS)]] * RANKS
    assert late
    assert [has_board(each) for each in planes] == [True] * RANKS


def test_a_rank_that_does_not_come_to_the_board_is_named(store: dist.Store, threads: ThreadPoolExecutor) -> None:
    planes = met(store, threads)

    def next_round(rank: int) -> tuple[int, ...]:
        with pytest.raises(
            ControlPlaneError, match=r"rank 1 did not answer within 0.3 s, while gathering tea"
        ) as error:
            planes[rank].all_gather("tea", b"", SHORT_S)
        return error.value.missing

    assert on_ranks(threads, next_round, range(0, RANKS, 2)) == [(1,)] * 2
    # It comes late, finds what the others have said, and from then on all are together again.
    assert planes[1].all_gather("tea", b"late", LONG_S) == [b"", b"late", b""]
    assert (
        on_ranks(threads, lambda rank: planes[rank].all_gather("tea", b"%d" % rank, LONG_S)) == [[b"0", b"1", b"2"]] * 3
    )


# --- processes -------------------------------------------------------------------------------------------------------


def gather_often(member: Member) -> dict[str, Any]:
    names = set(os.listdir("/dev/shm"))
    control = ControlPlane(dist.PrefixStore("board", member.environment.store), member.rank, member.world_size)
    ranks = range(member.world_size)
    right = [gather(control, number) == [content(rank, number) for rank in ranks] for number in range(300)]
    open_files = len(os.listdir("/proc/self/fd"))
    for number in range(300, 600):
        gather(control, number)
    return {
        "right": all(right),
        "board": has_board(control),
        "grown": len(os.listdir("/proc/self/fd")) - open_files,
        "left": [name for name in set(os.listdir("/dev/shm")) - names if "eplb" in name],
    }


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_processes_of_one_host_gather_on_a_board_and_leave_nothing_behind(ranks: int) -> None:
    report = run_scenarios(ranks, [Scenario("gather", gather_often)], process_group=False)
    assert report.returned("gather") == [{"right": True, "board": True, "grown": 0, "left": []}] * ranks
