"""Many ranks and a small window: all that a rank decides by itself, for 64 ranks in one process.

Engines, rounds, windows and notifications are the real ones. NIXL is replaced by memory of this process: a READ copies
when it is asked whether it has ended, and notifications arrive in the order of each sender, but as late as the test
likes.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque

import numpy as np
import pytest
import torch

from eplb_backends.nixl import layout
from eplb_backends.nixl.engine import Engine
from eplb_backends.nixl.memory import Regions, SlotPool
from eplb_backends.nixl.messages import Message, parse
from eplb_backends.nixl.prepared import LandingPieces, Rows
from eplb_backends.nixl.round import Round, Shared
from eplb_core.contract.payload import Payload, Payloads

CPU = torch.device("cpu")
TOKEN = b"12345678"
MIB = 1 << 20
TURNS = 100_000  # of one rank; far more than any of these takes


def by_peer(transfers: list[tuple[torch.Tensor, int]]) -> Payloads:
    peers = sorted({peer for _, peer in transfers})
    return {rank: [Payload(tensor) for tensor, peer in transfers if peer == rank] for rank in peers}


class Network:
    """Carries the notifications of all ranks.

    Args:
        drawn: decides what arrives late, and in which order ranks get on.
    """

    def __init__(self, world_size: int, drawn: random.Random) -> None:
        self.drawn = drawn
        self.queues = {
            (source, destination): deque[bytes]()
            for source in range(world_size)
            for destination in range(world_size)
            if source != destination
        }
        self.in_flight_reads = 0


class Rank:
    """One rank: an agent, peers, two windows and an engine, as a communicator has them."""

    def __init__(self, rank: int, world_size: int, window: int, network: Network) -> None:
        self.rank = rank
        self.token = TOKEN
        self.version = 1
        self.known = set(range(world_size)) - {rank}
        self.lost: set[int] = set()
        self.agent = self
        self.network = network
        self.read_late: dict[int, tuple[np.ndarray, ...]] = {}
        self.reads = 0
        self.shared = Shared(
            self,  # type: ignore[arg-type]
            SlotPool(self, window, CPU),  # type: ignore[arg-type]
            SlotPool(self, window, CPU),  # type: ignore[arg-type]
            CPU,
            lambda *measured: None,
        )
        self.engine = Engine(self, 600.0)  # type: ignore[arg-type]
        self.depth = network.drawn.randint(1, 4)
        self.to_do: deque[Round] = deque()
        self.under_way: deque[Round] = deque()

    # --- as `Agent` and `Peers` do

    def register(self, regions: object, owners: object) -> None:
        pass

    def read(
        self, peer: str, remote: np.ndarray, local: np.ndarray, lengths: np.ndarray, numbered: object = None
    ) -> int:
        self.reads += 1
        self.read_late[self.reads] = (remote, local, lengths)
        return self.reads

    def finished(self, read: int) -> bool:
        if self.network.drawn.random() < 0.5:
            return False
        for remote, local, nbytes in zip(*(array.tolist() for array in self.read_late.pop(read)), strict=True):
            ctypes.memmove(local, remote, nbytes)
        return True

    def name(self, rank: int) -> str:
        return str(rank)

    def know(self, rank: int, version: int) -> str:
        return str(rank)

    def starts(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        return np.empty(0, np.int64), np.empty(0, np.int64)

    def page_to_read(self, rank: int) -> int | None:
        return None

    def send(self, rank: int, raw: bytes) -> None:
        self.network.queues[self.rank, rank].append(raw)

    def receive(self) -> list[tuple[int, Message]]:
        arrived = []
        for source in self.known:
            queue = self.network.queues[source, self.rank]
            while queue and self.network.drawn.random() < 0.7:
                message = parse(TOKEN, queue.popleft())
                assert message is not None
                arrived.append((source, message))
        return arrived

    # --- what a test does with it

    def queue(
        self, epoch: int, sends: list[tuple[torch.Tensor, int]], recvs: list[tuple[torch.Tensor, int]], direct: bool
    ) -> None:
        registered = Regions()
        for tensor, _ in sends if direct else ():
            registered.add(tensor.data_ptr(), tensor.nbytes)
        this = Round(
            self.shared,
            epoch,
            layout.outgoing(by_peer(sends), registered, Rows(), "direct" if direct else "packed"),
            layout.incoming(by_peer(recvs), Regions(), LandingPieces()),
            None,
            None,
            lambda peer: "something else",
        )
        self.to_do.append(this)

    def advance(self) -> None:
        """As a caller does that starts transfers while few are under way, and waits for them in order."""
        while self.to_do and len(self.under_way) < self.depth:
            self.under_way.append(self.to_do.popleft())
            self.engine.start(self.under_way[-1])
        if self.under_way:
            self.engine._advance()
        while self.under_way and self.under_way[0].ended:
            self.engine._rounds.remove(self.under_way.popleft())

    @property
    def done(self) -> bool:
        return not self.to_do and not self.under_way


def exchange(
    world_size: int,
    window: int,
    sizes: dict[tuple[int, int], list[int]],
    seed: int,
    *,
    direct: bool = False,
    rounds: int = 1,
) -> list[Rank]:
    """Let all ranks send `sizes[source, destination]` in each round, some at the same time; compare all bytes."""
    drawn = random.Random(seed)
    network = Network(world_size, drawn)
    ranks = [Rank(rank, world_size, window, network) for rank in range(world_size)]
    content = np.random.default_rng(seed)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for epoch in range(rounds):
        sends: list[list[tuple[torch.Tensor, int]]] = [[] for _ in ranks]
        recvs: list[list[tuple[torch.Tensor, int]]] = [[] for _ in ranks]
        for (source, destination), lengths in sizes.items():
            for nbytes in lengths:
                sent = torch.from_numpy(content.integers(0, 256, nbytes, dtype=np.uint8))
                received = torch.full_like(sent, 0xEE)
                sends[source].append((sent, destination))
                recvs[destination].append((received, source))
                pairs.append((sent, received))
        for rank in ranks:
            rank.queue(epoch, sends[rank.rank], recvs[rank.rank], direct)
    for _ in range(TURNS):
        busy = [rank for rank in ranks if not rank.done]
        if not busy:
            break
        for rank in drawn.sample(busy, len(busy)):
            rank.advance()
    else:
        raise AssertionError(f"ranks {[rank.rank for rank in ranks if not rank.done]} wait for ever (seed {seed})")
    wrong = [sent.nbytes for sent, received in pairs if not torch.equal(sent, received)]
    assert not wrong, f"{len(wrong)} of {len(pairs)} tensors are wrong (seed {seed})"
    return ranks


def everyone(world_size: int, lengths: list[int]) -> dict[tuple[int, int], list[int]]:
    return {(a, b): list(lengths) for a in range(world_size) for b in range(world_size) if a != b}


@pytest.mark.parametrize("direct", [False, True], ids=["packed", "direct"])
def test_64_ranks_that_all_talk_to_all_get_through_a_window_of_4_mib(direct: bool) -> None:
    """Each rank has more peers than slots, and is sent far more than the window holds by two of them."""
    sizes = everyone(64, [9_000, 50, 0])
    sizes[0, 1] = [6 * MIB + 1, 3]  # one expert is larger than the window
    sizes[63, 1] = [700_001]  # and one tensor larger than a slot, and than a whole receive window
    ranks = exchange(64, 4 * MIB, sizes, seed=1, direct=direct)
    for rank in ranks:
        assert len(rank.shared.send_window.buffer) + len(rank.shared.receive_window.buffer) <= MIB
        assert rank.shared.send_window.slot_bytes < 700_001


@pytest.mark.parametrize("seed", range(12))
def test_no_order_of_arrival_makes_ranks_wait_for_one_another_for_ever(seed: int) -> None:
    """Four rounds, each larger than the window, of which each rank has as many under way as it likes."""
    drawn = random.Random(seed)
    world_size = drawn.randint(2, 7)
    pairs = list(everyone(world_size, [0]))
    sizes = {
        pair: [drawn.choice((0, 1, 900, 5000, 30_000)) for _ in range(3)] for pair in pairs if drawn.random() < 0.8
    }
    exchange(world_size, 64 << 10, sizes, seed, direct=seed % 3 == 0, rounds=4)
