"""The parts of this transport by themselves."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from eplb_mooncake import links
from eplb_mooncake.chunks import ALONE_BYTES, Bytes, address_of, cut
from eplb_mooncake.engine import Engine
from eplb_mooncake.links import Card, Kind, Link, Message, connect, listen, new_token
from eplb_mooncake.options import MooncakeOptions
from eplb_mooncake.probe import probe
from eplb_mooncake.regions import Regions
from eplb_mooncake.window import Window

from eplb_core.errors import BackendUnavailableError, TransferTimeoutError
from eplb_core.transport import Payload

HOST = "127.0.0.1"


# --- the cut ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [[], [0], [1], [1000], [999, 1], [1001], [5] * 300, [ALONE_BYTES], [7, ALONE_BYTES, 7], [ALONE_BYTES + 1, 0, 3]],
)
def test_both_sides_cut_alike_whatever_the_sizes(sizes: list[int]) -> None:
    sent = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    received = [torch.zeros_like(tensor) for tensor in sent]
    chunks = cut({1: [*map(Payload, sent)]}, 1000).get(1, [])
    places = cut({0: [*map(Payload, received)]}, 1000).get(0, [])
    for chunk, place in zip(chunks, places, strict=True):
        slot = np.zeros(chunk.nbytes, np.uint8)
        chunk.pack(slot)
        place.unpack(slot)
    assert all(torch.equal(a, b) for a, b in zip(sent, received, strict=True))


def test_small_tensors_share_chunks_and_large_ones_do_not() -> None:
    sizes = [10, 10, ALONE_BYTES, 10, 10]
    chunks = cut({1: [Payload(torch.zeros(size, dtype=torch.uint8)) for size in sizes]}, 1 << 20)[1]
    assert [[len(piece) for piece in chunk.pieces] for chunk in chunks] == [[10, 10], [ALONE_BYTES], [10, 10]]


# --- the window and registered memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [8192, 10_001, 1 << 20, 64 << 20, 300 << 20])
def test_both_halves_together_keep_within_the_window_and_slots_do_not_overlap(nbytes: int) -> None:
    window = Window(nbytes)
    numbers = [*window.to_send, *window.to_receive]
    starts = sorted(window.address(number) for number in numbers)
    assert window.nbytes <= nbytes
    assert len(window.to_send) == len(window.to_receive) >= 4
    assert all(len(window.slot(number)) == window.slot_bytes for number in numbers)
    assert all(after - before >= window.slot_bytes for before, after in itertools.pairwise(starts))
    assert starts[-1] + window.slot_bytes <= window.address(0) + window.nbytes


def test_only_memory_that_lies_wholly_inside_one_region_is_covered() -> None:
    regions = Regions()
    regions.add(100, 50)
    regions.add(150, 50)
    regions.add(10, 5)
    assert [regions.cover(*span) for span in [(100, 50), (110, 5), (10, 5)]] == [True] * 3
    assert [regions.cover(*span) for span in [(99, 2), (149, 2), (200, 1), (0, 1), (14, 2)]] == [False] * 5
    assert not regions.cover(None, 1)
    assert [regions.touch(*span) for span in [(99, 2), (0, 11), (0, 1000), (199, 9)]] == [True] * 4
    assert [regions.touch(*span) for span in [(0, 10), (15, 85), (200, 5)]] == [False] * 3


# --- options ---------------------------------------------------------------------------------------------------------


def test_a_device_name_without_rdma_is_refused() -> None:
    with pytest.raises(ValueError, match="protocol=rdma"):
        MooncakeOptions(device_name="mlx5_0")


@pytest.mark.skipif(os.path.isdir("/sys/class/infiniband"), reason="this machine may have an RDMA device")
def test_rdma_without_a_device_is_refused_instead_of_taking_tcp() -> None:
    with pytest.raises(BackendUnavailableError, match="no RDMA device"):
        Engine(HOST, MooncakeOptions(protocol="rdma"))


def test_an_interface_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(BackendUnavailableError, match=r"there are .*lo"):
        links._address_of("nosuch0")
    assert links._address_of("lo") == HOST


# --- messages --------------------------------------------------------------------------------------------------------


def pair() -> tuple[Link, Link]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    theirs.setblocking(False)
    return Link(1, ours, "a:1"), Link(0, theirs, "b:1")


def test_messages_arrive_as_sent_however_the_stream_is_cut() -> None:
    sender, receiver = pair()
    sender.send(Kind.READY, 7, 2**63 + 5)
    sender.send(Kind.FAILED, 3, text="grün")
    stream = receiver.connection.recv(4096)
    arrived = []
    for at in range(len(stream)):
        sender.connection.send(stream[at : at + 1])
        arrived += list(receiver.messages())
    assert arrived == [Message(Kind.READY, 7, 2**63 + 5, ""), Message(Kind.FAILED, 3, 0, "grün")]


def test_the_last_words_of_a_peer_are_heard_before_its_end() -> None:
    sender, receiver = pair()
    sender.send(Kind.TAKEN, 7)
    sender.connection.close()
    heard = receiver.messages()
    assert next(heard).kind is Kind.TAKEN
    with pytest.raises(ConnectionResetError):
        next(heard)


def test_what_is_no_message_is_refused() -> None:
    sender, receiver = pair()
    sender.connection.send(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ConnectionError, match="an invalid message"):
        list(receiver.messages())


def test_strangers_that_connect_first_are_left_out() -> None:
    listeners = [listen(HOST, 5) for _ in range(2)]
    ports = [listener.getsockname()[1] for listener in listeners]
    cards = [Card(HOST, port, f"engine {rank}", 0, new_token().hex()) for rank, port in enumerate(ports)]
    found: dict[int, dict[int, Link]] = {}
    address = (cards[0].host, cards[0].port)
    with socket.create_connection(address) as guesser, socket.create_connection(address):
        guesser.sendall(b"\0" * 20)
        ranks = [
            threading.Thread(target=lambda rank=rank: found.update({rank: connect(rank, listeners[rank], cards, 20.0)}))
            for rank in range(2)
        ]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join(30.0)
    assert found[0][1].engine == "engine 1"
    assert found[1][0].engine == "engine 0"
    found[0][1].send(Kind.TAKEN, 4)
    assert [message.number for message in wait_for(found[1][0])] == [4]
    for each in [*listeners, found[0][1].connection, found[1][0].connection]:
        each.close()


def wait_for(link: Link) -> list[Message]:
    link.connection.settimeout(5.0)
    link._arrived += link.connection.recv(1)
    link.connection.setblocking(False)
    return list(link.messages())


# --- Mooncake itself -------------------------------------------------------------------------------------------------


@pytest.fixture
def engine() -> Iterator[tuple[Engine, Bytes]]:
    """An engine, and memory that it has registered."""
    engine, landing = Engine(HOST, MooncakeOptions()), np.zeros(64, np.uint8)
    assert engine.register(address_of(landing), landing.nbytes, landing)
    yield engine, landing
    engine.close()


def test_the_probe_says_what_it_tried() -> None:
    assert probe("cpu").available
    assert "4096 bytes were read" in probe("cpu").reason


def test_memory_that_was_not_registered_cannot_be_read(engine: tuple[Engine, Bytes]) -> None:
    reader, landing = engine
    secret = np.full(64, 7, np.uint8)
    with pytest.raises(BackendUnavailableError, match=r"rank 3 .*cannot be read from"):
        reader.open({3: (reader.name, address_of(secret), b"\7" * 16)}, landing, 10.0)
    assert not landing.any()


def test_a_path_that_brings_other_bytes_is_refused(engine: tuple[Engine, Bytes]) -> None:
    reader, landing = engine
    source = np.full(64, 7, np.uint8)
    reader.register(address_of(source), source.nbytes, source)
    with pytest.raises(BackendUnavailableError, match=r"rank 3 .*wrong bytes"):
        reader.open({3: (reader.name, address_of(source), b"\x08" * 16)}, landing, 10.0)


def test_a_peer_that_does_not_answer_is_named_in_time_and_leaves_no_thread(engine: tuple[Engine, Bytes]) -> None:
    reader, landing = engine
    with listen(HOST, 1) as silent:
        began = time.monotonic()
        with pytest.raises(TransferTimeoutError) as caught:
            reader.open({3: (f"{HOST}:{silent.getsockname()[1]}", 0, b"\0" * 16)}, landing, 0.5)
        assert time.monotonic() - began < 2.5
    assert caught.value.peers == (3,)
    assert not [thread for thread in threading.enumerate() if thread.name == "eplb-mooncake opens"]


def test_nothing_in_the_environment_is_changed() -> None:
    before = dict(os.environ)
    Engine(HOST, MooncakeOptions()).close()
    assert dict(os.environ) == before


LEFT_OPEN = """
import numpy as np
from eplb_mooncake.chunks import address_of
from eplb_mooncake.engine import Engine
from eplb_mooncake.options import MooncakeOptions

engine, memory = Engine("127.0.0.1", MooncakeOptions()), np.zeros(64, np.uint8)
engine.register(address_of(memory), memory.nbytes, memory)
engine.open({0: (engine.name, address_of(memory), bytes(16))}, memory, 10.0)
"""


def test_a_process_that_forgets_to_close_ends_with_0() -> None:
    assert subprocess.run([sys.executable, "-c", LEFT_OPEN], timeout=60, check=False).returncode == 0


def test_importing_the_spec_imports_neither_torch_nor_mooncake() -> None:
    code = "import sys, eplb_mooncake.spec; print({'torch', 'mooncake', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
