"""How fast torch copies from one GPU to the next: the rate that every backend is compared with.

Each rank copies from the device of the rank after it to its own, first one rank at a time, then all at once as in a
rearrangement. On a CPU both ends are host memory.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from eplb_core.launch.local_ranks import RankEnvironment

_SAMPLES = 3


@dataclass(frozen=True)
class Copies:
    """What is copied.

    Attributes:
        device: "cpu" or "cuda"; there rank r has GPU r.
        nbytes: of one copy.
        count: copies of one sample.
        timeout_s: for all of it.
    """

    device: str
    nbytes: int
    count: int
    timeout_s: float


@dataclass(frozen=True)
class Link:
    """What one rank found.

    Attributes:
        device: its device.
        name: the name of that device.
        memory_bytes: what the device has; 0 on a CPU.
        free_bytes: what of it was free.
        reaches: the devices that this one can copy from without the host between them.
        alone_gb_per_s: while the other ranks did nothing.
        together_gb_per_s: while all ranks copied.
        correct: whether the bytes were right.
    """

    device: str
    name: str
    memory_bytes: int
    free_bytes: int
    reaches: list[int]
    alone_gb_per_s: float
    together_gb_per_s: float
    correct: bool


def measure_link(environment: RankEnvironment, copies: Copies) -> Link:
    """Run in each rank."""
    torch.set_num_threads(1)
    environment.init_process_group(copies.timeout_s)
    rank, size = environment.rank, environment.world_size
    following = (rank + 1) % size
    here, there = (torch.device(f"cuda:{each}" if copies.device == "cuda" else "cpu") for each in (rank, following))
    name, free, total, reaches = "cpu", 0, 0, []
    if here.type == "cuda":
        torch.cuda.set_device(here)
        name = torch.cuda.get_device_name(here)
        free, total = torch.cuda.mem_get_info(here)
        reaches = [each for each in range(size) if each != rank and torch.cuda.can_device_access_peer(rank, each)]
    source = torch.empty(copies.nbytes, dtype=torch.uint8, device=there).fill_(following + 1)
    target = torch.zeros(copies.nbytes, dtype=torch.uint8, device=here)

    def synchronize() -> None:
        for device in (here, there):
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def rate() -> float:
        """Return GB/s of one sample."""
        synchronize()
        began = time.perf_counter()
        for _ in range(copies.count):
            target.copy_(source, non_blocking=True)
        synchronize()
        return copies.count * copies.nbytes / (time.perf_counter() - began) / 1e9

    rate()  # mappings are made in it
    alone = 0.0
    for turn in range(size):
        dist.barrier()
        if turn == rank:
            alone = statistics.median(rate() for _ in range(_SAMPLES))
    together = []
    for _ in range(_SAMPLES):
        dist.barrier()
        together.append(rate())
    dist.barrier()
    correct = bool((target == following + 1).all())
    return Link(str(here), name, total, free, reaches, alone, statistics.median(together), correct)
