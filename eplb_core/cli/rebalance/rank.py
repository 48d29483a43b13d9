"""The work of one rank of `eplb rebalance`: load its slots, rearrange them, compare every byte with the source."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eplb_core.cli.rebalance.request import RebalanceTask
from eplb_core.inputs.slots import allocate_slots, check_slots, fill_slots

if TYPE_CHECKING:
    import torch

    from eplb_core.control.plane import ControlPlane
    from eplb_core.launch.local_ranks import RankEnvironment
    from eplb_core.rearrange.rearranger import Rearranger
    from eplb_core.rearrange.result import RearrangeResult

EVENT_INTERVAL_S = 0.1
_MOST_NAMED = 5  # of wrong slots, in messages


@dataclass(frozen=True, slots=True)
class StageProgress:
    """The progress of a rank; sent to the parent a few times a second.

    Attributes:
        stage: "read", "move" or "verify".
        done: bytes.
        total: bytes.
    """

    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """The result of one rank.

    Attributes:
        seconds: of the rearrangement alone.
        staging_bytes: the most staging memory that the rank held.
        phases: phase name -> seconds.
        checked_slots: slots that were compared with their source.
        checked_bytes: bytes that were compared.
        wrong_slots: slots whose bytes differ from their source's.
        examples: the first wrong slots, in words.
        placement_reached: whether the requested placement was reached.
        backend: the canonical config string of the backend.
    """

    seconds: float
    staging_bytes: int
    phases: dict[str, float] = field(default_factory=dict)
    checked_slots: int = 0
    checked_bytes: int = 0
    wrong_slots: int = 0
    examples: list[str] = field(default_factory=list)
    placement_reached: bool = False
    backend: str = ""


def run_rank(
    environment: RankEnvironment,
    job: RebalanceTask,
    report: Callable[[StageProgress], None] | None = None,
) -> RankResult:
    """Do one rank's part of the job.

    Args:
        environment: which rank this is.
        job: what to do; the same on every rank.
        report: takes the progress; by default it goes to the parent process.

    Raises:
        EplbError: the ranks do not agree, or a transfer failed.
    """
    import torch.distributed as dist

    from eplb_core.control.groups import TorchGroups
    from eplb_core.control.plane import ControlPlane
    from eplb_core.factory.create import create_eplb_communicator
    from eplb_core.launch.rank_devices import device_group, rank_device
    from eplb_core.rearrange.rearranger import Rearranger

    report = report or environment.report
    rank = environment.rank
    source, truth = job.weights, job.truth
    device = rank_device(job.device, environment)
    weights = allocate_slots(source, job.layers, job.slots_per_rank, device)
    environment.init_process_group(job.timeout_s)
    group = TorchGroups(device_group=device_group(environment, device, job.timeout_s))
    store = dist.PrefixStore("rebalance/rank", environment.store)
    control = ControlPlane(store, rank, environment.world_size)
    with create_eplb_communicator(group, job.backend, weights[0]) as communicator:
        fill_slots(weights, source, job.layers, job.local(job.old, rank), _throttled(report, "read"))
        # Reading takes longer on some machines: the rearrangement, with its shorter deadlines, must wait for all.
        control.barrier("that every rank has read its weights", job.timeout_s)
        rearranger = Rearranger(
            communicator, weights, window_bytes=job.window_bytes, node_of_rank=list(job.node_of_rank)
        )
        advance = _throttled(report, "move")
        if job.bytes_per_s is None:
            result = rearranger.run(job.old, job.new, verify=job.verify, progress=advance)
        else:
            result = _run_paced(rearranger, job, weights, control, advance)
        control.barrier("that every rank has moved its experts", job.timeout_s)
    check = check_slots(weights, truth, job.layers, job.local(job.new, rank), _throttled(report, "verify"))
    return RankResult(
        seconds=result.seconds,
        staging_bytes=result.staging_bytes,
        phases=dict(result.phases),
        checked_slots=check.num_slots,
        checked_bytes=check.num_bytes,
        wrong_slots=len(check.wrong),
        examples=[
            f"rank {rank}, layer {job.layer_names[row]}, slot {slot}: "
            f"{name} is not that of expert {int(job.local(job.new, rank)[row, slot])}"
            for row, slot, name in check.wrong[:_MOST_NAMED]
        ],
        placement_reached=bool(np.array_equal(result.placement, job.new)),
        backend=communicator.binding.config,
    )


def _run_paced(
    rearranger: Rearranger,
    job: RebalanceTask,
    weights: Sequence[Sequence[torch.Tensor]],
    control: ControlPlane,
    advance: Callable[[int, int], None],
) -> RearrangeResult:
    """Let a background job receive at the job's pace, and commit what is ready meanwhile."""
    from eplb_core.errors import TransferError
    from eplb_core.rearrange.verify import check_end, expected_checksums, slot_checksums
    from eplb_core.rearrange.weights import ExpertWeights

    def checksums() -> NDArray[np.int64]:
        sample = job.verify == "sample"
        return slot_checksums(ExpertWeights(weights), control, sample=sample, stream=None, timeout_s=job.timeout_s)

    # A job does not compare checksums itself: the engine uses the weights while it runs.
    expected = None if job.verify == "off" else expected_checksums(job.old, checksums())
    background = rearranger.start(job.old, job.new, pace=job.bytes_per_s)
    while not background.received:
        advance(*background.progress)
        try:
            background.wait(EVENT_INTERVAL_S)
        except TransferError:  # one of them is a TimeoutError too
            raise
        except TimeoutError:
            continue
    result = background.wait(job.timeout_s)
    advance(*background.progress)
    if expected is not None:
        check_end(result.placement, checksums(), expected, job.slots_per_rank)
    return result


def _throttled(report: Callable[[StageProgress], None], stage: str) -> Callable[[int, int], None]:
    """Return a function that reports bytes done, but not more often than anyone can see."""
    last = 0.0

    def advance(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last >= EVENT_INTERVAL_S:
            last = now
            report(StageProgress(stage, done, total))

    return advance
