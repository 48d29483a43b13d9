"""The NCCL backends between GPUs, under torchrun; every rank runs this same file.

    torchrun --standalone --nproc-per-node 2 -m pytest tests/multigpu/test_nccl_multi.py

It takes 2, 4 or 8 processes, or any other number, and as many GPUs. Without torchrun everything is skipped.
A rank that is killed is in test_killed_rank.py: torchrun would end the others with it.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.control.groups import TorchGroups, generation_group
from eplb_core.errors import CommunicatorClosedError, TransferError, TransferMismatchError, TransferTimeoutError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.factory.profiling import reserve_profile_buffers
from eplb_core.launch.local_ranks import RankEnvironment
from eplb_core.planning.generations import remap_placement
from eplb_core.rearrange.rearranger import Rearranger
from eplb_core.transport.coalesce import as_bytes
from tests.multigpu.engine_nccl import EngineNccl, why_not

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
GPUS = torch.cuda.device_count()
HAS_NCCL4PY = importlib.util.find_spec("nccl") is not None

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(WORLD < 2, reason="run it under torchrun, with 2 processes or more"),
    pytest.mark.skipif(GPUS < LOCAL_WORLD, reason=f"{LOCAL_WORLD} ranks need as many GPUs, and torch sees {GPUS}"),
]

BACKENDS = [
    "torch_nccl",
    pytest.param("pynccl", marks=pytest.mark.skipif(not HAS_NCCL4PY, reason="nccl4py is not installed")),
]
ENGINES = "pynccl?communicator=engine"
ALL_KINDS = [*BACKENDS, pytest.param(ENGINES, marks=pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"))]
QUANTIZED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
DTYPES = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)} - QUANTIZED, key=str)
MEET_S = 60.0


@dataclass
class World:
    """This rank, and what all tests share."""

    environment: RankEnvironment
    device_group: dist.ProcessGroup
    met: int = 0
    engine: EngineNccl | None = None

    @property
    def rank(self) -> int:
        return self.environment.rank

    @property
    def size(self) -> int:
        return self.environment.world_size

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.environment.local_rank)

    @property
    def after(self) -> int:
        return (self.rank + 1) % self.size

    @property
    def before(self) -> int:
        return (self.rank - 1) % self.size

    def communicator(self, config: str, device_group: dist.ProcessGroup | None = None) -> EplbCommunicator:
        carried = SimpleNamespace(pynccl_comm=self.of_engine()) if "communicator=engine" in config else None
        groups = TorchGroups(device_group=device_group or self.device_group, device_communicator=carried)
        return create_eplb_communicator(groups, config, [torch.zeros(1, device=self.device)])

    def of_engine(self) -> EngineNccl:
        """Return the engine's communicator, one for all tests."""
        if self.engine is None:
            store = dist.PrefixStore("engine", self.environment.store)
            self.engine = EngineNccl(store, self.rank, self.size, self.device)
        return self.engine

    def meet(self) -> None:
        """Wait for all ranks, so that a failed test on one of them does not shift the others' calls."""
        self.met += 1
        store = self.environment.store
        store.set(f"met/{self.met}/{self.rank}", "")
        everyone = [f"met/{self.met}/{rank}" for rank in range(self.size)]
        store.wait(everyone, datetime.timedelta(seconds=MEET_S))


@pytest.fixture(scope="session")
def joined() -> Iterator[World]:
    environment = RankEnvironment.from_torchrun()
    torch.cuda.set_device(environment.local_rank)
    environment.init_process_group(MEET_S)
    yield World(environment, dist.new_group(backend="nccl"))
    dist.destroy_process_group()


@pytest.fixture
def world(joined: World) -> Iterator[World]:
    joined.meet()
    yield joined
    joined.meet()


def content(source: int, destination: int, index: int, nbytes: int) -> torch.Tensor:
    """Return the bytes of one message, uint8 on the CPU: random, and a function of nothing but the arguments."""
    rng = np.random.default_rng([source, destination, index, nbytes])
    return torch.from_numpy(rng.integers(0, 256, nbytes, dtype=np.uint8))


