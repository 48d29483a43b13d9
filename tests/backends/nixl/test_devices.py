"""A device number is local to its process: descriptors of a peer's memory carry the peer's number.

Two agents on GPUs that their processes number differently, over a stand-in for NIXL that keeps what each side has
registered and, as NIXL does, finds memory by its address and device number together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_backends.nixl import agent as agent_module
from eplb_backends.nixl.agent import Agent, NixlError
from eplb_backends.nixl.links import Links
from eplb_backends.nixl.peers import Identity, Peers
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import TransferError

SOURCE, READER = 0, 1
NUMBERS = {SOURCE: 3, READER: 5}  # what each process calls its GPU
ROW, ROWS = 1000, 8
WEIGHTS, MORE_WEIGHTS, LANDING = 0x10_0000, 0x20_0000, 0x30_0000

Descriptor = tuple[int, int, int]  # address, bytes, device number


class NotFoundError(Exception):
    """What NIXL raises for memory that is not registered."""


@dataclass
class Network:
    """What all agents have told, and the descriptors of every READ: local side, remote side."""

    known: dict[str, list[Descriptor]] = field(default_factory=dict)
    reads: list[tuple[list[Descriptor], list[Descriptor]]] = field(default_factory=list)


class StandIn:
    """A NIXL agent that moves nothing and looks descriptors up."""

    def __init__(self, network: Network, name: str) -> None:
        self._network = network
        self._name = name
        self._registered: list[Descriptor] = []
        self._peers: dict[str, list[Descriptor]] = {}

    def create_backend(self, name: str, options: dict[str, str]) -> None:
        pass

    def register_memory(self, rows: list[tuple[int, int, int, str]], kind: str) -> object:
        assert kind == "VRAM"
        self._registered += [(address, nbytes, number) for address, nbytes, number, _ in rows]
        return rows

    def get_agent_metadata(self) -> bytes:
        return json.dumps([self._name, self._registered]).encode()

    def add_remote_agent(self, metadata: bytes) -> bytes:
        name, registered = json.loads(metadata)
        self._peers[name] = [tuple(each) for each in registered]
        return str(name).encode()

    def get_xfer_descs(self, table: np.ndarray, kind: str) -> list[Descriptor]:
        return [tuple(row) for row in table.tolist()]

    def initialize_xfer(self, operation: str, local: list[Descriptor], remote: list[Descriptor], peer: str) -> object:
        self._look_up(local, self._registered)
        self._look_up(remote, self._peers[peer])
        self._network.reads.append((local, remote))
        return object()

    def prep_xfer_dlist(self, peer: str, table: np.ndarray, kind: str) -> list[Descriptor]:
        pieces = [
            (address + at * distance, nbytes, number)
            for address, nbytes, number, distance, count in table.tolist()
            for at in range(count)
        ]
        self._look_up(pieces, self._peers[peer] if peer else self._registered)
        return pieces

    def make_prepped_xfer(
        self, operation: str, local: list[Descriptor], here: np.ndarray, remote: list[Descriptor], there: np.ndarray
    ) -> object:
        self._network.reads.append(([local[at] for at in here.tolist()], [remote[at] for at in there.tolist()]))
        return object()

    def release_dlist_handle(self, prepared: object) -> None:
        pass

    def transfer(self, handle: object) -> str:
        return "DONE"

    def release_xfer_handle(self, handle: object) -> None:
        pass

    def remove_remote_agent(self, name: str) -> None:
        del self._peers[name]

    def deregister_memory(self, rows: object) -> None:
        pass

    @staticmethod
    def _look_up(wanted: list[Descriptor], registered: list[Descriptor]) -> None:
        for address, nbytes, number in wanted:
            if not any(
                start <= address and address + nbytes <= start + size and number == owner
                for start, size, owner in registered
            ):
                raise NotFoundError(f"NIXL_ERR_NOT_FOUND: {address:#x} on device {number}")


@dataclass
class Side:
    """One rank: its agent, and what it knows of the other."""

    agent: Agent
    peers: Peers
    control: ControlPlane


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    made = Network()
    api = SimpleNamespace(
        nixl_agent_config=lambda **options: options, nixl_agent=lambda name, config: StandIn(made, name)
    )
    monkeypatch.setattr(agent_module, "_load", lambda device: api)
    return made


@pytest.fixture
def sides(network: Network) -> list[Side]:
    store = dist.HashStore()
    made = []
    for rank, number in NUMBERS.items():
        agent = Agent(f"rank{rank}", torch.device("cuda", number), progress_thread=False)
        control = ControlPlane(store, rank, len(NUMBERS))
        made.append(Side(agent, Peers(agent, control, Links("VRAM", 0.0), 5.0, WEIGHTS), control))
    names = [side.agent.name for side in made]
    for side in made:
        side.peers.meet(names)
    made[SOURCE].agent.register([(WEIGHTS, ROW * ROWS)], [])
    made[SOURCE].peers.own_rows.add((WEIGHTS, ROW, ROW, ROWS))
    made[READER].agent.register([(LANDING, ROW * ROWS)], [])
    for side in made:
        side.peers.publish()
    return made


def column(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def read_by_address(reader: Side, addresses: list[int]) -> None:
    remote = column(*addresses)
    local = LANDING + ROW * np.arange(len(addresses))
    name = reader.peers.know(SOURCE, reader.peers._versions.get(SOURCE, 1))
    reader.agent.finished(reader.agent.read(name, remote, local, np.full(len(addresses), ROW)))


def read_by_number(reader: Side, rows: list[int]) -> None:
    here = column(*[reader.peers.places.add(LANDING + ROW * at, ROW) for at in range(len(rows))])
    numbered = None
    while numbered is None:  # lists are made once it pays
        numbered = reader.peers.prepared(SOURCE, column(*rows), here)
    nothing = column()
    reader.agent.finished(reader.agent.read(reader.peers.name(SOURCE), nothing, nothing, nothing, numbered))


def test_a_read_names_the_owners_number_on_each_side(network: Network, sides: list[Side]) -> None:
    read_by_address(sides[READER], [WEIGHTS, WEIGHTS + 3 * ROW])
    assert network.reads == [
        (
            [(LANDING, ROW, NUMBERS[READER]), (LANDING + ROW, ROW, NUMBERS[READER])],
            [(WEIGHTS, ROW, NUMBERS[SOURCE]), (WEIGHTS + 3 * ROW, ROW, NUMBERS[SOURCE])],
        )
    ]


def test_prepared_lists_name_the_owners_number_on_each_side(network: Network, sides: list[Side]) -> None:
    sides[READER].peers.know(SOURCE, 1)
    read_by_number(sides[READER], [6, 2])
    ((local, remote),) = network.reads
    assert local == [(LANDING, ROW, NUMBERS[READER]), (LANDING + ROW, ROW, NUMBERS[READER])]
    assert remote == [(WEIGHTS + 6 * ROW, ROW, NUMBERS[SOURCE]), (WEIGHTS + 2 * ROW, ROW, NUMBERS[SOURCE])]


def test_memory_that_is_registered_later_is_read_by_the_owners_number(network: Network, sides: list[Side]) -> None:
    source, reader = sides
    reader.peers.know(SOURCE, 1)
    read_by_number(reader, [1])
    source.agent.register([(MORE_WEIGHTS, ROW * ROWS)], [])
    source.peers.own_rows.add((MORE_WEIGHTS, ROW, ROW, ROWS))
    source.peers.publish()
    reader.peers.know(SOURCE, 2)
    read_by_address(reader, [MORE_WEIGHTS])
    read_by_number(reader, [ROWS + 4])
    remote = [remote for _, remote in network.reads]
    assert remote == [
        [(WEIGHTS + ROW, ROW, NUMBERS[SOURCE])],
        [(MORE_WEIGHTS, ROW, NUMBERS[SOURCE])],
        [(MORE_WEIGHTS + 4 * ROW, ROW, NUMBERS[SOURCE])],
    ]


def test_each_rank_tells_its_own_number(sides: list[Side]) -> None:
    for rank, side in enumerate(sides):
        told = msgspec.msgpack.decode(side.control.fetch(rank, "identity/1", 5.0), type=Identity)
        assert told.device_number == NUMBERS[rank]


@pytest.mark.parametrize("number", [-1, 1 << 17, "0", None, 1.5])
def test_a_number_that_no_device_has_is_refused(sides: list[Side], number: Any) -> None:
    refused(sides, device_number=number)


@pytest.mark.parametrize("memory", ["DRAM", ""])
def test_a_rank_that_moves_other_memory_is_refused(sides: list[Side], memory: str) -> None:
    refused(sides, memory=memory)


def refused(sides: list[Side], **changed: object) -> None:
    source, reader = sides
    told = msgspec.msgpack.decode(source.control.fetch(SOURCE, "identity/1", 5.0), type=Identity)
    source.control.publish("identity/2", msgspec.msgpack.encode(msgspec.structs.replace(told, **changed)))
    with pytest.raises(TransferError, match=f"the metadata of rank {SOURCE} cannot be used") as raised:
        reader.peers.know(SOURCE, 2)
    assert raised.value.peers == (SOURCE,)


def test_a_peer_that_was_not_added_has_no_number(sides: list[Side]) -> None:
    with pytest.raises((NixlError, KeyError)):
        sides[READER].agent.prepare("a stranger", np.array([[WEIGHTS, ROW, ROW, 1]], np.int64))
