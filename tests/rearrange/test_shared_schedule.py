"""The layers of a schedule are cut in groups, each on one rank, and every rank has all of them in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
from torch.distributed import HashStore

from eplb_core.control.agreement import Answer
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import EplbError, HandshakeError
from eplb_core.planning.plan import plan_rearrangement
from eplb_core.rearrange.shared_schedule import share_cuts
from eplb_core.scheduling.layer import LayerMoves
from eplb_core.scheduling.schedule import in_turn, schedule_steps

TIMEOUT_S = 20.0
MIB = 1 << 20


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def cut(group: int) -> list[LayerMoves]:
    """Something that tells groups apart."""
    return [LayerMoves([group, layer, -1], [layer], [(layer, group, 1)]) for layer in range(group + 1)]


def share(
    threads: ThreadPoolExecutor, cuts: list[Callable[[int], list[LayerMoves]]], groups: int
) -> list[list[list[LayerMoves]] | EplbError]:
    """Return what every rank gets, or raises."""
    store = HashStore()

    def one(rank: int) -> list[list[LayerMoves]] | EplbError:
        try:
            return share_cuts(ControlPlane(store, rank, len(cuts)), cuts[rank], groups, TIMEOUT_S)
        except EplbError as error:
            return error

    return list(threads.map(one, range(len(cuts))))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 7])
def test_every_rank_has_all_groups_and_each_was_cut_once(threads: ThreadPoolExecutor, ranks: int, groups: int) -> None:
    asked: list[tuple[int, int]] = []

    def noted(rank: int) -> Callable[[int], list[LayerMoves]]:
        def note(group: int) -> list[LayerMoves]:
            asked.append((rank, group))
            return cut(group)

        return note

    expected = [cut(group) for group in range(groups)]
    assert in_turn(cut, groups) == expected
    assert share(threads, [noted(rank) for rank in range(ranks)], groups) == [expected] * ranks
    assert sorted(group for _, group in asked) == list(range(groups))
    assert len({rank for rank, _ in asked}) == min(ranks, groups)


def test_a_group_that_cannot_be_cut_is_an_error_on_every_rank(threads: ThreadPoolExecutor) -> None:
    def fails(group: int) -> list[LayerMoves]:
        raise EplbError("it came to a halt", why="of a bug")

    mine, *others = share(threads, [fails, cut, cut], 3)
    assert isinstance(mine, EplbError)
    assert mine.what == "it came to a halt"
    for error in others:
        assert isinstance(error, EplbError)
        assert "rank 0" in str(error)
        assert "it came to a halt" in str(error)


def test_a_rank_that_does_not_come_is_named(threads: ThreadPoolExecutor) -> None:
    store = HashStore()
    with pytest.raises(HandshakeError) as caught:
        share_cuts(ControlPlane(store, 0, 2), cut, 2, 0.2)
    assert caught.value.missing == (1,)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(Answer(value=b"\xc1")),
        msgspec.msgpack.encode(Answer(value=msgspec.msgpack.encode({1: [[[1, True], [], []]]}))),
        msgspec.msgpack.encode(Answer(value=msgspec.msgpack.encode({}))),
    ],
    ids=["nothing", "rubbish", "a rank's rubbish", "no numbers", "too little"],
)
def test_what_cannot_be_read_or_is_not_whole_is_refused(threads: ThreadPoolExecutor, said: bytes) -> None:
    store = HashStore()
    threads.submit(ControlPlane(store, 1, 2).all_gather, "the schedule", said, TIMEOUT_S)
    with pytest.raises(HandshakeError):
        share_cuts(ControlPlane(store, 0, 2), cut, 2, TIMEOUT_S)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_that_share_the_work_have_the_steps_of_one_that_does_it_alone(
    threads: ThreadPoolExecutor, ranks: int
) -> None:
    rng = np.random.default_rng(5)
    old, new = (np.stack([rng.permutation(ranks * 40) % (ranks * 37) for _ in range(12)]) for _ in range(2))
    plan = plan_rearrangement(old, new, ranks)
    store = HashStore()
    alone = schedule_steps(plan, 1000, window_bytes=40_000, in_place_from=MIB)

    def one(rank: int) -> bool:
        control = ControlPlane(store, rank, ranks)
        shared = schedule_steps(
            plan,
            1000,
            window_bytes=40_000,
            in_place_from=MIB,
            share=lambda cut, groups: share_cuts(control, cut, groups, TIMEOUT_S),
        )
        fields = ("transfers", "copies", "changes", "staged_bytes", "finished_layers")
        return len(shared) == len(alone) and all(
            np.array_equal(getattr(mine, field), getattr(other, field))
            for mine, other in zip(shared, alone, strict=True)
            for field in fields
        )

    assert list(threads.map(one, range(ranks))) == [True] * ranks
    assert store.num_keys() == ranks  # it was shared
    assert any((step.transfers[:, 5] == 0).any() for step in alone)