def exchange(world: World, communicator: EplbCommunicator, sizes: list[int]) -> None:
    """Send messages of these sizes from every rank to every other one, and compare every byte."""
    others = [rank for rank in range(world.size) if rank != world.rank]
    landed = {}
    for index, nbytes in enumerate(sizes):
        for other in others:
            landed[other, index] = torch.full((nbytes,), 0xEE, dtype=torch.uint8, device=world.device)
            communicator.add_send(content(world.rank, other, index, nbytes).to(world.device), other)
            communicator.add_recv(landed[other, index], other)
    communicator.execute()
    for (other, index), tensor in landed.items():
        assert torch.equal(tensor.cpu(), content(other, world.rank, index, len(tensor))), f"{len(tensor)} B of {other}"


@pytest.mark.parametrize("config", ALL_KINDS)
def test_all_pairs_exchange_small_and_large_tensors(world: World, config: str) -> None:
    with world.communicator(config) as communicator:
        for _ in range(3):
            exchange(world, communicator, [5, 1 << 20, 0, 65_535, 7, (16 << 20) + 3])
        communicator.execute()


@pytest.mark.parametrize("config", ALL_KINDS)
def test_a_ring_leaves_the_other_pairs_alone(world: World, config: str) -> None:
    with world.communicator(config) as communicator:
        for value in range(20):
            sent = torch.full((100_000,), float(world.rank + value), device=world.device)
            landed = torch.empty_like(sent)
            communicator.add_send(sent, world.after)
            communicator.add_recv(landed, world.before)
            communicator.execute()
            assert bool((landed == world.before + value).all())


@pytest.mark.parametrize("config", ALL_KINDS)
def test_ranks_with_nothing_to_do_may_execute_all_the_same(world: World, config: str) -> None:
    with world.communicator(config) as communicator:
        landed = torch.zeros(1 << 20, device=world.device)
        if world.rank == 0:
            communicator.add_send(torch.ones_like(landed), 1)
        elif world.rank == 1:
            communicator.add_recv(landed, 0)
        communicator.execute()
        assert world.rank != 1 or bool((landed == 1).all())


@pytest.mark.parametrize("config", ALL_KINDS)
def test_a_mismatch_moves_no_byte_and_the_communicator_goes_on(world: World, config: str) -> None:
    with world.communicator(config) as communicator:
        landed = torch.full((96,), 0xEE, dtype=torch.uint8, device=world.device)
        if world.rank == 0:
            communicator.add_send(torch.zeros(100, dtype=torch.uint8, device=world.device), 1)
        elif world.rank == 1:
            communicator.add_recv(landed, 0)
        with pytest.raises(TransferMismatchError, match=r"100 bytes.* 96 bytes") as raised:
            communicator.execute()
        assert raised.value.usable
        assert bool((landed == 0xEE).all())
        exchange(world, communicator, [1000])


@pytest.mark.parametrize("config", ALL_KINDS)
def test_stream_order_holds_without_any_synchronisation(world: World, config: str) -> None:
    with world.communicator(config) as communicator:
        stream = torch.cuda.Stream()
        communicator.set_stream(stream)
        with torch.cuda.stream(stream):
            sent, landed = (torch.zeros(4 << 20, device=world.device) for _ in range(2))
            for value in range(1, 11):
                torch.cuda._sleep(20_000_000)
                sent.fill_(100 * world.rank + value)
                communicator.add_send(sent, world.after)
                communicator.add_recv(landed, world.before)
                communicator.execute()
                copy = landed.clone()
                sent.fill_(-1.0)
                assert bool((copy == 100 * world.before + value).all())


