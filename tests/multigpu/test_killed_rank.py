"""A rank is killed in the middle of transfers between GPUs, one rank on each; it starts its own processes.

    python -m pytest -m gpu tests/multigpu/test_killed_rank.py

torchrun ends all ranks when one dies, so this must not run under it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.control.groups import TorchGroups
from eplb_core.errors import TransferError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment, collect_local_ranks
from tests.multigpu.engine_nccl import EngineNccl, why_not

GPUS = torch.cuda.device_count()
TIMEOUT_S, MARGIN_S = 5.0, 2.0
DIES_AFTER_S = 0.5
LIMIT_S = 90.0
NBYTES = 8 << 20

takes_gpus = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"a rank on each of several GPUs: torch sees {GPUS}"),
    pytest.mark.skipif("RANK" in os.environ, reason="torchrun would end all ranks with the one that is killed"),
]


def needs(module: str, package: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{package} is not installed")


CASES = [
    pytest.param("cuda", "torch_nccl", marks=takes_gpus),
    pytest.param("cuda", "pynccl?communicator=own", marks=[*takes_gpus, needs("nccl", "nccl4py")]),
    pytest.param(
        "cuda",
        "pynccl?communicator=engine",
        marks=[*takes_gpus, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")],
    ),
    pytest.param("cuda", "nixl", marks=[*takes_gpus, needs("nixl", "the nixl extra")]),
    pytest.param("cpu", "torch_gloo", marks=pytest.mark.nightly),  # shows that the test itself works
]


@dataclass
class Told:
    """What a survivor says: what was raised, and how long the call took that raised it."""

    error: str
    names_the_victim: bool
    seconds: float
    goes_on: bool = False


class Member:
    """One rank, in one generation of the group after the other."""

    def __init__(self, environment: RankEnvironment, kind: str, config: str) -> None:
        self.store = environment.store
        self.device = torch.device(kind, environment.local_rank if kind == "cuda" else None)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        self.config = f"{config}{'&' if '?' in config else '?'}timeout={TIMEOUT_S:g}s"
        self.engine: EngineNccl | None = None

    def join(self, generation: int, rank: int, size: int) -> EplbCommunicator:
        """Return a communicator of new process groups."""
        self.rank, self.size = rank, size
        store = dist.PrefixStore(f"generation {generation}", self.store)
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        device_group = dist.new_group(backend="nccl") if self.device.type == "cuda" else None
        carried = None
        if "communicator=engine" in self.config:
            self.engine = EngineNccl(dist.PrefixStore("engine", store), rank, size, self.device)
            carried = SimpleNamespace(pynccl_comm=self.engine)
        groups = TorchGroups(device_group=device_group, device_communicator=carried)
        communicator = create_eplb_communicator(groups, self.config, [torch.zeros(1, device=self.device)])
        self.sent = torch.zeros(NBYTES, dtype=torch.uint8, device=self.device)
        self.landed = {other: torch.zeros_like(self.sent) for other in range(size) if other != rank}
        communicator.register([self.sent, *self.landed.values()])
        return communicator

    def leave(self, communicator: EplbCommunicator) -> None:
        """Close what a failure left; an engine aborts its own communicator."""
        communicator.close()
        if self.engine is not None:
            self.engine.abort()

    def exchange(self, communicator: EplbCommunicator, value: int) -> bool:
        """Send a tensor to every other rank; return whether theirs have arrived."""
        self.sent.fill_((31 * self.rank + value) % 251)
        for other, tensor in self.landed.items():
            communicator.add_send(self.sent, other)
            communicator.add_recv(tensor, other)
        communicator.execute()
        return all(bool((tensor == (31 * other + value) % 251).all()) for other, tensor in self.landed.items())


def exchange_until_one_dies(environment: RankEnvironment, kind: str, config: str) -> Told:
    """Run in each rank; the last one is killed while all of them exchange tensors."""
    torch.set_num_threads(1)
    rank, size = environment.rank, environment.world_size
    victim = size - 1
    member = Member(environment, kind, config)
    communicator = member.join(0, rank, size)
    assert member.exchange(communicator, 0)
    dist.barrier()
    if rank == victim:
        timer = threading.Timer(DIES_AFTER_S, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    end = time.monotonic() + LIMIT_S / 3
    value, told = 0, Told("", False, 0.0)
    while not told.error and time.monotonic() < end:
        value += 1
        began = time.monotonic()
        try:
            assert member.exchange(communicator, value)
        except TransferError as error:
            text = f"{type(error).__name__}: {error}"
            told = Told(text, victim in error.peers, time.monotonic() - began)
    with contextlib.suppress(TransferError):
        member.leave(communicator)
    following = member.join(1, rank, size - 1)
    told.goes_on = member.exchange(following, 7)
    following.close()
    return told


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize(("kind", "config"), CASES)
def test_survivors_of_a_killed_rank_name_it_in_time_and_go_on_without_it(kind: str, config: str) -> None:
    ranks = GPUS if kind == "cuda" else 3
    outcomes = collect_local_ranks(exchange_until_one_dies, ranks, (kind, config), timeout_s=LIMIT_S, grace_s=LIMIT_S)
    *survivors, victim = outcomes
    assert victim.exit_code == -signal.SIGKILL, victim.trace or victim.message
    for outcome in survivors:
        assert outcome.succeeded, outcome.trace or outcome.message
        assert outcome.result.error, "nothing was raised"
        assert outcome.result.names_the_victim, outcome.result.error
        assert outcome.result.seconds < TIMEOUT_S + MARGIN_S, outcome.result.error
        assert outcome.result.goes_on
