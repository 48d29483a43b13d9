"""The parts of the nixl backend, each by itself: no processes, and memory in place of a network."""

from __future__ import annotations

import ctypes
import itertools
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eplb_backends.nixl import agent as agent_module
from eplb_backends.nixl import engine as engine_module
from eplb_backends.nixl import layout
from eplb_backends.nixl.agent import NixlError, Read, Registration, mapped
from eplb_backends.nixl.engine import Engine
from eplb_backends.nixl.inbox import SCATTER_BYTES, Inbox, Incoming
from eplb_backends.nixl.links import Links, Place, link_between
from eplb_backends.nixl.memory import Regions, SlotPool, left_for_staging
from eplb_backends.nixl.messages import Kind, Message, Writer, parse
from eplb_backends.nixl.outbox import Outbox
from eplb_backends.nixl.prepared import LandingPieces, PeerRows, Rows, block_of
from eplb_backends.nixl.round import Round, Shared
from eplb_backends.nixl.selftest import PAGE_BYTES
from eplb_core.contract.payload import Payload, Payloads
from eplb_core.errors import PeerLostError, TransferError, TransferMismatchError, TransferTimeoutError
from eplb_core.transport.checksums import checksums
from tests.support.examples import examples

CPU = torch.device("cpu")
TOKEN = b"12345678"
SMALLEST_WINDOW = 64 << 10
HERE, SOURCE, DESTINATION = 0, 1, 2


class MemoryAgent:
    """Reads by copying inside this process, once it is asked whether it has."""

    def __init__(self) -> None:
        self.posted: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def register(self, regions: object, owners: object) -> None:
        pass

    def read(
        self, peer: str, remote: np.ndarray, local: np.ndarray, lengths: np.ndarray, numbered: object = None
    ) -> int:
        self.posted.append((remote, local, lengths))
        return len(self.posted) - 1

    def finished(self, read: int) -> bool:
        for remote, local, nbytes in zip(*(array.tolist() for array in self.posted[read]), strict=True):
            ctypes.memmove(local, remote, nbytes)
        return True