@pytest.mark.parametrize("nbytes", [480, 160_000], ids=["joined", "alone"])
@pytest.mark.parametrize("config", ALL_KINDS)
def test_every_dtype_arrives_byte_for_byte(world: World, config: str, nbytes: int) -> None:
    if config.startswith("pynccl"):
        config += f"{'&' if '?' in config else '?'}reinterpret=bytes"
    with world.communicator(config) as communicator:
        expected, landed = [], []
        for index, dtype in enumerate(DTYPES):
            bits = 1 if dtype == torch.bool else 255
            sent = (content(world.rank, world.after, index, nbytes) & bits).to(world.device)
            expected.append(content(world.before, world.rank, index, nbytes) & bits)
            landed.append(torch.zeros(nbytes, dtype=torch.uint8, device=world.device).view(dtype))
            communicator.add_send(sent.view(dtype), world.after)
            communicator.add_recv(landed[-1], world.before)
        communicator.execute()
        wrong = [
            dtype
            for dtype, there, here in zip(DTYPES, expected, landed, strict=True)
            if not torch.equal(as_bytes(here).cpu(), there)
        ]
    assert not wrong


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.int16, torch.bool], ids=str
)
@pytest.mark.skipif(not HAS_NCCL4PY, reason="nccl4py is not installed")
def test_dtypes_that_nccl_does_not_know_travel_as_bytes(world: World, dtype: torch.dtype) -> None:
    with world.communicator("pynccl?reinterpret=bytes") as communicator:
        raw = content(world.rank, world.after, 0, 200_000) & (1 if dtype == torch.bool else 255)
        expected = content(world.before, world.rank, 0, 200_000) & (1 if dtype == torch.bool else 255)
        landed = torch.zeros(200_000, dtype=torch.uint8, device=world.device)
        communicator.add_send(raw.to(world.device).view(dtype), world.after)
        communicator.add_recv(landed.view(dtype), world.before)
        communicator.execute()
        assert torch.equal(landed.cpu(), expected)


@pytest.mark.parametrize("config", BACKENDS)
def test_ranks_are_those_of_the_group_not_of_the_world(world: World, config: str) -> None:
    members = list(range(1, world.size))
    cpu_group, device_group = dist.new_group(members), dist.new_group(members, backend="nccl")
    if len(members) < 2:
        pytest.skip("a group of two without rank 0 takes three GPUs")
    if world.rank == 0:
        return
    groups = TorchGroups(cpu_group, device_group)
    with create_eplb_communicator(groups, config, [torch.zeros(1, device=world.device)]) as communicator:
        size, rank = groups.world_size, groups.rank_in_group
        landed = torch.zeros(1000, device=world.device)
        communicator.add_send(torch.full_like(landed, float(world.rank)), (rank + 1) % size)
        communicator.add_recv(landed, (rank - 1) % size)
        communicator.execute()
        assert bool((landed == members[(rank - 1) % size]).all())


@pytest.mark.parametrize("config", BACKENDS)
def test_two_groups_without_a_common_rank_transfer_at_the_same_time(world: World, config: str) -> None:
    half = world.size // 2
    halves = [list(range(half)), list(range(half, world.size))]
    made = [(dist.new_group(members), dist.new_group(members, backend="nccl")) for members in halves]
    if half < 2:
        pytest.skip("two groups of two take four GPUs")
    mine = world.rank // half if world.rank < 2 * half else 1
    groups = TorchGroups(*made[mine])
    with create_eplb_communicator(groups, config, [torch.zeros(1, device=world.device)]) as communicator:
        size, rank = groups.world_size, groups.rank_in_group
        for value in range(10):
            landed = torch.zeros(1 << 20, device=world.device)
            communicator.add_send(torch.full_like(landed, float(100 * value + world.rank)), (rank + 1) % size)
            communicator.add_recv(landed, (rank - 1) % size)
            communicator.execute()
            assert bool((landed == 100 * value + halves[mine][(rank - 1) % size]).all())


@pytest.mark.parametrize("config", BACKENDS)
def test_profiling_works_before_the_first_transfer(world: World, config: str) -> None:
    weights = [torch.zeros(4, 1 << 20, device=world.device)]
    device_group = dist.new_group(backend="nccl")
    with world.communicator(f"{config}?warm_up=group", device_group) as communicator:
        assert reserve_profile_buffers(communicator, weights) >= 0
        exchange(world, communicator, [1000])


# --- experts ---------------------------------------------------------------------------------------------------------

LAYERS, SLOTS = 3, 8


def expert(layer: int, logical: int) -> float:
    return 1000.0 * layer + logical


def weights_on(device: torch.device) -> list[list[torch.Tensor]]:
    return [
        [torch.full((SLOTS, 513, 33), -1.0, device=device), torch.full((SLOTS, 9), -1.0, device=device)]
        for _ in range(LAYERS)
    ]


def load(weights: list[list[torch.Tensor]], placement: np.ndarray, rank: int) -> None:
    for layer, tensors in enumerate(weights):
        for slot in range(SLOTS):
            for tensor in tensors:
                tensor[slot] = expert(layer, int(placement[layer, rank * SLOTS + slot]))


