"""Runs a benchmark: checks the job, starts the ranks, and combines their results."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from eplb_core import __version__, errors
from eplb_core.bench.rank import Advance, BenchRun, RankMeasurement, measure_rank
from eplb_core.errors import BackendUnavailableError, InputError
from eplb_core.extras import require
from eplb_core.launch.local_ranks import LocalRankError, Outcome, collect_local_ranks
from eplb_core.launch.memory import free_memory
from eplb_core.registry.registry import default_registry

_MEMORY_SHARE = 0.9  # of free memory; the rest is for the processes themselves


def check_job(job: BenchRun) -> None:
    """Raise if the run cannot work, before a process is started.

    Raises:
        ConfigError: the config string, or an option in it, is wrong.
        BackendError: the backend cannot be selected, or does not move tensors of this device.
        InputError: there is no such device, too little memory, a window smaller than an expert, or no psutil.
    """
    require("cli", "a benchmark")

    work = job.workload
    if job.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available", remedy="give --device cpu")
    if job.window_bytes is not None and job.window_bytes < work.expert_bytes:
        raise InputError(
            f"--window of {job.window_bytes} bytes is smaller than one expert",
            why=f"an expert of this workload has {work.expert_bytes} bytes",
        )
    if not job.timeout_s > 0:
        raise InputError(f"--timeout is {job.timeout_s:g}", why="it must be above 0 seconds")
    entry = default_registry().resolve(job.backend).entry
    if entry is not None:
        own_gpu = job.device == "cuda" and torch.cuda.device_count() >= work.num_ranks
        reason = (
            entry.spec.capabilities.unfit(job.device, stateless=False, has_device_group=own_gpu) if entry.spec else ""
        )
        if reason:
            raise BackendUnavailableError(f"backend {entry.name!r} cannot be used here", name=entry.name, why=reason)
    free = free_memory()
    needed = work.num_ranks * work.rank_bytes
    if job.device == "cpu" and needed > _MEMORY_SHARE * free:
        raise InputError(
            f"the weights of {work.num_ranks} ranks need {needed / 1e9:.1f} GB of memory, "
            f"but {free / 1e9:.1f} GB are free",
            remedy="give fewer layers, slots or ranks, or smaller experts",
        )


def run_bench(job: BenchRun, on_event: Callable[[int, Advance], None] | None = None) -> dict[str, Any]:
    """Run the job on local ranks and return its document (see `make_document`).

    Args:
        job: what to run; `check_job` has accepted it.
        on_event: called with a rank and its progress.

    Raises:
        LocalRankError: a rank failed, or did not finish in time.
    """
    outcomes = collect_local_ranks(
        measure_rank, job.workload.num_ranks, (job,), timeout_s=job.timeout_s, on_event=on_event
    )
    return make_document(job, _results(outcomes))


def make_document(job: BenchRun, ranks: Sequence[RankMeasurement]) -> dict[str, Any]:
    """Combine the measurements of the ranks into plain lists, numbers and texts.

    The time of a step is that of the slowest rank. The first step does not count in the median and the phases:
    connections and buffers are created in it. A phase's seconds are those of the rank that spent most time in it, so
    phases overlap and do not add up to the total.

    Args:
        job: what was run.
        ranks: one measurement per rank, in rank order.
    """
    work = job.workload
    # A barrier after a step of less than a millisecond would be a large part of the measured time.
    seconds = [max(step) for step in zip(*(rank.seconds for rank in ranks), strict=True)]
    median, moved = statistics.median(seconds[1:] or seconds), work.arriving_bytes()
    wrong = sum(rank.wrong_tensors for rank in ranks)
    phases = _phases(ranks)
    return {
        "backend": job.backend,
        "device": job.device,
        "ranks": work.num_ranks,
        "layers": work.num_layers,
        "seconds_median": median,
        "seconds_min": min(seconds),
        "seconds_first": seconds[0],
        "bytes_moved": moved,
        "gb_per_s": moved / median / 1e9,
        "correct": wrong == 0 and all(rank.placements_reached for rank in ranks),
        "wrong_tensors": wrong,
        "staging_bytes_max": max(rank.staging_bytes for rank in ranks),
        "phases": _in_four(phases),
        "phases_in_detail": phases,
        "paths": {
            str(rank): {str(peer): path for peer, path in sorted(found.paths.items())}
            for rank, found in enumerate(ranks)
        },
        "examples": [example for rank in ranks for example in rank.examples],
        "config": ranks[0].config,
        "window_bytes": job.window_bytes,
        "staging_window_bytes": ranks[0].window_bytes,
        "slots": work.slots_per_rank,
        "expert_bytes": work.expert_bytes,
        "steps": work.num_steps,
        "seconds": seconds,
        "experts_moved": ranks[0].experts_moved,
        "bounded_steps": ranks[0].bounded_steps,
        "devices": [rank.device for rank in ranks],
        "device_name": ranks[0].device_name,
        "cpus": os.cpu_count(),
        "versions": _versions(),
    }


def _phases(ranks: Sequence[RankMeasurement]) -> dict[str, float]:
    steps = range(len(ranks[0].phases))[1:] or range(1)
    names = dict.fromkeys(name for rank in ranks for phases in rank.phases for name in phases)
    return {
        name: statistics.median(max(rank.phases[step].get(name, 0.0) for rank in ranks) for step in steps)
        for name in names
    }


_FOUR = {"plan": "plan", "queue": "pack", "pack": "pack", "unpack": "commit", "commit": "commit"}
"""Phases of the rearrangement and the transports -> the four that every contestant has; all others are waiting."""


def _in_four(phases: dict[str, float]) -> dict[str, float]:
    """Sum the phases under the names used for comparisons."""
    four = dict.fromkeys(("plan", "pack", "wait", "commit"), 0.0)
    for name, seconds in phases.items():
        four[_FOUR.get(name, "wait")] += seconds
    return four


def _versions() -> dict[str, str]:
    found = {"eplb": __version__, "python": platform.python_version()}
    for name in ("torch", "nixl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _results(outcomes: Sequence[Outcome]) -> list[RankMeasurement]:
    failed = [outcome for outcome in outcomes if not outcome.succeeded]
    if not failed:
        return [outcome.result for outcome in outcomes]
    # A rank that raised is more informative than one that died; ranks terminated as a consequence come last.
    first = min(failed, key=lambda outcome: (outcome.error is None, outcome.exit_code is None))
    if first.error and not hasattr(errors, first.error):
        print(first.trace, file=sys.stderr)  # a foreign error: the traceback is needed to fix it
    raise LocalRankError(
        f"rank {first.rank} failed" + (f" with {first.error}" if first.error else ""),
        rank=first.rank,
        why=first.message,
    )
