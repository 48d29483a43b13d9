"""READs by number: what has a number, when lists are made of them, and that NIXL reads the same bytes."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from eplb_backends.nixl.agent import Agent, NixlError, Numbered
from eplb_backends.nixl.inbox import SCATTER_BYTES
from eplb_backends.nixl.prepared import MOST_PIECES, LandingPieces, PeerRows, Rows, block_of
from tests.support.ranks import Member, Report, Scenario, run_scenarios

CPU = torch.device("cpu")
ROW = 1000


def rows_of(*tensors: torch.Tensor) -> Rows:
    rows = Rows()
    for tensor in tensors:
        block = block_of(tensor)
        assert block is not None
        rows.add(block)
    return rows


# --- what has a number -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_every_row_of_a_tensor_has_a_number_under_which_peers_find_it(dtype: torch.dtype) -> None:
    first, second, padded = (
        torch.zeros(5, 3, 4, dtype=dtype),
        torch.zeros(7, dtype=dtype),
        torch.zeros(6, 9, dtype=dtype),
    )
    rows = rows_of(first, second, padded[::2, :7])
    expected = [*first, second, *(row[:7] for row in padded[::2])]
    published = PeerRows("peer", rows.blocks)
    for number, each in enumerate(expected):
        assert rows.number((each.data_ptr(), each.nbytes)) == number
        assert published.addresses(np.array([number]), np.array([each.nbytes])) == [each.data_ptr()]


def test_parts_of_rows_and_several_of_them_have_no_number() -> None:
    tensor = torch.zeros(4, ROW)
    rows = rows_of(tensor)
    for other in (tensor[0, 1:], tensor[0, :-1], tensor[:2], tensor):
        assert rows.number((other.data_ptr(), other.nbytes)) == -1


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3, 4).T, torch.zeros(1, 4).expand(3, 4), torch.zeros(8)[::2], torch.zeros(0, 4), torch.zeros(4, 0)],
    ids=["columns", "one row for all", "gaps", "no rows", "no bytes"],
)
def test_rows_whose_bytes_do_not_lie_together_are_no_block(tensor: torch.Tensor) -> None:
    assert block_of(tensor) is None


def test_adding_rows_again_changes_nothing() -> None:
    tensor = torch.zeros(4, ROW)
    rows = rows_of(tensor)
    block = block_of(tensor)
    assert block is not None
    assert not rows.add(block)
    assert rows.blocks == [block]


def test_there_are_no_more_numbers_than_that() -> None:
    rows, places = Rows(), LandingPieces()
    assert rows.add((1000, 10, 10, MOST_PIECES - 1))
    assert not rows.add((10**9, 10, 10, 2))
    assert rows.add((10**9, 10, 10, 1))
    assert not rows.add((10**10, 10, 10, 10**12))
    PeerRows("peer", rows.blocks)
    numbers = [places.add(address, 10) for address in range(MOST_PIECES + 2)]
    assert numbers == [*range(MOST_PIECES), -1, -1]
    assert places.add(7, 10) == 7


@pytest.mark.parametrize(
    "blocks",
    [[(1, 1, 1, 0)], [(1, 1, 1, -1)], [(0, 1, 1, 1)], [(1, 1, 1, MOST_PIECES + 1)], [(1, 1, 1, MOST_PIECES)] * 2],
)
def test_a_table_that_cannot_be_is_refused(blocks: list[Any]) -> None:
    with pytest.raises(ValueError, match="a table of"):
        PeerRows("peer", blocks)


@pytest.mark.parametrize(("number", "nbytes"), [(4, 4 * ROW), (2**62, 4 * ROW), (0, 4 * ROW - 1), (3, 1)])
def test_rows_that_were_not_published_are_refused(number: int, nbytes: int) -> None:
    rows = PeerRows("peer", rows_of(torch.zeros(4, ROW)).blocks)
    with pytest.raises(ValueError, match="published"):
        rows.addresses(np.array([1, number]), np.array([4 * ROW, nbytes]))


# --- NIXL itself -----------------------------------------------------------------------------------------------------


class Pair:
    """A source and a reader in one process."""

    def __init__(self) -> None:
        self.source, self.reader = (Agent(name, CPU, progress_thread=False) for name in ("source", "reader"))
        self.places = LandingPieces()
        self.rows = Rows()
        self.weights = [torch.randint(0, 256, (16, ROW), dtype=torch.uint8) for _ in range(2)]
        self.landing = torch.zeros(64 * ROW, dtype=torch.uint8)
        for tensor in self.weights:
            self.register(tensor)
        self.reader.register([(self.landing.data_ptr(), self.landing.nbytes)], [self.landing])
        self.source.add_peer(self.reader.name, self.reader.metadata(), self.reader.device_number)
        self.meet()

    def register(self, tensor: torch.Tensor) -> None:
        self.source.register([(tensor.data_ptr(), tensor.nbytes)], [tensor])
        block = block_of(tensor)
        assert block is not None
        self.rows.add(block)

    def meet(self) -> None:
        """Tell the reader what is registered now."""
        self.reader.add_peer(self.source.name, self.source.metadata(), self.source.device_number)
        self.peer_rows = PeerRows(self.source.name, self.rows.blocks)

    def read(self, pieces: list[tuple[int, int]]) -> bool:
        """Read rows to places, `(number, place in rows)`; return whether that was by number."""
        addresses = np.array([self.landing.data_ptr() + place * ROW for _, place in pieces])
        numbers = [self.places.add(address, ROW) for address in addresses.tolist()]
        rows = [row for row, _ in pieces]
        local = self.places.prepared(self.reader, numbers)
        numbered = None
        if local is not None:
            numbered = Numbered(self.peer_rows.prepared(self.reader), rows, local, numbers)
        remote = self.peer_rows.addresses(np.array(rows), np.full(len(rows), ROW))
        lengths = np.full(len(pieces), ROW)
        self.wait(self.reader.read(self.source.name, remote, addresses, lengths, numbered))
        return numbered is not None

    def wait(self, read: Any) -> None:
        deadline = time.monotonic() + 10
        while not self.reader.finished(read):
            self.source.notifications()
            assert time.monotonic() < deadline

    def row(self, number: int) -> list[int]:
        return self.weights[number // 16][number % 16].tolist()

    def landed(self, place: int) -> list[int]:
        return self.landing[place * ROW : (place + 1) * ROW].tolist()


@pytest.fixture
def pair() -> Iterator[Pair]:
    both = Pair()
    yield both
    both.reader.close()
    both.source.close()


def test_rows_are_read_to_their_places_by_number_and_by_address_alike(pair: Pair) -> None:
    drawn = np.random.default_rng(0)
    ways = []
    for count in (1, 5, 16, 32):
        for _ in range(3):
            rows, places = (drawn.permutation(most)[:count].tolist() for most in (32, 64))
            pieces = list(zip(rows, places, strict=True))
            pair.landing.zero_()
            ways.append(pair.read(pieces))
            assert [pair.landed(place) for _, place in pieces] == [pair.row(row) for row, _ in pieces]
    assert True in ways
    assert False in ways


def test_neighbours_arrive_whole_when_nixl_joins_them(pair: Pair) -> None:
    pieces = [(row, row + 3) for row in range(32)]
    assert pair.read(pieces)
    assert [pair.landed(place) for _, place in pieces] == [pair.row(row) for row, _ in pieces]


def test_rows_that_are_registered_later_are_read_through_a_new_list(pair: Pair) -> None:
    assert pair.read([(0, 0)])
    pair.weights.append(torch.randint(0, 256, (16, ROW), dtype=torch.uint8))
    pair.register(pair.weights[2])
    old = pair.peer_rows
    pair.meet()
    old.drop(pair.reader)
    assert pair.read([(40, 0)])
    assert pair.landed(0) == pair.row(40)


def test_a_list_may_be_dropped_while_a_read_from_it_is_under_way(pair: Pair) -> None:
    rows, places = [*range(4)], [pair.places.add(pair.landing.data_ptr() + at * ROW, ROW) for at in range(4)]
    local = pair.places.prepared(pair.reader, places)
    numbered = Numbered(pair.peer_rows.prepared(pair.reader), rows, local, places)
    nothing = np.zeros(4, np.int64)
    read = pair.reader.read(pair.source.name, nothing, nothing, nothing, numbered)
    pair.peer_rows.drop(pair.reader)
    pair.reader.drop(local)
    pair.wait(read)
    assert [pair.landed(at) for at in range(4)] == [pair.row(at) for at in range(4)]


def test_lists_cost_as_much_as_what_is_read_and_no_more(pair: Pair) -> None:
    made = 0
    prepare = pair.reader.prepare

    def counting(peer: str, blocks: Any) -> Any:
        nonlocal made
        made += len(blocks) if not peer else 0
        return prepare(peer, blocks)

    pair.reader.prepare = counting  # type: ignore[method-assign]
    reads = 64
    for place in range(reads):
        pair.read([(0, place)])
    assert made <= reads


def test_a_closed_agent_prepares_nothing(pair: Pair) -> None:
    pair.reader.close()
    with pytest.raises(NixlError, match="was closed"):
        pair.peer_rows.prepared(pair.reader)


# --- the whole backend -----------------------------------------------------------------------------------------------

RANKS = 2
SLOTS, LARGE = 8, SCATTER_BYTES + 64


def exchanging(member: Member, config: str, times: int) -> dict[str, Any]:
    """Each rank reads random rows of the other one's weights into landing memory; later there are more weights."""
    other = 1 - member.rank
    drawn = np.random.default_rng(1)
    wrong, lists, by_number = 0, [], 0
    read = Agent.read

    def counting(*arguments: Any) -> Any:
        nonlocal by_number
        by_number += arguments[-1] is not None
        return read(*arguments)

    Agent.read = counting  # type: ignore[method-assign]
    with member.communicator(config) as communicator:
        landing = torch.empty(SLOTS, LARGE, dtype=torch.uint8)
        communicator.register([landing], landing=True)
        weights: list[torch.Tensor] = []
        for layer in range(3):
            weights.append(content(member.rank, layer))
            communicator.register([weights[-1]])
            for _ in range(times):
                landing.zero_()
                wanted = drawn.integers(0, [layer + 1, SLOTS], (SLOTS - 2, 2)).tolist()
                places = drawn.permutation(SLOTS)[: len(wanted)].tolist()
                for (at, row), place in zip(wanted, places, strict=True):
                    communicator.add_send(weights[at][row], other)
                    communicator.add_recv(landing[place], other)
                communicator.execute()
                for (at, row), place in zip(wanted, places, strict=True):
                    wrong += not torch.equal(landing[place], content(other, at)[row])
            lists.append(len(communicator._agent._held.prepared))  # type: ignore[attr-defined]
        stats = communicator.last_stats
        assert stats is not None
    Agent.read = read  # type: ignore[method-assign]
    gc.collect()
    return {"wrong": wrong, "lists": lists, "by number": by_number, "descriptors": stats.descriptors}


