"""What a background rearrangement costs the work beside it: matrix products on every rank, with and without one.

Every rank multiplies matrices in batches, as an engine serves batches of tokens, and times each. Between batches it
commits the layers that have arrived. Batches alone, beside a job, and beside a job with a pace are measured in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from eplb_core.bench.pattern import fill, find_wrong
from eplb_core.bench.workload import Workload
from eplb_core.control.groups import TorchGroups
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment
from eplb_core.launch.rank_devices import rank_device
from eplb_core.rearrange.rearranger import Rearranger
from eplb_core.transport.pattern import Pattern

MATRICES = {"cpu": (256, 4, torch.float32), "cuda": (4096, 10, torch.bfloat16)}
"""The size of the matrices, how many products make a batch, and their dtype."""

_MOST_JOBS = 200
_BATCHES_AT_LEAST = 5


@dataclass(frozen=True)
class Plan:
    """What the ranks do.

    Attributes:
        workload: the placements that jobs go through, over and over.
        backend: a config string.
        device: "cpu" or "cuda".
        seconds: how long each measurement shall last.
        pace_share: of the rate that a job without a pace reaches; the pace of those that have one.
        timeout_s: for all of it.
    """

    workload: Workload
    backend: str
    device: str
    seconds: float
    pace_share: float
    timeout_s: float


@dataclass
class Batches:
    """Seconds of each batch beside jobs, and what those jobs did.

    Attributes:
        seconds: of each batch.
        jobs: rearrangements.
        job_s: seconds from the start to the end of all of them.
        engine_s: of these, what the engine's thread spent in start, commit and wait.
        received: bytes that this rank received.
    """

    seconds: list[float] = field(default_factory=list)
    jobs: int = 0
    job_s: float = 0.0
    engine_s: float = 0.0
    received: int = 0


@dataclass(frozen=True)
class Found:
    """What one rank measured, and how many tensors held wrong bytes in the end."""

    alone: Batches
    background: Batches
    paced: Batches
    pace: float
    wrong: int


class Engine:
    """Multiplies matrices."""

    def __init__(self, device: torch.device) -> None:
        size, self._products, dtype = MATRICES[device.type]
        self._device = device
        self._matrices = [torch.randn(size, size, device=device).to(dtype) for _ in range(2)]
        self._product = torch.empty_like(self._matrices[0])

    def batch(self) -> float:
        """Run one batch to its end, and return its seconds."""
        began = time.perf_counter()
        for _ in range(self._products):
            torch.matmul(*self._matrices, out=self._product)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # of this stream, not of the job's
        return time.perf_counter() - began


class Beside:
    """One rank's engine and rearranger, and the placement that it has come to."""

    def __init__(self, engine: Engine, rearranger: Rearranger, workload: Workload) -> None:
        self._engine = engine
        self._rearranger = rearranger
        self._placements = workload.placements
        self.at = 0

    def alone(self, into: Batches, seconds: float) -> None:
        """Run batches with nothing beside them."""
        dist.barrier()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            into.seconds.append(self._engine.batch())
        dist.barrier()

    def job(self, into: Batches, pace: float | None) -> None:
        """Run batches beside one rearrangement."""
        old, self.at = self.at, (self.at + 1) % len(self._placements)
        dist.barrier()
        began = time.perf_counter()
        job = self._rearranger.start(self._placements[old], self._placements[self.at], pace=pace)
        into.engine_s += time.perf_counter() - began
        while not job.received:
            into.seconds.append(self._engine.batch())
            paused = time.perf_counter()
            for layer in job.ready_layers():
                job.commit(layer)
            into.engine_s += time.perf_counter() - paused
        paused = time.perf_counter()
        job.wait()
        ended = time.perf_counter()
        into.engine_s += ended - paused
        into.job_s += ended - began
        into.received += job.progress[1]
        into.jobs += 1


def measure(environment: RankEnvironment, plan: Plan) -> Found:
    """Run in each rank."""
    torch.set_num_threads(1)
    environment.init_process_group(plan.timeout_s)
    work, rank = plan.workload, environment.rank
    device = rank_device(plan.device, environment)
    weights = [
        [torch.empty(work.slots_per_rank, size, dtype=torch.uint8, device=device) for size in work.tensor_bytes]
        for _ in range(work.num_layers)
    ]
    pattern = Pattern(max(work.tensor_bytes), device)
    fill(weights, work.local(0, rank), pattern, lambda done, total: None)
    engine = Engine(device)
    for _ in range(_BATCHES_AT_LEAST):
        engine.batch()
    alone, background, paced, first = Batches(), Batches(), Batches(), Batches()
    with create_eplb_communicator(TorchGroups(), plan.backend, weights[0]) as communicator:
        beside = Beside(engine, Rearranger(communicator, weights), work)
        beside.job(first, None)  # connections and buffers are made in it
        beside.alone(alone, plan.seconds / 2)
        beside.job(background, None)
        for _ in range(_same_on_all(plan.seconds / background.job_s) - 1):
            beside.job(background, None)
        beside.alone(alone, plan.seconds / 2)
        rate = background.received / background.job_s
        pace = float(_from_rank_0(max(plan.pace_share * rate, 1e6)))
        beside.job(paced, pace)
        for _ in range(_same_on_all(plan.seconds / paced.job_s) - 1):
            beside.job(paced, pace)
        beside.alone(alone, plan.seconds / 2)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wrong = find_wrong(weights, work.local(beside.at, rank), pattern, lambda done, total: None)
    return Found(alone, background, paced, pace, len(wrong))


def _from_rank_0(number: float) -> float:
    """Return rank 0's number: all ranks have to ask for the same."""
    shared = torch.tensor([number], dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared.item())


def _same_on_all(jobs: float) -> int:
    return max(1, min(_MOST_JOBS, round(_from_rank_0(jobs))))


def summarize(found: Sequence[Found], paced: bool) -> dict[str, Any]:
    """Return how much longer a batch takes beside jobs; of all ranks the one that suffers most counts.

    Fields: `batch_alone_s`, `batch_s` and `batch_p99_s` of that rank, `slowdown` (of the mean batch: 0.1 is 10 %
    longer), `slowdown_median`, `slowdown_p99`, `engine_share` (of a job's time that the engine's thread spent in
    start, commit and wait), `gb_per_s` (received, mean of the ranks), `jobs`, `batches`, `pace` (bytes a second).
    """

    def beside(rank: Found) -> Batches:
        return rank.paced if paced else rank.background

    short = [rank for rank in found if not beside(rank).seconds]
    if short:
        raise ValueError("jobs ended before a single batch did: give a larger workload")
    compared = []
    for rank in found:
        mine, alone = beside(rank), rank.alone
        compared.append(
            {
                "batch_alone_s": statistics.median(alone.seconds),
                "batch_s": statistics.median(mine.seconds),
                "batch_p99_s": _p99(mine.seconds),
                "slowdown": statistics.fmean(mine.seconds) / statistics.fmean(alone.seconds) - 1,
                "slowdown_median": statistics.median(mine.seconds) / statistics.median(alone.seconds) - 1,
                "slowdown_p99": _p99(mine.seconds) / _p99(alone.seconds) - 1,
                "engine_share": mine.engine_s / mine.job_s,
                "jobs": mine.jobs,
                "batches": len(mine.seconds),
            }
        )
    worst = max(compared, key=lambda each: each["slowdown"])
    rates = [beside(rank).received / beside(rank).job_s / 1e9 for rank in found]
    return worst | {"gb_per_s": statistics.fmean(rates), "pace": found[0].pace if paced else None}


def _p99(seconds: Sequence[float]) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(0.99 * len(seconds)))]