class MemoryPeers:
    """What a rank sends is kept; what it receives is what the test put there."""

    def __init__(self, known: set[int] | None = None) -> None:
        self.agent = MemoryAgent()
        self.rank = HERE
        self.token = TOKEN
        self.version = 1
        self.known = known or {SOURCE, DESTINATION}
        self.lost: set[int] = set()
        self.proven: set[int] = set()
        self.pages: dict[int, int] = {}
        self.published = Rows()
        self.places = LandingPieces()
        self.sent: list[tuple[int, Message]] = []
        self.arriving: list[tuple[int, Message]] = []
        self.answer: Callable[[int, Message], bytes | None] = lambda rank, message: None

    def name(self, rank: int) -> str:
        return f"agent {rank}"

    def page_to_read(self, rank: int) -> int | None:
        return self.pages.get(rank) if rank not in self.proven else None

    def know(self, rank: int, version: int) -> str:
        return self.name(rank)

    def rows(self, rank: int) -> PeerRows:
        return PeerRows(self.name(rank), self.published.blocks)

    def starts(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        return np.empty(0, np.int64), np.empty(0, np.int64)

    def prepared(self, rank: int, rows: list[int], places: list[int]) -> None:
        return None

    def send(self, rank: int, raw: bytes) -> None:
        message = parse(TOKEN, raw)
        assert message is not None
        self.sent.append((rank, message))
        answer = self.answer(rank, message)
        if answer is not None:
            self.arrive(rank, answer)

    def arrive(self, rank: int, raw: bytes) -> None:
        message = parse(TOKEN, raw)
        assert message is not None
        self.arriving.append((rank, message))

    def receive(self) -> list[tuple[int, Message]]:
        arrived, self.arriving = self.arriving, []
        return arrived

    def told(self, kind: Kind) -> list[tuple[int, Message]]:
        return [(rank, message) for rank, message in self.sent if message.kind == kind]


def pool(window: int = SMALLEST_WINDOW) -> SlotPool:
    return SlotPool(MemoryAgent(), window, CPU)  # type: ignore[arg-type]


def tensors(*sizes: int, seed: int = 1) -> list[torch.Tensor]:
    drawn = np.random.default_rng(seed)
    return [torch.from_numpy(drawn.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


def payloads(peer: int, tensors: list[torch.Tensor]) -> Payloads:
    return {peer: [*map(Payload, tensors)]} if tensors else {}


def round_of(
    peers: MemoryPeers, sends: list[torch.Tensor], recvs: list[torch.Tensor], registered: Regions, landing: Regions
) -> Round:
    shared = Shared(peers, pool(), pool(), CPU, lambda *measured: None)  # type: ignore[arg-type]
    outgoing = layout.outgoing(payloads(DESTINATION, sends), registered, Rows(), "auto")
    incoming = layout.incoming(payloads(SOURCE, recvs), landing, LandingPieces())
    return Round(shared, 0, outgoing, incoming, None, None, lambda peer: "something else")


# --- the window ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [64 << 10, 1 << 20, (1 << 20) + 12345, 256 << 20])
def test_two_windows_and_what_they_leave_are_all_that_is_allowed(window: int) -> None:
    both = 2 * len(pool(window).buffer)
    assert 0 < both + PAGE_BYTES + left_for_staging(window) <= window


def test_slots_are_handed_out_once_and_again_after_they_came_back() -> None:
    slots = pool()
    taken = list(iter(slots.acquire, None))
    starts = sorted(slot.memory.data_ptr() for slot in taken)
    assert len(taken) >= 4
    assert all(second - first >= slots.slot_bytes for first, second in itertools.pairwise(starts))
    assert all(slot.memory.nbytes == slots.slot_bytes for slot in taken)
    slots.release(taken[2])
    assert slots.acquire() is taken[2]
    assert slots.acquire() is None


class Unfinished:
    """An event that is not done until the test says so."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done


def test_a_slot_that_is_still_copied_from_is_not_handed_out() -> None:
    slots = pool()
    taken = list(iter(slots.acquire, None))
    event = Unfinished()
    taken[0].copied = event  # type: ignore[assignment]
    slots.release(taken[0])
    assert slots.acquire() is None
    event.done = True
    assert slots.acquire() is taken[0]


# --- from an outbox to an inbox --------------------------------------------------------------------------------------


@examples(60)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 7, 1000, 1024, 5000, 70_000]), min_size=1, max_size=12),
    direct=st.booleans(),
    in_place=st.booleans(),
    numbered=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_every_byte_arrives_whatever_the_order_of_the_chunks(
    sizes: list[int], direct: bool, in_place: bool, numbered: bool, order: Any
) -> None:
    sent = tensors(*sizes)
    received = [torch.full_like(tensor, 0xEE) for tensor in sent]
    registered, landing = Regions(), Regions()
    for regions, wanted, some in ((registered, direct, sent), (landing, in_place, received)):
        for tensor in some if wanted else ():
            if tensor.nbytes:
                regions.add(tensor.data_ptr(), tensor.nbytes)
    peers = MemoryPeers()
    rows = peers.published
    for tensor in sent if numbered and direct else ():
        block = block_of(tensor)
        if block is not None:
            rows.add(block)
    send_pool = pool()
    plan = layout.outgoing(payloads(HERE, sent), registered, rows, "auto")
    arriving = layout.incoming(payloads(SOURCE, received), landing, peers.places)
    writer = Writer(TOKEN, 0)
    said: list[Message] = []
    outbox = Outbox(plan, send_pool, writer, lambda _, raw: said.append(parse(TOKEN, raw)), CPU, None)  # type: ignore[arg-type]
    inbox = Inbox(arriving, pool(), peers, writer, peers.send, CPU, None, lambda *measured: None)  # type: ignore[arg-type]
    outbox.announce(1)
    for message in said:
        inbox.announce(SOURCE, message.ready()[3])
    chunks = 0
    for _ in range(10_000):
        said.clear()
        outbox.advance(True)
        order.shuffle(said)
        for message in said:
            inbox.chunk(SOURCE, *message.chunk())
        chunks += len(said)
        inbox.advance()
        for _, message in peers.told(Kind.TAKEN):
            outbox.taken(HERE, message.taken())
        peers.sent = [entry for entry in peers.sent if entry[1].kind != Kind.TAKEN]
        if not inbox.unread:
            break
    assert [tensor.tolist() for tensor in received] == [tensor.tolist() for tensor in sent]
    assert [kind.kind for _, kind in peers.sent] == [Kind.DONE]
    assert outbox.fully_packed
    assert sum(1 for _ in iter(send_pool.acquire, None)) == len(send_pool.buffer) // send_pool.slot_bytes


PACKED_BYTES = 5000


@pytest.fixture
def inbox() -> Inbox:
    """It expects 5,000 bytes in packed chunks, and its slots are 1 or 2 KiB large."""
    incoming = Incoming(2, b"", [*map(Payload, tensors(PACKED_BYTES - 100, 100))], [False, False])
    peers = MemoryPeers()
    return Inbox({SOURCE: incoming}, pool(), peers, Writer(TOKEN, 0), peers.send, CPU, None, lambda *measured: None)  # type: ignore[arg-type]


PACKED = np.zeros(2, np.int64)


@pytest.mark.parametrize(
    ("sequence", "address", "more"),
    [
        (0, 0, 1),
        (0, 0, -1),
        (0, 0, -(10**6)),
        (1000, 0, 0),
        (2**32 - 1, 0, 0),
        (0, 2**63, 0),
        (0, 2**64 - 1, 0),
    ],
)
def test_a_chunk_that_is_not_what_was_announced_is_refused(
    inbox: Inbox, sequence: int, address: int, more: int
) -> None:
    inbox.announce(SOURCE, PACKED)
    nbytes = inbox._pool.slot_bytes + more
    with pytest.raises(ValueError, match="not what was announced"):
        inbox.chunk(SOURCE, sequence, address, max(nbytes, 0))
    assert inbox.advance() == set()


def test_a_chunk_before_the_messages_are_announced_is_refused(inbox: Inbox) -> None:
    with pytest.raises(ValueError, match="before"):
        inbox.chunk(SOURCE, 0, 0, 1024)


def test_a_chunk_that_comes_twice_is_refused(inbox: Inbox) -> None:
    inbox.announce(SOURCE, PACKED)
    inbox.chunk(SOURCE, 1, 0, inbox._pool.slot_bytes)
    with pytest.raises(ValueError, match="twice"):
        inbox.chunk(SOURCE, 1, 0, inbox._pool.slot_bytes)


@pytest.mark.parametrize("parts", [(3,), (1, 2), (2, 0), (2, 1)])
def test_more_addresses_than_messages_are_refused(inbox: Inbox, parts: tuple[int, ...]) -> None:
    def announce() -> None:
        for count in parts:
            inbox.announce(SOURCE, np.zeros(count, np.int64))

    with pytest.raises(ValueError, match="addresses were announced"):
        announce()


def test_addresses_may_come_in_parts(inbox: Inbox) -> None:
    assert [inbox.announce(SOURCE, PACKED[:1]), inbox.announce(SOURCE, PACKED[:1])] == [False, True]


# --- one round -------------------------------------------------------------------------------------------------------


def test_what_breaks_the_protocol_is_an_error_that_names_the_rank() -> None:
    peers = MemoryPeers()
    this = round_of(peers, [], tensors(10), Regions(), Regions())
    message = parse(TOKEN, Writer(TOKEN, 0).chunk(0, 1, 10))
    assert message is not None
    with pytest.raises(TransferError, match="rank 1 broke the protocol") as caught:
        this.handle(SOURCE, message)
    assert caught.value.peers == (SOURCE,)
    assert not caught.value.usable


def test_another_layout_than_expected_is_refused_on_both_sides() -> None:
    peers = MemoryPeers()
    this = round_of(peers, [], tensors(10), Regions(), Regions())
    [raw] = Writer(TOKEN, 0).ready(1, 2, b"d" * 16, np.zeros(2, np.int64))
    message = parse(TOKEN, raw)
    assert message is not None
    with pytest.raises(TransferMismatchError) as caught:
        this.handle(SOURCE, message)
    assert caught.value.peers == (SOURCE,)
    assert [(rank, m.kind) for rank, m in peers.sent] == [(SOURCE, Kind.DIFFER)]
    assert peers.agent.posted == []


def test_answers_of_ranks_that_are_sent_nothing_are_ignored() -> None:
    this = round_of(MemoryPeers(), [], tensors(10), Regions(), Regions())
    for raw in (Writer(TOKEN, 0).taken(0), Writer(TOKEN, 0).done()):
        message = parse(TOKEN, raw)
        assert message is not None
        this.handle(SOURCE, message)
    assert not this.ended


# --- giving up -------------------------------------------------------------------------------------------------------

SOON_S = 0.15


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, MemoryPeers, Round]:
    """An engine with one round, which expects bytes from rank 1 and sends some to rank 2; all waits are short."""
    monkeypatch.setattr(engine_module, "_ANSWER_S", SOON_S)
    monkeypatch.setattr(engine_module, "_LOOK_S", 0.01)
    peers = MemoryPeers()
    engine = Engine(peers, SOON_S)  # type: ignore[arg-type]
    this = round_of(peers, tensors(10), tensors(20), Regions(), Regions())
    engine.start(this)
    return engine, peers, this


def pong(idle_s: float) -> Callable[[int, Message], bytes | None]:
    return lambda rank, message: Writer(TOKEN, 0).pong(idle_s) if message.kind == Kind.PING else None


def test_all_that_do_not_answer_are_named(waiting: tuple[Engine, MemoryPeers, Round]) -> None:
    engine, peers, this = waiting
    with pytest.raises(TransferTimeoutError, match="ranks 1, 2 did nothing") as caught:
        engine.wait(this)
    assert caught.value.peers == (SOURCE, DESTINATION)
    assert caught.value.phase == "ready"
    assert "stopped" in str(caught.value)
    assert peers.lost == {SOURCE, DESTINATION}


def test_one_that_answers_is_not_named_beside_one_that_does_not(waiting: tuple[Engine, MemoryPeers, Round]) -> None:
    engine, peers, this = waiting
    alive = pong(0.0)
    peers.answer = lambda rank, message: alive(rank, message) if rank == SOURCE else None
    with pytest.raises(TransferTimeoutError) as caught:
        engine.wait(this)
    assert caught.value.peers == (DESTINATION,)
    assert caught.value.phase == "done"


def test_peers_that_stand_still_as_long_as_this_rank_are_named_though_they_answer(
    waiting: tuple[Engine, MemoryPeers, Round],
) -> None:
    engine, peers, this = waiting
    peers.answer = pong(10.0)
    with pytest.raises(TransferTimeoutError, match="alive") as caught:
        engine.wait(this)
    assert caught.value.peers == (SOURCE, DESTINATION)


def test_a_peer_that_waits_for_another_is_not_blamed_before_it_has_said_who_is(
    waiting: tuple[Engine, MemoryPeers, Round],
) -> None:
    engine, peers, this = waiting
    asked = itertools.count(1)

    def answer(rank: int, message: Message) -> bytes | None:
        if message.kind != Kind.PING:
            return None
        return Writer(TOKEN, 0).failed([7], "7 did nothing") if next(asked) > 10 else Writer(TOKEN, 0).pong(0.0)

    peers.answer = answer
    began = time.monotonic()
    with pytest.raises(PeerLostError, match="rank 7 failed") as caught:
        engine.wait(this)
    assert caught.value.peers == (7,)
    assert time.monotonic() - began > 4 * SOON_S


def test_a_peer_is_late_even_while_another_keeps_this_rank_busy(waiting: tuple[Engine, MemoryPeers, Round]) -> None:
    engine, peers, this = waiting
    receive = peers.receive

    def busy() -> list[tuple[int, Message]]:
        peers.arrive(DESTINATION, Writer(TOKEN, 0).taken(0))
        return receive()

    peers.receive = busy  # type: ignore[method-assign]
    with pytest.raises(TransferTimeoutError) as caught:
        engine.wait(this)
    assert caught.value.peers == (SOURCE,)


@pytest.mark.parametrize("epoch", [0, 3, 2**32 - 1])
def test_a_peer_that_gave_up_is_believed_in_whatever_round_it_did(
    waiting: tuple[Engine, MemoryPeers, Round], epoch: int
) -> None:
    engine, peers, this = waiting
    peers.arrive(SOURCE, Writer(TOKEN, epoch).failed([5], "5 is gone"))
    with pytest.raises(PeerLostError) as caught:
        engine.wait(this)
    assert caught.value.peers == (5,)


def test_what_another_rank_says_before_it_takes_part_counts_when_it_does(
    waiting: tuple[Engine, MemoryPeers, Round],
) -> None:
    engine, peers, _ = waiting
    peers.arrive(4, Writer(TOKEN, 0).failed([5], "5 is gone"))
    peers.arrive(DESTINATION, Writer(TOKEN, 0).done())
    assert engine._advance()
    shared = Shared(peers, pool(), pool(), CPU, lambda *measured: None)  # type: ignore[arg-type]
    incoming = layout.incoming(payloads(4, [torch.zeros(1)]), Regions(), LandingPieces())
    later = Round(shared, 1, {}, incoming, None, None, lambda peer: "something")
    with pytest.raises(PeerLostError) as caught:
        engine.start(later)
    assert caught.value.peers == (5,)


def test_a_rank_that_gives_up_on_this_one_is_named_itself(waiting: tuple[Engine, MemoryPeers, Round]) -> None:
    engine, peers, this = waiting
    peers.arrive(SOURCE, Writer(TOKEN, 0).failed([HERE], "you did nothing"))
    with pytest.raises(TransferError, match="rank 1 gave up on this rank") as caught:
        engine.wait(this)
    assert caught.value.peers == (SOURCE,)


def test_who_gives_up_tells_all_that_it_knows_and_whom_it_blames(waiting: tuple[Engine, MemoryPeers, Round]) -> None:
    engine, peers, this = waiting
    peers.known = {SOURCE, DESTINATION, 3}
    peers.arrive(SOURCE, Writer(TOKEN, 0).failed([5], "5 is gone"))
    with pytest.raises(PeerLostError):
        engine.wait(this)
    assert {(rank, *message.failure()[0]) for rank, message in peers.told(Kind.FAILED)} == {
        (SOURCE, 5),
        (DESTINATION, 5),
        (3, 5),
    }


def test_who_is_interrupted_tells_the_others(
    waiting: tuple[Engine, MemoryPeers, Round], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, peers, this = waiting

    def interrupt() -> list[tuple[int, Message]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(peers, "receive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.wait(this)
    assert {rank for rank, _ in peers.told(Kind.FAILED)} == {SOURCE, DESTINATION}
    assert "KeyboardInterrupt" in peers.told(Kind.FAILED)[0][1].failure()[1]


def test_the_last_words_of_a_lost_peer_say_who_is_to_blame(
    waiting: tuple[Engine, MemoryPeers, Round], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, peers, this = waiting

    def disconnected(self: Inbox) -> set[int]:
        peers.arrive(SOURCE, Writer(TOKEN, 0).failed([5], "5 is gone"))
        raise PeerLostError("rank 1 is gone", peers=[SOURCE], phase="read")

    monkeypatch.setattr(Inbox, "advance", disconnected)
    with pytest.raises(PeerLostError) as caught:
        engine.wait(this)
    assert caught.value.peers == (5,)


def test_who_waits_does_other_work_meanwhile(waiting: tuple[Engine, MemoryPeers, Round]) -> None:
    engine, _, this = waiting
    done: list[int] = []
    with pytest.raises(TransferTimeoutError):  # the peers are silent
        engine.wait(this, (done.append(number) for number in range(3)))
    assert done == [0, 1, 2]


# --- what NIXL raises, and what is released --------------------------------------------------------------------------


class nixlSomethingError(Exception):  # noqa: N801 - as NIXL names its own
    """As NIXL's: derived from Exception directly."""


class nixlRemoteDisconnectError(Exception):  # noqa: N801
    """As NIXL's."""


@pytest.mark.parametrize("kind", [nixlSomethingError, nixlRemoteDisconnectError, UnicodeError, MemoryError])
def test_whatever_nixl_raises_becomes_an_error_of_ours_with_its_text(kind: type[Exception]) -> None:
    with pytest.raises(NixlError, match=f"it failed: {kind.__name__}: because") as caught, mapped("it failed"):
        raise kind("because")
    assert caught.value.disconnected == (kind is nixlRemoteDisconnectError)


class FakeNixl:
    """Notes the order of calls; READs stay in the state that the test gives."""

    def __init__(self, *, state: str = "PROC", refuses: str = "") -> None:
        self.calls: list[str] = []
        self.state = state
        self.refuses = refuses

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: object) -> Any:
            if name == "check_xfer_state":
                if self.state == "raises":
                    raise nixlSomethingError
                return self.state
            self.calls.append(name)
            if name == self.refuses:
                raise nixlSomethingError(name)
            return None

        return call


def held(nixl: FakeNixl, memory: torch.Tensor, *, memory_type: str = "DRAM") -> Any:
    everything = agent_module._Held(nixl, stays_after_failure=memory_type == "VRAM")
    everything.reads.append(Read(nixl, "handle"))
    everything.prepared.append("list")
    everything.peers.append("peer")
    everything.registered.append(Registration("descriptors", [memory]))
    return everything


RELEASED = ["release_xfer_handle", "release_dlist_handle", "remove_remote_agent", "deregister_memory"]


@pytest.mark.parametrize(
    ("state", "memory_type", "released"),
    [("DONE", "DRAM", True), ("DONE", "VRAM", True), ("raises", "DRAM", True), ("raises", "VRAM", False)]
    + [("PROC", memory_type, False) for memory_type in ("DRAM", "VRAM")],
)
def test_what_a_read_may_still_write_to_is_kept_for_good_and_all_else_is_released_in_order(
    state: str, memory_type: str, released: bool
) -> None:
    nixl, memory = FakeNixl(state=state), torch.zeros(1)
    everything = held(nixl, memory, memory_type=memory_type)
    holders = sys.getrefcount(memory)
    everything.release()
    everything.release()
    del everything
    assert nixl.calls == (RELEASED if released else [])
    assert sys.getrefcount(memory) == holders - released


@pytest.mark.parametrize("refuses", RELEASED)
def test_the_rest_is_released_when_a_part_of_it_fails(refuses: str, caplog: pytest.LogCaptureFixture) -> None:
    nixl = FakeNixl(state="DONE", refuses=refuses)
    held(nixl, torch.zeros(1)).release()
    assert nixl.calls == RELEASED
    assert len(caplog.records) == 1


def test_nixl_is_found_under_its_other_names(tmp_path: Path) -> None:
    """In a process of its own, since modules are loaded once."""
    for package in ("nixl_rocm", "rixl"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / "_api.py").write_text(f"NAME = {package!r}\n")
    (tmp_path / "child.py").write_text(
        """
import importlib.machinery, json, sys, torch
from eplb_backends.nixl import has_nixl
from eplb_backends.nixl.agent import _load
from eplb_core.errors import BackendNotInstalledError

missing = []

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in missing else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
said = []
for package in ("nixl", "nixl_rocm", "rixl"):
    missing.append(package)
    for module in (package, f"{package}._api"):
        sys.modules.pop(module, None)
    try:
        said.append([has_nixl(), _load(torch.device("cpu")).NAME])
    except BackendNotInstalledError as error:
        said.append([has_nixl(), error.remedy])
print(json.dumps(said))
"""
    )
    ran = subprocess.run([sys.executable, "child.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == [[True, "nixl_rocm"], [True, "rixl"], [False, 'pip install "eplb[nixl]"']]


# --- links -----------------------------------------------------------------------------------------------------------

PLACE = Place("here", "boot", "namespace", "")


def place(**changed: str) -> Place:
    return Place(*(changed.get(field, getattr(PLACE, field)) for field in PLACE.__struct_fields__))


@pytest.mark.parametrize(
    ("there", "memory", "kind", "obstacle"),
    [
        (place(), "DRAM", "same host, shared memory", ""),
        (place(), "VRAM", "same host, CUDA IPC", ""),
        (place(boot="other", host="there"), "DRAM", "network to there", ""),
        (place(boot="other", host="there", transports="tcp"), "VRAM", "network to there", ""),
        (place(pid_namespace="container"), "DRAM", "same host, other container", "PID namespaces"),
        (place(transports="tcp,self"), "DRAM", "same host, over tcp,self", "UCX_TLS=tcp,self"),
        (place(transports="tcp,sm"), "DRAM", "same host, shared memory", ""),
        (place(transports="^tcp"), "DRAM", "same host, shared memory", ""),
        (place(transports="tcp, cuda_ipc"), "VRAM", "same host, CUDA IPC", ""),
    ],
)
def test_a_link_is_what_the_places_of_both_ends_allow(there: Place, memory: str, kind: str, obstacle: str) -> None:
    for ends in ((PLACE, there), (there, PLACE)):
        link = link_between(*ends, memory)
        assert link.kind == kind.replace("there", ends[1].host)
        assert (obstacle in link.obstacle) if obstacle else not link.obstacle


def test_hosts_that_cannot_be_told_apart_are_taken_for_different_ones() -> None:
    assert link_between(place(boot=""), place(boot=""), "DRAM").kind.startswith("network")


MIB = 1 << 20


def links(min_gbps: float = 0.0, memory: str = "DRAM") -> Links:
    one = Links(memory, min_gbps)
    one.add(SOURCE, Place.here())
    return one


def test_a_link_is_judged_by_the_fastest_of_its_first_three_large_reads() -> None:
    one = links(min_gbps=1.0)
    for seconds in (1.0, 1.0, MIB / 2e9):
        one.measured(SOURCE, MIB, seconds)
    assert "2.00 GB/s" in one.describe(SOURCE)
    one.measured(SOURCE, MIB, 1.0)


def test_a_link_below_min_gbps_is_an_error_with_its_rate_once_it_is_judged() -> None:
    one = links(min_gbps=1.0)
    for _ in range(10):
        one.measured(SOURCE, 1000, 1.0)  # too small to tell
    one.measured(SOURCE, MIB, MIB / 0.5e9)
    one.measured(SOURCE, MIB, 1.0)
    with pytest.raises(TransferError, match=r"0\.50 GB/s, less than min_gbps=1") as caught:
        one.measured(SOURCE, MIB, 1.0)
    assert caught.value.peers == (SOURCE,)
    assert caught.value.phase == "probe"


@pytest.mark.parametrize(("memory", "rate", "warns"), [("DRAM", 0.01, 1), ("DRAM", 1.0, 0), ("VRAM", 1.0, 1)])
def test_a_slow_link_inside_a_host_is_warned_of_once(
    memory: str, rate: float, warns: int, caplog: pytest.LogCaptureFixture
) -> None:
    one = links(memory=memory)
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            one.measured(SOURCE, MIB, MIB / rate / 1e9)
    assert len(caplog.records) == warns


# --- how each tensor travels -----------------------------------------------------------------------------------------

SMALL, LARGE = SCATTER_BYTES - 1, SCATTER_BYTES


@pytest.mark.parametrize(
    ("mode", "registered", "nbytes", "direct"),
    [
        ("auto", True, LARGE, True),
        ("auto", True, SMALL, False),
        ("auto", False, LARGE, False),
        ("direct", True, LARGE, True),
        ("direct", True, 1, True),
        ("packed", True, LARGE, False),
        ("packed", False, SMALL, False),
    ],
)
def test_large_registered_tensors_are_read_in_place(mode: str, registered: bool, nbytes: int, direct: bool) -> None:
    [tensor] = tensors(nbytes)
    regions = Regions()
    if registered:
        regions.add(tensor.data_ptr(), nbytes)
    [plan] = layout.outgoing(payloads(1, [tensor]), regions, Rows(), mode).values()
    assert plan.addresses.tolist() == [tensor.data_ptr() if direct else 0]
    assert len(plan.packed) == (not direct)


@pytest.mark.parametrize(("few", "packed"), [(0, 3), (2, 3), (3, 0), (100, 0)])
def test_small_registered_tensors_are_packed_only_if_a_pair_has_many(few: int, packed: int) -> None:
    some = tensors(SMALL, LARGE, 1, 5)
    regions = Regions()
    for tensor in some:
        regions.add(tensor.data_ptr(), tensor.nbytes)
    [plan] = layout.outgoing(payloads(1, some), regions, Rows(), "auto", few).values()
    assert len(plan.packed) == packed
    assert np.count_nonzero(plan.addresses) == len(some) - packed


def test_tensors_without_bytes_count_but_do_not_travel() -> None:
    [plan] = layout.outgoing(payloads(1, tensors(0, 5, 0)), Regions(), Rows(), "auto").values()
    assert (plan.count, plan.addresses.tolist(), len(plan.packed)) == (3, [0], 1)


def test_only_what_was_declared_is_read_into() -> None:
    landing, other = tensors(100, 100)
    regions = Regions()
    regions.add(landing.data_ptr(), 100)
    received = payloads(1, [landing, other, landing[50:]])
    assert layout.incoming(received, regions, LandingPieces())[1].in_place == [True, False, True]


# --- checksums -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [False, True], ids=["full", "sample"])
@pytest.mark.parametrize("nbytes", [1 << 20, (1 << 20) + 4099, 200_000])
def test_checksums_notice_what_goes_wrong_with_whole_blocks(nbytes: int, sample: bool) -> None:
    [right] = tensors(nbytes)
    blocks = right[: nbytes // 4096 * 4096].view(-1, 4096)
    swapped = right.clone()
    swapped[:4096], swapped[-4096:] = right[-4096:].clone(), right[:4096].clone()
    wrong = {
        "shifted by a byte": right.roll(1),
        "shifted by a word": right.roll(8),
        "shifted by a row": right.roll(8192),
        "first and last block swapped": swapped,
        "all blocks in reverse": torch.cat([blocks.flip(0).reshape(-1), right[nbytes // 4096 * 4096 :]]),
        "another message's bytes": tensors(nbytes, seed=2)[0],
        "zeros": torch.zeros_like(right),
        "poison": torch.full_like(right, 0xEE),
    }
    [expected] = checksums([right], sample=sample)
    assert [what for what, tensor in wrong.items() if checksums([tensor], sample=sample)[0] == expected] == []
    assert checksums([right.clone()], sample=sample)[0] == expected


def test_checksums_do_not_depend_on_where_the_bytes_lie() -> None:
    [right] = tensors(50_000)
    shifted = torch.empty(50_003, dtype=torch.uint8)[3:].copy_(right)
    assert checksums([right], sample=False)[0] == checksums([shifted], sample=False)[0]