def content(rank: int, layer: int) -> torch.Tensor:
    drawn = np.random.default_rng([rank, layer])
    return torch.from_numpy(drawn.integers(0, 256, (SLOTS, LARGE), dtype=np.uint8))


TIMES = 10
NUMBERED = ("nixl?window=1MiB", "nixl?window=1MiB&mode=direct")
CONFIGS = (*NUMBERED, "nixl?window=1MiB&mode=packed")


@pytest.fixture(scope="module")
def report() -> Report:
    return run_scenarios(RANKS, [Scenario(config, exchanging, (config, TIMES)) for config in CONFIGS])


@pytest.mark.parametrize("config", CONFIGS)
def test_every_byte_is_right_also_of_weights_that_are_registered_later(report: Report, config: str) -> None:
    assert [found["wrong"] for found in report.returned(config)] == [0] * RANKS


@pytest.mark.parametrize("config", NUMBERED)
def test_registered_weights_are_read_by_number(report: Report, config: str) -> None:
    for found in report.returned(config):
        assert found["by number"] > 2 * TIMES
        assert found["descriptors"] == SLOTS - 2


@pytest.mark.parametrize("config", NUMBERED)
def test_a_new_list_takes_the_place_of_the_old_one(report: Report, config: str) -> None:
    for found in report.returned(config):
        assert found["lists"] == [2, 2, 2]


def test_packed_weights_need_no_list(report: Report) -> None:
    for found in report.returned(CONFIGS[-1]):
        assert (found["by number"], found["lists"]) == (0, [0, 0, 0])
