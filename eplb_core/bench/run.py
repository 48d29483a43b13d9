"""Runs a benchmark: checks what was asked, starts the ranks, and puts together what they found."""

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

_MEMORY_SHARE = 0.9  # of what is free; the rest is for the processes themselves


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
        raise InputError("there is no CUDA device here", remedy="give --device cpu")
    if job.window_bytes is not None and job.window_bytes < work.expert_bytes:
        raise InputError(
            f"--window of {job.window_bytes} bytes is smaller than one expert",
            why=f"an expert of this workload has {work.expert_bytes} bytes",
        )
    if not job.timeout_s > 0:
        raise InputError(f"--timeout is {job.timeout_s:g}", why="it has to be above 0 seconds")
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
        on_event: called with a rank and how far it is.

    Raises:
        LocalRankError: a rank failed, or did not end in time.
    """
    outcomes = collect_local_ranks(
        measure_rank, job.workload.num_ranks, (job,), timeout_s=job.timeout_s, on_event=on_event
    )
    return make_document(job, _results(outcomes))


def make_document(job: BenchRun, ranks: Sequence[RankMeasurement]) -> dict[str, Any]:
    """Put together what the ranks found, as plain lists, numbers and texts.

    A step takes as long as on the slowest rank. The first one is left out of the median and of the phases: connections
    and buffers are made in it. A phase's
    seconds are those of the rank that spent most time in it, so that phases overlap and do not add up to the total.

    Args:
        job: what was run.
        ranks: one measurement a rank, in their order.
    """
    work = job.workload
    # A barrier behind a step that takes less than a millisecond would be a good part of what is measured.
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
"""The rearrangement's and the transports' own phases -> the four that every contestant has; all others are waiting."""


def _in_four(phases: dict[str, float]) -> dict[str, float]:
    """Sum the phases up under the names that measurements are compared by."""
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
    # A rank that raised says more than one that died, and both more than those that were ended because of it.
    first = min(failed, key=lambda outcome: (outcome.error is None, outcome.exit_code is None))
    if first.error and not hasattr(errors, first.error):
        print(first.trace, file=sys.stderr)  # no error of ours: whoever mends it needs the place
    raise LocalRankError(
        f"rank {first.rank} failed" + (f" with {first.error}" if first.error else ""),
        rank=first.rank,
        why=first.message,
    )
