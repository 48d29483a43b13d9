"""Calls end the same way on all ranks, however many of them came: over a store, and in memory that ranks share."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from eplb_core.control.board import CAPACITY
from eplb_core.control.call import Calls
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import ControlPlaneError
from tests.support.ranks import Member, Scenario, run_scenarios

SHORT_S, LONG_S = 0.2, 20.0
BEFORE_A_BOARD = 3


class Ranks:
    """The calls of some ranks, each used by a thread of its own."""

    def __init__(
        self, number: int, on_board: bool, stands: Callable[[Sequence[bytes]], bool] = lambda said: True
    ) -> None:
        self.store = dist.HashStore()
        self.calls = [Calls(ControlPlane(self.store, rank, number), stands) for rank in range(number)]
        self.threads = ThreadPoolExecutor(number)
        if not on_board:
            for each in self.calls:
                each._control.meet_at_board = lambda name, deadline: (None, [])  # type: ignore[method-assign]
        for _ in range(BEFORE_A_BOARD + 1):
            self.all_meet(b"first")
        assert [each._board is not None for each in self.calls] == [on_board] * number

    def start(self, rank: int, said: bytes, timeout_s: float = LONG_S) -> Any:
        """Let a rank call, and return what becomes of it: the call's number and what all said, or who is missing."""

        def meet() -> Any:
            try:
                call, all_said = self.calls[rank].meet("tea", said, timeout_s)
            except ControlPlaneError as error:
                return error.missing
            return call, all_said

        return self.threads.submit(meet)

    def all_meet(self, said: bytes) -> int:
        """Let all ranks say something of their own; return the number of the call."""
        expected = [said + b" %d" % rank for rank in range(len(self.calls))]
        told = [each.result(LONG_S) for each in [self.start(rank, said) for rank, said in enumerate(expected)]]
        assert [one[1] for one in told] == [expected] * len(told)
        assert len({one[0].number for one in told}) == 1
        return int(told[0][0].number)


@pytest.fixture(params=[True, False], ids=["board", "store"])
def on_board(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[2, 3, 4], ids=lambda number: f"{number} ranks")
def ranks(request: pytest.FixtureRequest, on_board: bool) -> Iterator[Ranks]:
    made = Ranks(request.param, on_board)
    yield made
    made.threads.shutdown()


@pytest.mark.parametrize("missed", [1, 3])
def test_ranks_meet_again_after_calls_that_one_has_missed(ranks: Ranks, missed: int) -> None:
    for _ in range(missed):
        waiting = [ranks.start(rank, b"before", SHORT_S) for rank in range(len(ranks.calls) - 1)]
        assert [each.result(LONG_S) for each in waiting] == [(len(ranks.calls) - 1,)] * len(waiting)
    numbers = [ranks.all_meet(b"after %d" % number) for number in range(3)]
    assert numbers == [numbers[0], numbers[0] + 1, numbers[0] + 2]


def test_a_rank_that_waits_alone_is_told_who_is_missing_and_meets_the_others_later(ranks: Ranks) -> None:
    others = tuple(range(1, len(ranks.calls)))
    assert ranks.start(0, b"alone", SHORT_S).result(LONG_S) == others
    waiting = [ranks.start(rank, b"late", LONG_S) for rank in others]
    comes = ranks.start(0, b"again", LONG_S)
    expected = [b"again"] + [b"late"] * len(others)
    assert [each.result(LONG_S)[1] for each in (comes, *waiting)] == [expected] * len(ranks.calls)


def test_a_rank_that_still_waits_comes_along_where_others_have_given_up(on_board: bool) -> None:
    ranks = Ranks(3, on_board)
    patient = ranks.start(0, b"patient")
    for _ in range(2):
        assert ranks.start(1, b"hasty", SHORT_S).result(LONG_S) == (2,)
    last = [ranks.start(rank, b"here") for rank in (1, 2)]
    assert [each.result(LONG_S)[1] for each in (patient, *last)] == [[b"patient", b"here", b"here"]] * 3
    ranks.threads.shutdown()


def test_who_came_along_to_a_later_number_blames_who_came_to_neither(on_board: bool) -> None:
    ranks = Ranks(3, on_board)
    patient = ranks.start(0, b"patient", 2 * SHORT_S)
    assert ranks.start(1, b"hasty", SHORT_S).result(LONG_S) == (2,)
    assert patient.result(LONG_S) == (2,)
    ranks.threads.shutdown()


def test_messages_of_any_length_arrive(ranks: Ranks) -> None:
    for length in (0, 1, CAPACITY, CAPACITY + 1, 100_000):
        ranks.all_meet(b"x" * length)


def test_what_is_said_without_waiting_is_an_answer_until_it_is_taken_back(ranks: Ranks) -> None:
    refusing = ranks.calls[-1]
    refusing.say(b"no")
    told = [ranks.start(rank, b"yes", LONG_S) for rank in range(len(ranks.calls) - 1)]
    assert all(each.result(LONG_S)[1][-1] == b"no" for each in told)
    ranks.all_meet(b"next")
    refusing.say(b"no")
    refusing.say(b"no again")
    refusing.unsay()
    ranks.all_meet(b"and next")


def test_what_is_outdated_is_no_answer(on_board: bool) -> None:
    def stands(said: Sequence[bytes]) -> bool:
        return b"outdated" not in said

    ranks = Ranks(2, on_board, stands)
    ranks.calls[1].say(b"outdated")
    waiting = ranks.start(0, b"new")
    with pytest.raises(TimeoutError):
        waiting.result(SHORT_S)
    ranks.calls[1].unsay()
    assert ranks.start(1, b"new too").result(LONG_S)[1] == [b"new", b"new too"]
    assert waiting.result(LONG_S)[1] == [b"new", b"new too"]
    ranks.threads.shutdown()


