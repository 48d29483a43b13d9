"""The parts of this transport by themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from eplb_cuda_ipc import links
from eplb_cuda_ipc.layout import Cut, pieces_of
from eplb_cuda_ipc.links import Link, connect, listen
from eplb_cuda_ipc.mapped import Mapped
from eplb_cuda_ipc.memory import Copies, MemoryMapError
from eplb_cuda_ipc.messages import Bye, Chunk, GaveUp, Message, Region, Show, decode, encode
from eplb_cuda_ipc.options import CudaIpcOptions
from eplb_cuda_ipc.place import Card, unlike
from eplb_cuda_ipc.probe import probe
from eplb_cuda_ipc.shown import Shown
from eplb_cuda_ipc.spec import BACKEND
from standin import ENGINE, HostMemory

from eplb_core import ByteSize
from eplb_core.errors import TransferTimeoutError
from eplb_core.registry.registry import Registry
from eplb_core.transport import Payload


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


# --- the cut ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1], [1024], [1023, 1], [1025], [5] * 300, [7, 4096, 7], [2000, 1, 3, 5000]])
def test_both_sides_cut_alike_and_nothing_is_lost(sizes: list[int]) -> None:
    sent, received = (torch.randint(0, 256, (sum(sizes),), dtype=torch.uint8) for _ in range(2))
    sources, targets = (
        Cut(tensor.data_ptr() + np.cumsum([0, *sizes[:-1]]), numbers(*sizes), 1024) for tensor in (sent, received)
    )
    assert sources.chunks == targets.chunks == -(-sum(-(-size // 256) * 256 for size in sizes) // 1024)
    for number in range(sources.chunks):
        slot = np.zeros(1024, np.uint8)
        for address, within, nbytes in zip(*sources.chunk(number), strict=True):
            offset = address - sent.data_ptr()
            slot[within : within + nbytes] = sent[offset : offset + nbytes]
        for address, within, nbytes in zip(*targets.chunk(number), strict=True):
            offset = address - received.data_ptr()
            received[offset : offset + nbytes] = torch.from_numpy(slot[within : within + nbytes])
    assert torch.equal(sent, received)


def test_nothing_is_cut_into_no_chunks() -> None:
    assert Cut(numbers(), numbers(), 1024).chunks == 0


def test_pairs_differ_by_count_size_and_dtype_and_by_nothing_else() -> None:
    def digest(*tensors: torch.Tensor) -> bytes:
        return pieces_of([Payload(tensor) for tensor in tensors]).digest

    eight = torch.zeros(8)
    assert digest(eight, eight) == digest(torch.ones(2, 4), torch.ones(8))
    assert len({digest(eight), digest(eight, eight), digest(torch.zeros(9)), digest(eight.int())}) == 4
    assert len({digest(eight, eight.int()), digest(eight.int(), eight), digest(eight.int(), eight.int())}) == 3


def test_copies_that_follow_one_another_on_both_sides_are_joined() -> None:
    copies = Copies(numbers(0, 10, 25, 35, 40), numbers(100, 110, 120, 130, 200), numbers(10, 10, 10, 5, 0)).merged()
    assert copies.target.tolist() == [0, 25]
    assert copies.source.tolist() == [100, 120]
    assert copies.nbytes.tolist() == [20, 15]


# --- memory that is shown, and memory that is mapped -----------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    memory = HostMemory()
    yield memory
    memory.close()


def test_a_piece_is_found_only_where_one_allocation_holds_all_of_it(memory: HostMemory) -> None:
    first, second, other = ENGINE.shared(100), ENGINE.shared(100), torch.zeros(100, dtype=torch.uint8)
    shown = Shown(memory)
    show = shown.add([first[10:20], second, first, other])
    assert [region.nbytes for region in show.regions] == [100, 100]
    assert [(card.region, card.offset) for card in show.tensors] == [(0, 10), (1, 0), (0, 0), (-1, 0)]
    begin = first.data_ptr()
    regions, offsets = shown.find(
        numbers(begin, begin + 99, begin - 1, begin + 60, other.data_ptr()), numbers(100, 1, 1, 41, 1)
    )
    assert regions.tolist() == [0, 0, -1, -1, -1]
    assert offsets[:2].tolist() == [0, 99]


def test_memory_that_cannot_be_mapped_is_told_once(memory: HostMemory, caplog: pytest.LogCaptureFixture) -> None:
    shown = Shown(memory)
    for _ in range(2):
        shown.add([torch.zeros(8), ENGINE.shared(8)])
    (record,) = caplog.records
    assert "1 of 2 registered tensors" in record.message
    assert "expandable_segments:False" in record.message


@pytest.mark.parametrize("piece", [(1, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 100, 1), (0, 1, 100), (7, 0, 0)])
def test_a_peer_cannot_name_memory_that_it_has_not_shown(memory: HostMemory, piece: tuple[int, int, int]) -> None:
    mapped = Mapped(memory)
    mapped.add(Show([region_of(memory)], []))
    with pytest.raises(ValueError, match="has not shown"):
        mapped.addresses(*(numbers(each) for each in piece))


def region_of(memory: HostMemory) -> Region:
    allocation = memory.exported(ENGINE.shared(100).data_ptr())
    assert allocation is not None
    return Region(allocation.nbytes, allocation.handle)


def test_one_allocation_that_cannot_be_mapped_does_not_spoil_the_others(memory: HostMemory) -> None:
    mapped = Mapped(memory)
    mapped.add(Show([Region(100, b"\1" * 64), region_of(memory)], []))
    assert len(mapped.addresses(numbers(1), numbers(0), numbers(100))) == 1
    with pytest.raises(MemoryMapError, match="Error"):
        mapped.addresses(numbers(0), numbers(0), numbers(1))
    mapped.let_go()
    mapped.let_go()
    with pytest.raises(MemoryMapError):
        mapped.addresses(numbers(1), numbers(0), numbers(100))


# --- messages and links ----------------------------------------------------------------------------------------------

MESSAGES: list[Message] = [Show([Region(5, b"h" * 64)], []), Chunk(7, 2), GaveUp(3, "PeerLostError", "grün"), Bye()]


def test_messages_arrive_as_sent_however_the_stream_is_cut() -> None:
    stream, arrived = bytearray(), []
    for byte in b"".join(map(encode, MESSAGES)):
        stream.append(byte)
        arrived += decode(stream)
    assert arrived == MESSAGES
    assert not stream


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n\r\n", b"\4\0\0\0abcd", b"\2\0\0\0\x91\xa3", b"\xff" * 8])
def test_what_is_no_message_ends_the_link(junk: bytes) -> None:
    ours, theirs = links.socket.socketpair()
    link = Link(1, ours)
    theirs.sendall(junk)
    assert link.receive() == []
    assert "an invalid message" in link.lost
    link.close()
    theirs.close()


def test_the_last_words_of_a_peer_are_heard_with_its_end() -> None:
    ours, theirs = links.socket.socketpair()
    sender, receiver = Link(0, theirs), Link(1, ours)
    sender.send(Chunk(1, 2))
    sender.close()
    assert receiver.receive() == [Chunk(1, 2)]
    assert receiver.lost == "it has closed the connection"
    receiver.close()


def test_a_peer_that_does_not_read_blocks_nobody() -> None:
    ours, theirs = links.socket.socketpair()
    sender, receiver = Link(0, theirs), Link(1, ours)
    long = [GaveUp(number, "TransferError", "x" * 100_000) for number in range(20)]
    for message in long:
        sender.send(message)
    arrived: list[Message] = []
    while len(arrived) < len(long):
        arrived += receiver.receive()
        sender.flush()
    assert arrived == long
    sender.close()
    receiver.close()


def test_a_stranger_that_connects_is_left_out_and_the_absent_rank_is_named() -> None:
    """The kernel says which process it is: this test's child is no rank of the group."""
    with listen(4) as listener:
        name = listener.getsockname()
        code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({name!r}); s.recv(1)"
        child = subprocess.Popen([sys.executable, "-c", code])
        with pytest.raises(TransferTimeoutError, match="no connection to rank 1") as caught:
            connect(0, listener, [name, b""], [os.getpid(), 1], 0.5)
        assert caught.value.peers == (1,)
    assert child.wait(20) == 0


