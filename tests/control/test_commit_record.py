"""The commit record: whatever happens, all ranks read the same decision."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import pytest
import torch.distributed as dist

from eplb_core.control.commit_record import COMMIT, CommitRecord, Decision, error_of, who_is_to_blame
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import ControlPlaneError, PeerLostError, TransferError, TransferTimeoutError


def planes(store: dist.Store, ranks: int) -> list[ControlPlane]:
    return [ControlPlane(store, rank, ranks) for rank in range(ranks)]


def together(calls: list[Callable[[], Decision]]) -> list[Decision]:
    """Make all calls at the same time and return what they return, in order."""
    said: list[Decision | BaseException | None] = [None] * len(calls)

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
    assert all(isinstance(one, Decision) for one in said), said
    return [one for one in said if isinstance(one, Decision)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 59, 60, 61, 130])
def test_a_step_is_committed_once_every_rank_has_said_yes(ranks: int) -> None:
    records = [CommitRecord(plane, 20) for plane in planes(dist.HashStore(), ranks)]
    decisions = together([lambda record=record: record.decide("step 0") for record in records])  # type: ignore[misc]
    assert {decision.outcome for decision in decisions} == {COMMIT}
    assert len(set(decisions)) == 1


def test_what_is_forgotten_is_removed_by_a_rank_that_waits_and_by_no_other() -> None:
    store = dist.HashStore()
    earlier = [CommitRecord(plane.scoped("earlier"), 20) for plane in planes(store, 2)]
    together([lambda record=record: record.decide("last step") for record in earlier])  # type: ignore[misc]
    before = store.num_keys()
    forgotten = [deque([partial(earlier[0].forget, "last step")]) for _ in range(2)]
    first, last = (CommitRecord(plane, 20, chores) for plane, chores in zip(planes(store, 2), forgotten, strict=True))
    waiting = threading.Thread(target=first.decide, args=("step 0",))
    waiting.start()
    while forgotten[0] or store.num_keys() != before - 2 + 1:  # its own yes is the only thing that is new
        assert waiting.is_alive()
        time.sleep(1e-3)
    assert last.decide("step 0").outcome == COMMIT
    waiting.join(30)
    assert len(forgotten[1]) == 1


def test_without_one_rank_the_others_all_abort_and_name_it() -> None:
    records = [CommitRecord(plane, 0.4) for plane in planes(dist.HashStore(), 130)]
    began = time.monotonic()
    present = [record for rank, record in enumerate(records) if rank not in (3, 127)]
    decisions = together([lambda record=record: record.decide("step 0") for record in present])  # type: ignore[misc]
    assert time.monotonic() - began < 10
    assert len(set(decisions)) == 1
    assert decisions[0].aborted
    assert decisions[0].peers == (3, 127)
    error = error_of(decisions[0], rank=0, usable=False)
    assert isinstance(error, TransferTimeoutError)
    assert error.peers == (3, 127)


def test_what_a_rank_aborts_with_reaches_the_others_as_an_error_of_the_same_class() -> None:
    one, other = (CommitRecord(plane, 20) for plane in planes(dist.HashStore(), 2))
    one.abort("step 4", PeerLostError("rank 7 is gone", peers=[7], phase="read"))
    decision = other.decide("step 4")
    error = error_of(decision, rank=1, usable=False)
    assert type(error) is PeerLostError
    assert (error.peers, error.phase) == ((7,), "read")
    assert "rank 0 could not go on" in str(error)
    assert "rank 7 is gone" in str(error)


def test_a_rank_that_waited_for_one_that_had_given_up_blames_whom_that_one_blames() -> None:
    one, other = (CommitRecord(plane, 20) for plane in planes(dist.HashStore(), 2))
    one.abort("step 4", PeerLostError("rank 7 is gone", peers=[7], phase="read"))
    misled = TransferTimeoutError("rank 0 did nothing", peers=[0], phase="read")
    error = who_is_to_blame(misled, other.abort("step 4", misled), rank=1)
    assert isinstance(error, PeerLostError)
    assert error.peers == (7,)


@pytest.mark.parametrize("peers", [[1], [5], []])
def test_an_error_that_is_not_about_who_gave_up_stays_as_it_is(peers: list[int]) -> None:
    one, other = (CommitRecord(plane, 20) for plane in planes(dist.HashStore(), 2))
    one.abort("step 4", PeerLostError("rank 1 is gone", peers=[1], phase="read"))
    mine = TransferTimeoutError("it takes too long", peers=peers, phase="read")
    assert who_is_to_blame(mine, other.abort("step 4", mine), rank=1) is mine


def test_an_error_of_another_kind_reaches_them_as_a_transfer_error_of_that_rank() -> None:
    one, other = (CommitRecord(plane, 20) for plane in planes(dist.HashStore(), 2))
    one.abort("step 4", MemoryError("no memory"))
    error = error_of(other.decide("step 4"), rank=1, usable=False)
    assert type(error) is TransferError
    assert error.peers == (0,)
    assert "MemoryError: no memory" in str(error)


def test_a_step_that_all_have_is_committed_although_the_last_one_died_before_it_could_say_so() -> None:
    store = dist.HashStore()
    records = [CommitRecord(plane, 20) for plane in planes(store, 3)]
    records[2]._say_yes("step 0")  # and dies here if it is the last
    decisions = together([lambda record=record: record.decide("step 0") for record in records[:2]])  # type: ignore[misc]
    assert {decision.outcome for decision in decisions} == {COMMIT}

    records[0]._say_yes("step 1")
    records[1]._say_yes("step 1")
    records[2]._say_yes("step 1")
    assert records[0].abort("step 1", ValueError("late")).aborted  # nobody had settled it


@pytest.mark.parametrize("seed", range(40))
def test_votes_and_aborts_that_race_end_the_same_for_all(seed: int) -> None:
    chance = random.Random(seed)
    records = [CommitRecord(plane, 20) for plane in planes(dist.HashStore(), 4)]
    aborting = chance.randrange(4)

    def act(rank: int) -> Decision:
        time.sleep(chance.uniform(0, 0.002))
        return records[rank].abort("it", ValueError("no")) if rank == aborting else records[rank].decide("it")

    decisions = together([lambda rank=rank: act(rank) for rank in range(4)])  # type: ignore[misc]
    assert len(set(decisions)) == 1
    assert decisions[0].aborted

    decisions = together([lambda record=record: record.decide("more") for record in records])  # type: ignore[misc]
    late = records[aborting].abort("more", ValueError("too late"))
    assert {*decisions, late} == {decisions[0]}
    assert late.outcome == COMMIT


def test_the_last_rank_alone_says_what_the_outcome_is() -> None:
    asked: list[int] = []
    records = [CommitRecord(plane, 20) for plane in planes(dist.HashStore(), 3)]

    def outcome(rank: int) -> str:
        asked.append(rank)
        return f"as rank {rank} says"

    decisions = together(
        [lambda rank=rank: records[rank].decide("it", lambda: outcome(rank)) for rank in range(3)]  # type: ignore[misc]
    )
    assert len(asked) == 1
    assert {decision.outcome for decision in decisions} == {f"as rank {asked[0]} says"}


def test_what_watches_ends_the_waiting() -> None:
    record = CommitRecord(planes(dist.HashStore(), 2)[0], 20)
    decision = record.decide("it", watch=lambda: PeerLostError("rank 1 is silent", peers=[1]))
    assert decision.aborted
    assert decision.peers == (1,)


@pytest.mark.parametrize("ranks", [2, 61])
def test_forgotten_questions_leave_nothing_at_the_store(ranks: int) -> None:
    store = dist.HashStore()
    records = [CommitRecord(plane, 20) for plane in planes(store, ranks)]
    before = store.num_keys()
    for step in range(3):
        together([lambda record=record: record.decide(f"step {step}") for record in records])  # type: ignore[misc]  # noqa: B023
        records[0].forget(f"step {step}")
    assert store.num_keys() == before


def test_a_store_that_is_gone_is_said_to_be() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    record = CommitRecord(ControlPlane(dist.PrefixStore("p", client), 0, 2), 5)
    del server
    with pytest.raises(ControlPlaneError, match="gone or does not answer"):
        record.decide("it")