def test_a_rank_that_was_interrupted_holds_nobody_up(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def interrupt(seconds: float) -> None:
            raise KeyboardInterrupt

        patch.setattr(time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ranks.calls[0].meet("tea", b"interrupted", LONG_S)
    ranks.all_meet(b"next")


def test_a_rank_that_was_away_while_others_met_and_gave_up_is_told_what_it_has_missed(
    on_board: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process that was stopped and goes on: others have met it, and have called twice in vain since."""
    ranks = Ranks(2, on_board)
    stopped, goes_on = ranks.calls[1], threading.Event()
    wait = stopped._end

    def after_a_while(*arguments: Any) -> Any:
        goes_on.wait(LONG_S)
        return wait(*arguments)

    stopped._end = after_a_while  # type: ignore[method-assign]
    away = ranks.start(1, b"from before", LONG_S)
    assert ranks.start(0, b"here").result(LONG_S)[1] == [b"here", b"from before"]
    for _ in range(2):
        assert ranks.start(0, b"again", SHORT_S).result(LONG_S) == (1,)
    goes_on.set()
    assert away.result(LONG_S)[1] == [b"here", b"from before"]
    ranks.all_meet(b"next")
    ranks.threads.shutdown()


# --- within a call ---------------------------------------------------------------------------------------------------


def test_what_ranks_gather_in_a_call_they_all_get_or_none(ranks: Ranks) -> None:
    number = len(ranks.calls)
    met = [each.result(LONG_S)[0] for each in [ranks.start(rank, b"hello") for rank in range(number)]]
    gathered = list(ranks.threads.map(lambda call: call.all_gather("cups", b"%d" % call.rank, LONG_S), met))
    assert gathered == [[b"%d" % rank for rank in range(number)]] * number

    def gather(call: Any, timeout_s: float) -> Any:
        try:
            return call.all_gather("plates", b"", timeout_s)
        except ControlPlaneError as error:
            return str(error)

    early = [ranks.threads.submit(gather, call, SHORT_S) for call in met[1:]]
    assert all("rank 0 did not answer" in each.result(LONG_S) for each in early)
    began = time.monotonic()
    assert "did not answer" in gather(met[0], LONG_S)
    assert time.monotonic() - began < LONG_S
    ranks.all_meet(b"next")


def test_a_rank_that_has_gone_on_to_the_next_call_is_not_waited_for_in_the_last_one() -> None:
    ranks = Ranks(2, on_board=True)
    met = [each.result(LONG_S)[0] for each in [ranks.start(rank, b"hello") for rank in range(2)]]
    gone_on = ranks.start(1, b"next")
    with pytest.raises(ControlPlaneError, match="rank 1 did not answer") as error:
        met[0].all_gather("cups", b"", 1e6)
    assert error.value.missing == (1,)
    assert ranks.start(0, b"next").result(LONG_S)[1] == [b"next"] * 2
    gone_on.result(LONG_S)
    ranks.threads.shutdown()


# --- at any moment ---------------------------------------------------------------------------------------------------


def test_a_board_asks_the_store_nothing_while_all_ranks_come() -> None:
    ranks = Ranks(3, on_board=True)
    for each in ranks.calls:
        each._control._connection = None  # type: ignore[assignment]
    for number in range(20):
        ranks.all_meet(b"%d" % number)
    ranks.threads.shutdown()


def test_a_store_does_not_fill_with_calls_that_were_missed(ranks: Ranks) -> None:
    def once() -> int:
        ranks.start(0, b"alone", 0.0).result(LONG_S)
        ranks.all_meet(b"x" * (CAPACITY + 1))
        ranks.all_meet(b"together")
        return int(ranks.store.num_keys())

    first = once()
    assert max(once() for _ in range(10)) <= first


def call_often(calls: Calls, rank: int, seed: int, rounds: int) -> dict[int, list[bytes]]:
    """Make calls that may time out in the moment in which the last rank comes; return what those have said that met."""
    chance = random.Random(seed + rank)
    found: dict[int, list[bytes]] = {}
    for attempt in range(rounds):
        time.sleep(chance.choice((0.0, 0.0, chance.uniform(0, 2e-3))))
        try:
            call, said = calls.meet("tea", b"%d %d" % (rank, attempt), chance.uniform(0, 2e-3))
        except ControlPlaneError:
            continue
        assert call.number not in found
        found[call.number] = said
    return found


@pytest.mark.parametrize("number", [2, 3])
def test_ranks_that_give_up_at_any_moment_agree_on_every_call(number: int, on_board: bool) -> None:
    seed = random.randrange(1 << 30)
    ranks = Ranks(number, on_board)
    started = [ranks.threads.submit(call_often, calls, rank, seed, 150) for rank, calls in enumerate(ranks.calls)]
    found = [each.result(100) for each in started]
    assert found == [found[0]] * number, f"seed {seed}"
    ranks.all_meet(b"at the end")
    ranks.threads.shutdown()


def call_often_from_processes(member: Member, seed: int, rounds: int) -> Any:
    control = ControlPlane(dist.PrefixStore("calls", member.environment.store), member.rank, member.world_size)
    calls = Calls(control)
    for _ in range(BEFORE_A_BOARD):
        calls.meet("tea", b"", LONG_S)
    assert calls._board is not None
    return call_often(calls, member.rank, seed, rounds)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_processes_that_give_up_at_any_moment_agree_on_every_call(ranks: int) -> None:
    seed = random.randrange(1 << 30)
    report = run_scenarios(ranks, [Scenario("often", call_often_from_processes, (seed, 300))], process_group=False)
    found = report.returned("often")
    assert found == [found[0]] * ranks, f"seed {seed}"
    assert report.exit_codes == [0] * ranks
