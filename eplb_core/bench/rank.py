"""The work of one rank of a benchmark: fill its slots, go through all placements, compare every byte."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from eplb_core.bench.pattern import Progress, fill, find_wrong
from eplb_core.bench.workload import Workload
from eplb_core.control.groups import TorchGroups
from eplb_core.control.plane import ControlPlane
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment
from eplb_core.launch.rank_devices import device_group, rank_device
from eplb_core.rearrange.rearranger import InPlace, Rearranger
from eplb_core.transport.pattern import Pattern

_MOST_NAMED = 5  # of wrong tensors, in messages


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRun:
    """One run: one backend on one workload.

    Attributes:
        workload: the placements to go through.
        backend: a config string.
        device: "cpu" or "cuda"; there, rank r uses GPU r modulo their number.
        window_bytes: staging memory for received experts; None for what the backend's configuration allows.
        in_place: whether experts are received into slots directly.
        timeout_s: the longest that the run may take, in seconds.
    """

    workload: Workload
    backend: str
    device: str = "cpu"
    window_bytes: int | None = None
    in_place: InPlace = "auto"
    timeout_s: float = 1800.0


@dataclass(frozen=True, slots=True)
class Advance:
    """A rank's progress in a stage ("fill", "move" or "check"); sent to the parent."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMeasurement:
    """The measurements of one rank.

    Attributes:
        seconds: wall time of each step on this rank, measured from a barrier of all ranks.
        phases: phase name -> seconds, one dictionary per step.
        experts_moved: experts that crossed between ranks in each step, all ranks together.
        bounded_steps: how many bounded steps each rearrangement took.
        paths: peer rank -> the transport that its bytes took.
        staging_bytes: the most staging memory that the rank held.
        window_bytes: the window that received experts were staged in.
        wrong_tensors: tensors of a slot with a wrong byte at the end.
        examples: the first of them, in words.
        placements_reached: whether every step returned the requested placement.
        config: the canonical config string of the backend.
        device: the rank's device, such as "cuda:1".
        device_name: its name.
    """

    seconds: list[float]
    phases: list[dict[str, float]]
    experts_moved: list[int]
    bounded_steps: list[int]
    paths: dict[int, str]
    staging_bytes: int
    window_bytes: int
    wrong_tensors: int
    examples: list[str] = field(default_factory=list)
    placements_reached: bool
    config: str
    device: str
    device_name: str


def measure_rank(environment: RankEnvironment, job: BenchRun) -> RankMeasurement:
    """Do one rank's part of the run.

    Raises:
        EplbError: the ranks do not agree, or a transfer failed.
    """
    # One thread per rank, as in serving processes that share a host's cores.
    torch.set_num_threads(1)
    rank, work = environment.rank, job.workload
    device = rank_device(job.device, environment)
    weights = [
        [torch.empty(work.slots_per_rank, size, dtype=torch.uint8, device=device) for size in work.tensor_bytes]
        for _ in range(work.num_layers)
    ]
    environment.init_process_group(job.timeout_s)
    # Two ranks on one GPU cannot have an NCCL group; backends that need one then refuse with their reason.
    group = TorchGroups(device_group=device_group(environment, device, job.timeout_s))
    control = ControlPlane(dist.PrefixStore("bench", environment.store), rank, work.num_ranks)
    pattern = Pattern(max(work.tensor_bytes), device)

    with create_eplb_communicator(group, job.backend, weights[0]) as communicator:
        fill(weights, work.local(0, rank), pattern, _reporting(environment, "fill", work.num_layers))
        _synchronize(device)
        # The ranks fill at different speeds: the rearrangement, with its shorter deadlines, must wait for all.
        control.barrier("that every rank has filled its slots", job.timeout_s)
        rearranger = Rearranger(
            communicator,
            weights,
            window_bytes=job.window_bytes,
            in_place=job.in_place,
        )
        seconds: list[float] = []
        phases: list[dict[str, float]] = []
        moved: list[int] = []
        bounded: list[int] = []
        paths: dict[int, str] = {}
        staging_bytes, reached = 0, True
        for step in range(work.num_steps):
            environment.report(Advance("move", step, work.num_steps))
            old, new = work.placements[step], work.placements[step + 1]
            _synchronize(device)
            dist.barrier()
            began = time.perf_counter()
            result = rearranger.run(old, new)
            _synchronize(device)
            seconds.append(time.perf_counter() - began)
            phases.append(dict(result.phases))
            moved.append(result.moved)
            bounded.append(result.steps)
            paths.update(result.paths)
            staging_bytes = max(staging_bytes, result.staging_bytes)
            reached = reached and np.array_equal(result.placement, new)
        config, window_bytes = communicator.binding.config, rearranger.window_bytes
    wrong = find_wrong(weights, work.local(-1, rank), pattern, _reporting(environment, "check", work.num_layers))
    return RankMeasurement(
        seconds=seconds,
        phases=phases,
        experts_moved=moved,
        bounded_steps=bounded,
        paths=paths,
        staging_bytes=staging_bytes,
        window_bytes=window_bytes,
        wrong_tensors=len(wrong),
        examples=[
            f"rank {rank}, layer {layer}, slot {slot}, tensor {tensor}: not the bytes of expert "
            f"{int(work.local(-1, rank)[layer, slot])}"
            for layer, slot, tensor in wrong[:_MOST_NAMED]
        ],
        placements_reached=reached,
        config=config,
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reporting(environment: RankEnvironment, stage: str, total: int) -> Progress:
    environment.report(Advance(stage, 0, total))
    return lambda done, total: environment.report(Advance(stage, done, total))
