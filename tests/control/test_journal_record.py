"""Ranks of one host decide in a journal: whatever order they say things in, and whoever ends, all read the same."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from eplb_core.control import journal as journals
from eplb_core.control.commit_record import COMMIT
from eplb_core.control.journal import CAPACITY, FILES, JournalFile, meet_at_journal
from eplb_core.control.journal_record import JournalRecord, _Entry
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import ControlPlaneError, PeerLostError, TransferError
from eplb_core.launch.local_ranks import RankEnvironment, collect_local_ranks

LONG_S, SHORT_S = 20.0, 0.2


@pytest.fixture
def opened() -> Iterator[list[JournalFile]]:
    """Return one journal, as it is opened by each of four ranks."""
    file = os.memfd_create("journal")
    yield [JournalFile(f"/proc/self/fd/{file}") for _ in range(4)]
    os.close(file)


def records(
    files: list[JournalFile], ranks: int, timeout_s: float = LONG_S, call: str = "run 1"
) -> list[JournalRecord]:
    return [JournalRecord(files[rank], call, rank, ranks, timeout_s) for rank in range(ranks)]


def test_entries_come_back_in_the_order_in_which_they_were_appended(opened: list[JournalFile]) -> None:
    said = [bytes([number % 251]) * (number * 37 % (CAPACITY + 1)) for number in range(300)]
    for number, entry in enumerate(said):
        opened[number % 4].append(entry)
    assert opened[3].read(0) == said
    assert opened[2].read(299) == said[299:]
    assert opened[2].read(300) == []
    with pytest.raises(ValueError, match="does not fit"):
        opened[0].append(bytes(CAPACITY + 1))


def test_an_entry_that_is_not_seen_whole_is_not_there_yet(opened: list[JournalFile]) -> None:
    writer, reader, _, _ = opened
    for entry in (b"one", b"two", b"three"):
        writer.append(entry)
    path = f"/proc/self/fd/{writer._file}"
    place = journals.ENTRY_BYTES + 11
    with open(path, "r+b", buffering=0) as file:
        file.seek(place)
        kept = file.read(1)
        file.seek(place)
        file.write(b"\0")
        assert reader.read(0) == [b"one"]
        file.seek(place)
        file.write(kept)
    assert reader.read(1) == [b"two", b"three"]


def test_a_step_is_committed_when_all_have_said_yes_and_all_read_that(opened: list[JournalFile]) -> None:
    for ranks in (1, 2, 3, 4):
        files = opened[:ranks]
        each = records(files, ranks, call=f"run {ranks}")
        with ThreadPoolExecutor(ranks) as pool:
            for step in range(20):
                found = list(pool.map(lambda record, step=step: record.decide(f"step {step}"), each))
                assert [one.outcome for one in found] == [COMMIT] * ranks
                assert len({one.rank for one in found}) == 1


@pytest.mark.parametrize("seed", range(20))
def test_all_read_the_same_whichever_of_yes_and_no_came_first(opened: list[JournalFile], seed: int) -> None:
    """Ranks that say yes, and then give up, at random: expected is what the order of their words says."""
    chance = random.Random(seed)
    each = records(opened, 3)
    said: set[int] = set()
    expected = ""
    for _ in range(12):
        rank = chance.randrange(3)
        if rank not in said and chance.random() < 0.6:
            said.add(rank)
            each[rank]._append(_yes(rank))
            expected = expected or ("commit" if len(said) == 3 else "")
        elif chance.random() < 0.3:
            found = each[rank].abort("step 0", PeerLostError(f"rank {rank} gave up", peers=[1], phase="read"))
            expected = expected or f"abort {rank}"
            assert _text(found) == expected
    expected = expected or "abort 0"
    late = JournalRecord(opened[3], "run 1", 0, 3, LONG_S)
    assert _text(late.abort("step 0", RuntimeError("late"))) == expected
    assert {_text(record.abort("step 0", RuntimeError("later"))) for record in each} == {expected}


def _yes(rank: int) -> Any:

    return _Entry("run 1", "step 0", rank)


def _text(decision: Any) -> str:
    return "commit" if decision.outcome == COMMIT else f"abort {decision.rank}"


def test_who_waits_in_vain_gives_up_and_names_those_who_did_not_come(opened: list[JournalFile]) -> None:
    first, _, third = records(opened, 3, SHORT_S)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda record: record.decide("step 4"), (first, third)))
    assert found[0] == found[1]
    assert found[0].aborted
    assert found[0].peers == (1,)
    assert found[0].text == "rank 1 did not end step 4 within 0.2 s"
    assert first.missing("step 4") == (1,)


def test_what_a_rank_met_is_told_with_all_that_an_error_says(opened: list[JournalFile]) -> None:
    one, other = records(opened, 2)
    one.abort("step 0", PeerLostError("rank 7 is gone", peers=[7], phase="read", usable=True))
    found = other.decide("step 0")
    assert (found.outcome, found.rank, found.error, found.text) == ("abort", 0, "PeerLostError", "rank 7 is gone")
    assert (found.peers, found.phase, found.usable) == ((7,), "read", True)


def test_an_error_that_says_too_much_is_cut(opened: list[JournalFile]) -> None:
    one, other = records(opened, 2)
    one.abort("step 0", TransferError("\u00e9" * 50_000, peers=range(1000), phase="read"))
    found = other.decide("step 0")
    assert found.aborted
    assert found.peers == (0,) or len(found.peers) == 1000
    assert set(found.text) <= {"\u00e9"}


def test_entries_of_an_earlier_rearrangement_are_passed_over(opened: list[JournalFile]) -> None:
    for rank in range(2):
        records(opened, 2, call="run 1")[rank]._append(_yes(rank))
    records(opened, 2, call="run 1")[0].abort("step 1", RuntimeError("gone"))
    one, other = records(opened, 2, SHORT_S, call="run 3")
    assert one.missing("step 0") == (0, 1)
    assert other.decide("step 0").aborted


def test_a_journal_that_was_cleared_begins_anew(opened: list[JournalFile]) -> None:
    for _ in range(3):
        opened[0].append(b"old")
    opened[1].clear()
    opened[2].append(b"new")
    assert opened[3].read(0) == [b"new"]


def test_a_journal_without_memory_says_so(opened: list[JournalFile], monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = records(opened, 2)

    def full(file: int, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journals.os, "write", full)
    with pytest.raises(ControlPlaneError, match="No space left"):
        one.decide("step 0")


# --- meeting ---------------------------------------------------------------------------------------------------------


def meet(store: dist.Store, ranks: int) -> list[tuple[JournalFile, ...] | None]:
    with ThreadPoolExecutor(ranks) as pool:
        planes = [ControlPlane(store, rank, ranks) for rank in range(ranks)]
        return list(pool.map(lambda plane: meet_at_journal(plane, LONG_S), planes))


def test_all_ranks_of_one_host_append_to_the_same_files() -> None:
    before = len(os.listdir("/proc/self/fd"))
    found = meet(dist.HashStore(), 3)
    for number in range(FILES):
        for rank, files in enumerate(found):
            assert files is not None
            files[number].append(b"%d of %d" % (rank, number))
        assert all(files is not None and len(files[number].read(0)) == 3 for files in found)
    del found, files
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("elsewhere", [0, 2])
def test_where_one_rank_is_elsewhere_nobody_has_a_journal(monkeypatch: pytest.MonkeyPatch, elsewhere: int) -> None:
    hosts = itertools.count()
    monkeypatch.setattr(journals, "host_name", lambda: "moon" if next(hosts) == elsewhere else "earth")
    assert meet(dist.HashStore(), 3) == [None] * 3


@pytest.mark.parametrize("failing", range(3))
def test_where_one_rank_cannot_open_the_files_nobody_has_a_journal(
    monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    opened, real = itertools.count(), os.open

    def refuse(path: str, *more: int) -> int:
        if "/fd/" in path and next(opened) == failing:
            raise PermissionError(path)
        return real(path, *more)

    monkeypatch.setattr(journals.os, "open", refuse)
    assert meet(dist.HashStore(), 3) == [None] * 3
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_file_than_was_offered_is_refused() -> None:
    file = os.memfd_create("journal")
    with pytest.raises(OSError, match="another file"):
        JournalFile(f"/proc/self/fd/{file}", (1, 2))
    os.close(file)


# --- processes that end ----------------------------------------------------------------------------------------------


def decides(environment: RankEnvironment, end: str) -> list[str]:
    """Rank 0, whose files these are, ends at some step: before, or after it has said yes to it."""
    control = ControlPlane(dist.PrefixStore("journal", environment.store), environment.rank, environment.world_size)
    files = meet_at_journal(control, LONG_S)
    assert files is not None
    record = JournalRecord(files[0], "run 1", environment.rank, environment.world_size, 1.0)
    outcomes = []
    for step in range(12):
        if step == 11 and environment.rank == 0:
            if end == "after":
                record._append(_Entry("run 1", f"step {step}", 0))
            os.kill(os.getpid(), signal.SIGKILL)
        outcomes.append(_text(record.decide(f"step {step}")).split()[0])
    return outcomes


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("end", "last"), [("before", "abort"), ("after", "commit")])
def test_survivors_of_a_kill_read_the_same_also_where_the_owner_of_the_files_is_dead(
    ranks: int, end: str, last: str
) -> None:
    _, *survivors = collect_local_ranks(decides, ranks, (end,), timeout_s=60.0, grace_s=60.0)
    for outcome in survivors:
        assert outcome.result == ["commit"] * 11 + [last], outcome