def check(weights: list[list[torch.Tensor]], placement: np.ndarray, rank: int) -> None:
    for layer, tensors in enumerate(weights):
        for slot in range(SLOTS):
            logical = int(placement[layer, rank * SLOTS + slot])
            for tensor in tensors if logical >= 0 else ():
                assert bool((tensor[slot] == expert(layer, logical)).all()), f"layer {layer}, slot {slot} is wrong"


def placement_of(num_ranks: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    slots = num_ranks * SLOTS
    return np.stack([rng.permutation(np.resize(np.arange(SLOTS + 3), slots)) for _ in range(LAYERS)])


@pytest.mark.parametrize("config", ALL_KINDS)
def test_experts_are_where_the_placement_says_after_every_rearrangement(world: World, config: str) -> None:
    weights = weights_on(world.device)
    old = placement_of(world.size, 0)
    load(weights, old, world.rank)
    with world.communicator(config) as communicator:
        rearranger = Rearranger(communicator, weights, window_bytes=1 << 20)
        for seed in range(1, 6):
            new = placement_of(world.size, seed)
            rearranger.run(old, new)
            check(weights, new, world.rank)
            old = new


@pytest.mark.skipif(not HAS_NCCL4PY, reason="nccl4py is not installed")
def test_half_the_ranks_become_all_and_half_again(world: World) -> None:
    store, half = dist.PrefixStore("elastic", world.environment.store), world.size // 2
    weights = weights_on(world.device)
    small, large, last = placement_of(half, 0), placement_of(world.size, 1), placement_of(half, 2)
    if half == 1:
        small, last = (np.stack([np.arange(SLOTS)] * LAYERS) for _ in range(2))
        large = np.stack([np.tile(np.arange(SLOTS)[::-1], world.size)] * LAYERS)
    stays = {rank: rank for rank in range(half)}
    first = None
    if world.rank < half:
        load(weights, small, world.rank)
        first = create_eplb_communicator(generation_group(store, 0, world.rank, half), "pynccl", weights[0])
    grown = create_eplb_communicator(generation_group(store, 1, world.rank, world.size), "pynccl", weights[0])
    Rearranger(grown, weights).run(remap_placement(small, half, stays, world.size), large)
    if first is not None:
        first.close()
    check(weights, large, world.rank)
    target = remap_placement(last, half, stays, world.size)
    Rearranger(grown, weights).run(large, target)
    grown.close()
    if world.rank < half:
        with create_eplb_communicator(generation_group(store, 2, world.rank, half), "pynccl", weights[0]) as shrunk:
            Rearranger(shrunk, weights).run(last, last[:, ::-1])
        check(weights, last[:, ::-1], world.rank)


# --- failures: last, since they abort NCCL communicators --------------------------------------------------------------


@pytest.mark.parametrize("config", BACKENDS)
def test_a_rank_that_does_not_launch_is_named_and_the_others_go_on(
    world: World, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rank agrees to the transfer and then does not take part, as one that is killed in between."""
    device_group = dist.new_group(backend="nccl")
    last = world.size - 1
    communicator: Any = world.communicator(f"{config}?timeout=3s", device_group)
    landed = torch.zeros(4 << 20, device=world.device)
    communicator.add_send(torch.ones_like(landed), world.after)
    communicator.add_recv(landed, world.before)
    if world.rank == last:
        carrier = communicator._device_exchange if config == "torch_nccl" else communicator._exchange
        monkeypatch.setattr(carrier, "run", lambda *_: None)
        communicator.execute()
    elif last in (world.before, world.after):
        began = time.monotonic()
        with pytest.raises(TransferTimeoutError) as raised:
            communicator.execute()
        assert time.monotonic() - began < 3.0 + 2.0
        assert last in raised.value.peers
        with pytest.raises(CommunicatorClosedError):
            communicator.execute()
    else:
        with contextlib.suppress(TransferError):  # its peers are stuck in the same group
            communicator.execute()
    communicator.close()
    world.meet()
    with world.communicator(config, dist.new_group(backend="nccl")) as following:
        exchange(world, following, [1000, 1 << 20])
