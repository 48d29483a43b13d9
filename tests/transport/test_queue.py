"""The comparison before a transfer: it agrees exactly if both sides of every pair queued the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from eplb_core.contract.payload import Payload, Payloads
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import (
    CommunicatorClosedError,
    InvalidTransferError,
    TransferError,
    TransferMismatchError,
    TransferOverflowError,
    TransferTimeoutError,
)
from eplb_core.transport.match import check_match
from eplb_core.transport.queue import TransferQueue
from tests.support.examples import examples

RANKS = 3
LONG_S, SHORT_S = 20.0, 0.2
DTYPES = (torch.uint8, torch.bfloat16, torch.float16)

Entry = tuple[int, int, int, torch.dtype]  # source, destination, elements, dtype

entries = st.tuples(
    st.sampled_from(list(itertools.permutations(range(RANKS), 2))), st.integers(0, 4), st.sampled_from(DTYPES)
).map(lambda drawn: (*drawn[0], drawn[1], drawn[2]))
SCOPES = itertools.count()
STORE = dist.HashStore()


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(RANKS) as pool:
        yield pool


def compare(
    threads: ThreadPoolExecutor,
    sent: list[Entry],
    expected: list[Entry],
    *,
    problems: dict[int, TransferError] | None = None,
    present: range = range(RANKS),
    timeout_s: float = LONG_S,
) -> list[Exception | list[bytes]]:
    """Let each rank compare its part of `sent` with what the others expect; return what each got or raised."""
    store = dist.PrefixStore(f"{next(SCOPES)}", STORE)

    def one(rank: int) -> Exception | list[bytes]:
        sends = queued((d, n, dtype) for s, d, n, dtype in sent if s == rank)
        recvs = queued((s, n, dtype) for s, d, n, dtype in expected if d == rank)
        try:
            control = ControlPlane(store, rank, RANKS)
            return check_match(control, sends, recvs, timeout_s, (problems or {}).get(rank), f"note {rank}".encode())
        except TransferError as error:
            return error

    return list(threads.map(one, present))


def queued(entries: Iterable[tuple[int, int, torch.dtype]]) -> Payloads:
    """Return peer -> payloads, of a peer, a number of elements and a dtype each."""
    by_peer: dict[int, list[Payload]] = {}
    for peer, elements, dtype in entries:
        by_peer.setdefault(peer, []).append(Payload(torch.empty(elements, dtype=dtype)))
    return by_peer


def by_pair(transfers: list[Entry]) -> dict[tuple[int, int], list[tuple[int, torch.dtype]]]:
    pairs: dict[tuple[int, int], list[tuple[int, torch.dtype]]] = {}
    for source, destination, elements, dtype in transfers:
        pairs.setdefault((source, destination), []).append((elements, dtype))
    return pairs


# --- what matches ----------------------------------------------------------------------------------------------------


@examples(60)
@given(sent=st.lists(entries, max_size=12), data=st.data())
def test_any_order_that_keeps_that_of_each_pair_matches(
    threads: ThreadPoolExecutor, sent: list[Entry], data: st.DataObject
) -> None:
    # A shuffle of the pairs' names, filled in each pair's own order, is such an order.
    names = data.draw(st.permutations([entry[:2] for entry in sent]))
    left = {pair: iter(rows) for pair, rows in by_pair(sent).items()}
    expected: list[Entry] = [(*pair, *next(left[pair])) for pair in names]
    assert compare(threads, sent, expected) == [[b"note 0", b"note 1", b"note 2"]] * RANKS


@examples(60)
@given(sent=st.lists(entries, max_size=6), expected=st.lists(entries, max_size=6))
def test_it_passes_exactly_if_every_pair_has_the_same_on_both_sides(
    threads: ThreadPoolExecutor, sent: list[Entry], expected: list[Entry]
) -> None:
    outcomes = compare(threads, sent, expected)
    if by_pair(sent) == by_pair(expected):
        assert all(isinstance(outcome, list) for outcome in outcomes)
    else:
        assert all(isinstance(outcome, TransferMismatchError) for outcome in outcomes)
        assert len({str(outcome) for outcome in outcomes}) == 1


def test_two_transfers_that_changed_places_do_not_match(threads: ThreadPoolExecutor) -> None:
    one, other = (0, 1, 3, torch.uint8), (0, 1, 4, torch.uint8)
    error = compare(threads, [one, other], [other, one])[0]
    assert isinstance(error, TransferMismatchError)
    assert "rank 0 to rank 1, transfer 0: 3 bytes of torch.uint8 is sent, 4 bytes of torch.uint8" in str(error)


def test_errors_that_cancel_out_in_number_and_size_are_found(threads: ThreadPoolExecutor) -> None:
    error = compare(threads, [(0, 1, 3, torch.uint8)], [(2, 1, 3, torch.uint8)])[2]
    assert isinstance(error, TransferMismatchError)
    assert (error.peers, error.usable) == ((0, 1), True)


# --- problems of one rank --------------------------------------------------------------------------------------------


@examples(30)
@given(failing=st.sets(st.integers(0, RANKS - 1), min_size=1), sent=st.lists(entries, max_size=4))
def test_a_problem_of_some_ranks_is_raised_there_and_told_everywhere(
    threads: ThreadPoolExecutor, failing: set[int], sent: list[Entry]
) -> None:
    problems: dict[int, TransferError] = {
        rank: TransferOverflowError(f"rank {rank} has no room", usable=True) for rank in failing
    }
    for rank, outcome in enumerate(compare(threads, sent, [], problems=problems)):
        if rank in failing:
            assert outcome is problems[rank]
        else:
            assert isinstance(outcome, TransferMismatchError)
            assert f"rank {min(failing)} has no room" in str(outcome)
            assert outcome.peers == tuple(sorted(failing))


def test_a_rank_that_does_not_come_is_named(threads: ThreadPoolExecutor) -> None:
    for outcome in compare(threads, [], [], present=range(2), timeout_s=SHORT_S):
        assert isinstance(outcome, TransferTimeoutError)
        assert (outcome.peers, outcome.phase, outcome.usable) == ((2,), "agree", False)


# --- the queue -------------------------------------------------------------------------------------------------------


def test_taking_empties_the_queue_and_keeps_the_order() -> None:
    queue = TransferQueue(0, 3)
    tensors = [torch.zeros(n) for n in range(4)]
    queue.add_send(tensors[0], 1)
    queue.add_recv(tensors[1], 2)
    queue.add_send(tensors[2], 2)
    queue.add_send(tensors[3], 1)
    sends, recvs = queue.take()
    assert list(sends) == [1, 2]
    assert [[payload.tensor is tensors[at] for at in range(4)] for payload in sends[1]] == [
        [True, False, False, False],
        [False, False, False, True],
    ]
    assert [payload.tensor is tensors[2] for payload in sends[2]] == [True]
    assert {peer: [payload.nbytes for payload in payloads] for peer, payloads in recvs.items()} == {2: [4]}
    assert queue.take() == ({}, {})


def test_payloads_join_what_was_queued_before_in_the_order_of_each_pair() -> None:
    queue = TransferQueue(0, 3)
    tensors = [torch.zeros(n, dtype=torch.int32) for n in range(6)]
    once = {2: [Payload(tensors[2]), Payload(tensors[0])], 1: [Payload(tensors[3])]}
    queue.add_send(tensors[1], 2)
    queue.add_payloads(once, {1: [Payload(tensors[4])]})
    queue.add_send(tensors[5], 2)
    sends, recvs = queue.take()
    assert list(sends) == [1, 2]
    assert {peer: [payload.nbytes // 4 for payload in payloads] for peer, payloads in sends.items()} == {
        1: [3],
        2: [1, 2, 0, 5],
    }
    assert [payload.tensor is tensors[4] for payload in recvs[1]] == [True]
    assert queue.take() == ({}, {})
    assert [len(each) for each in once.values()] == [2, 1]  # they belong to the caller


def test_a_payload_tells_where_a_tensor_lies_and_what_kind_it_is() -> None:
    tensor = torch.zeros(10, 3, dtype=torch.bfloat16)
    payload = Payload(tensor[2:4])
    assert payload.place == (tensor.data_ptr() + 12, 12)
    kinds = {Payload(torch.zeros(n, dtype=dtype)).kind for n in (1, 2, 11) for dtype in (torch.int8, torch.uint8)}
    assert len(kinds) == 6
    assert Payload(torch.zeros(3, 2)).kind == Payload(torch.ones(6)).kind


@pytest.mark.parametrize("peer", [0, 3, -1, True, 1.0, "1", None], ids=repr)
def test_what_is_not_another_rank_is_refused_by_name(peer: Any) -> None:
    queue = TransferQueue(0, 3)
    with pytest.raises(InvalidTransferError, match=rf"cannot send to rank {peer!r}"):
        queue.add_send(torch.zeros(1), peer)
    assert not any(queue.take())


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.zeros(4, 4)[:, 1:], "not contiguous"),
        (torch.zeros(4, 4).to_sparse(), "not contiguous"),
        (torch.zeros(4, device="meta"), "moves tensors on cpu"),
        (torch.zeros(4, dtype=torch.complex64).conj(), "resolve_conj"),
        (torch._neg_view(torch.zeros(4)), "resolve_neg"),
        ([1, 2], "not a torch.Tensor"),
    ],
    ids=["sliced", "sparse", "elsewhere", "conjugated", "negated", "a list"],
)
def test_a_tensor_that_cannot_be_moved_as_it_lies_is_refused_with_the_reason(tensor: Any, why: str) -> None:
    queue = TransferQueue(0, 2, torch.device("cpu"))
    with pytest.raises(InvalidTransferError, match=why):
        queue.add_recv(tensor, 1)
    assert not any(queue.take())


def test_a_closed_queue_takes_no_payloads() -> None:
    queue = TransferQueue(0, 2)
    queue.close("rank 1 is gone")
    with pytest.raises(CommunicatorClosedError, match="rank 1 is gone"):
        queue.add_payloads({1: [Payload(torch.zeros(1))]}, {})


def test_a_closed_queue_is_empty_and_says_why_it_was_closed_first() -> None:
    queue = TransferQueue(0, 2)
    queue.add_send(torch.zeros(1), 1)
    queue.close("rank 1 is gone")
    queue.close("it was closed")
    for call in (queue.take, queue.check_open, lambda: queue.add_send(torch.zeros(1), 1)):
        with pytest.raises(CommunicatorClosedError, match="rank 1 is gone"):
            call()
