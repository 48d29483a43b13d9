"""The commit record: whatever happens, all ranks read the same verdict."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from eplb_core.control.commit_record import COMMIT, Ledger, Verdict, error_of, who_is_to_blame
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import ControlPlaneError, PeerLostError, TransferError, TransferTimeoutError


def planes(store: dist.Store, ranks: int) -> list[ControlPlane]:
    return [ControlPlane(store, rank, ranks) for rank in range(ranks)]


def together(calls: list[Callable[[], Verdict]]) -> list[Verdict]:
    """Make all calls at the same time and return what they return, in order."""
    said: list[Verdict | BaseException | None] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            said[number] = calls[number]()
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            said[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(isinstance(one, Verdict) for one in said), said
    return [one for one in said if isinstance(one, Verdict)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 59, 60, 61, 130])
def test_a_step_is_committed_once_every_rank_has_said_yes(ranks: int) -> None:
    ledgers = [Ledger(plane, 20) for plane in planes(dist.HashStore(), ranks)]
    verdicts = together([lambda ledger=ledger: ledger.vote("step 0") for ledger in ledgers])  # type: ignore[misc]
    assert {verdict.outcome for verdict in verdicts} == {COMMIT}
    assert len(set(verdicts)) == 1


def test_without_one_rank_the_others_all_abort_and_name_it() -> None:
    ledgers = [Ledger(plane, 0.4) for plane in planes(dist.HashStore(), 130)]
    began = time.monotonic()
    present = [ledger for rank, ledger in enumerate(ledgers) if rank not in (3, 127)]
    verdicts = together([lambda ledger=ledger: ledger.vote("step 0") for ledger in present])  # type: ignore[misc]
    assert time.monotonic() - began < 10
    assert len(set(verdicts)) == 1
    assert verdicts[0].aborted
    assert verdicts[0].peers == (3, 127)
    error = error_of(verdicts[0], rank=0, usable=False)
    assert isinstance(error, TransferTimeoutError)
    assert error.peers == (3, 127)


def test_what_a_rank_aborts_with_reaches_the_others_as_an_error_of_the_same_class() -> None:
    one, other = (Ledger(plane, 20) for plane in planes(dist.HashStore(), 2))
    one.abort("step 4", PeerLostError("rank 7 is gone", peers=[7], phase="read"))
    verdict = other.vote("step 4")
    error = error_of(verdict, rank=1, usable=False)
    assert type(error) is PeerLostError
    assert (error.peers, error.phase) == ((7,), "read")
    assert "rank 0 could not go on" in str(error)
    assert "rank 7 is gone" in str(error)


def test_a_rank_that_waited_for_one_that_had_given_up_blames_whom_that_one_blames() -> None:
    one, other = (Ledger(plane, 20) for plane in planes(dist.HashStore(), 2))
    one.abort("step 4", PeerLostError("rank 7 is gone", peers=[7], phase="read"))
    misled = TransferTimeoutError("rank 0 did nothing", peers=[0], phase="read")
    error = who_is_to_blame(misled, other.abort("step 4", misled), rank=1)
    assert isinstance(error, PeerLostError)
    assert error.peers == (7,)


@pytest.mark.parametrize("peers", [[1], [5], []])
def test_an_error_that_is_not_about_who_gave_up_stays_as_it_is(peers: list[int]) -> None:
    one, other = (Ledger(plane, 20) for plane in planes(dist.HashStore(), 2))
    one.abort("step 4", PeerLostError("rank 1 is gone", peers=[1], phase="read"))
    mine = TransferTimeoutError("it takes too long", peers=peers, phase="read")
    assert who_is_to_blame(mine, other.abort("step 4", mine), rank=1) is mine


def test_an_error_of_another_kind_reaches_them_as_a_transfer_error_of_that_rank() -> None:
    one, other = (Ledger(plane, 20) for plane in planes(dist.HashStore(), 2))
    one.abort("step 4", MemoryError("no memory"))
    error = error_of(other.vote("step 4"), rank=1, usable=False)
    assert type(error) is TransferError
    assert error.peers == (0,)
    assert "MemoryError: no memory" in str(error)


def test_a_step_that_all_have_is_committed_although_the_last_one_died_before_it_could_say_so() -> None:
    store = dist.HashStore()
    ledgers = [Ledger(plane, 20) for plane in planes(store, 3)]
    ledgers[2]._say_yes("step 0")  # and dies here if it is the last
    verdicts = together([lambda ledger=ledger: ledger.vote("step 0") for ledger in ledgers[:2]])  # type: ignore[misc]
    assert {verdict.outcome for verdict in verdicts} == {COMMIT}

    ledgers[0]._say_yes("step 1")
    ledgers[1]._say_yes("step 1")
    ledgers[2]._say_yes("step 1")
    assert ledgers[0].abort("step 1", ValueError("late")).aborted  # nobody had settled it


@pytest.mark.parametrize("seed", range(40))
def test_votes_and_aborts_that_race_end_the_same_for_all(seed: int) -> None:
    chance = random.Random(seed)
    ledgers = [Ledger(plane, 20) for plane in planes(dist.HashStore(), 4)]
    aborting = chance.randrange(4)

    def act(rank: int) -> Verdict:
        time.sleep(chance.uniform(0, 0.002))
        return ledgers[rank].abort("it", ValueError("no")) if rank == aborting else ledgers[rank].vote("it")

    verdicts = together([lambda rank=rank: act(rank) for rank in range(4)])  # type: ignore[misc]
    assert len(set(verdicts)) == 1
    assert verdicts[0].aborted

    verdicts = together([lambda ledger=ledger: ledger.vote("more") for ledger in ledgers])  # type: ignore[misc]
    late = ledgers[aborting].abort("more", ValueError("too late"))
    assert {*verdicts, late} == {verdicts[0]}
    assert late.outcome == COMMIT


def test_the_last_rank_alone_says_what_the_outcome_is() -> None:
    asked: list[int] = []
    ledgers = [Ledger(plane, 20) for plane in planes(dist.HashStore(), 3)]

    def outcome(rank: int) -> str:
        asked.append(rank)
        return f"as rank {rank} says"

    verdicts = together(
        [lambda rank=rank: ledgers[rank].vote("it", lambda: outcome(rank)) for rank in range(3)]  # type: ignore[misc]
    )
    assert len(asked) == 1
    assert {verdict.outcome for verdict in verdicts} == {f"as rank {asked[0]} says"}


def test_what_watches_ends_the_waiting() -> None:
    ledger = Ledger(planes(dist.HashStore(), 2)[0], 20)
    verdict = ledger.vote("it", watch=lambda: PeerLostError("rank 1 is silent", peers=[1]))
    assert verdict.aborted
    assert verdict.peers == (1,)


@pytest.mark.parametrize("ranks", [2, 61])
def test_forgotten_questions_leave_nothing_at_the_store(ranks: int) -> None:
    store = dist.HashStore()
    ledgers = [Ledger(plane, 20) for plane in planes(store, ranks)]
    before = store.num_keys()
    for step in range(3):
        together([lambda ledger=ledger: ledger.vote(f"step {step}") for ledger in ledgers])  # type: ignore[misc]  # noqa: B023
        ledgers[0].forget(f"step {step}")
    assert store.num_keys() == before


def test_a_store_that_is_gone_is_said_to_be() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    ledger = Ledger(ControlPlane(dist.PrefixStore("p", client), 0, 2), 5)
    del server
    with pytest.raises(ControlPlaneError, match="gone or does not answer"):
        ledger.vote("it")