def test_who_listens_in_the_place_of_a_rank_is_refused() -> None:
    with listen(4) as listener, pytest.raises(TransferTimeoutError, match="the listener there is not rank 0"):
        connect(1, listener, [listener.getsockname(), b""], [os.getpid() + 1, os.getpid()], 5.0)


# --- places ----------------------------------------------------------------------------------------------------------

CARD = {"host": "a", "pid_namespace": 1, "net_namespace": 2, "process": 100, "gpu": "g", "address": b"", "sample": b""}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"host": "other"}, "rank 1 is on another host"),
        ({"pid_namespace": 9}, "rank 1 is in another PID namespace"),
        ({"net_namespace": 9}, "rank 1 is in another network namespace"),
        ({"process": 100}, "rank 1 is in the same process"),
        ({}, ""),
    ],
)
def test_ranks_that_cannot_share_memory_are_told_why(changes: dict[str, object], reason: str) -> None:
    found = unlike([Card(**CARD), Card(**{**CARD, "process": 101, **changes})])
    assert found.startswith(reason) if reason else not found


# --- the outside -----------------------------------------------------------------------------------------------------


def test_most_of_the_window_cannot_be_kept_for_packing() -> None:
    with pytest.raises(ValueError, match="at most half"):
        CudaIpcOptions(window=ByteSize(1 << 20), packed=ByteSize(1 << 20))


def test_auto_prefers_it_to_every_other_backend_for_gpus() -> None:
    others = [entry.spec for entry in Registry().entries() if entry.spec is not None and entry.name != BACKEND.name]
    rivals = [spec.priority for spec in others if "cuda" in spec.capabilities.device_types]
    assert rivals
    assert BACKEND.priority > max(rivals)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_probe_says_that_there_is_no_device() -> None:
    assert not probe("cuda").available
    assert probe("cuda").reason == "torch sees no CUDA device"


def test_every_module_can_be_imported_where_there_is_no_cuda_and_the_spec_without_torch() -> None:
    modules = ["spec", "options", "communicator", "probe", "rescue"]
    code = "import sys; sys.modules['cuda'] = None\n" + "\n".join(
        f"import eplb_cuda_ipc.{name}; print('{name}', {{'torch', 'numpy'}} & set(sys.modules))" for name in modules
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[:2] == ["spec set()", "options set()"]
