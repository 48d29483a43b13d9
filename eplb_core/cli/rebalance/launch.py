"""Runs the ranks of `eplb rebalance`: as local processes that it starts, or under torchrun."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
import msgspec

from eplb_core import errors
from eplb_core.cli.output import exit_code_of, one_line
from eplb_core.cli.progress import StageBars
from eplb_core.cli.rebalance.rank import RankResult, StageProgress, run_rank
from eplb_core.cli.rebalance.request import RebalanceTask
from eplb_core.control.agreement import all_say, failed_ranks
from eplb_core.errors import EplbError, InputError
from eplb_core.inputs.checkpoint import Checkpoint
from eplb_core.inputs.checkpoint_wire import decode_checkpoint, encode_checkpoint
from eplb_core.launch.local_ranks import LocalRankError, collect_local_ranks
from eplb_core.launch.memory import free_memory
from eplb_core.launch.torchrun import join_torchrun

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

_STAGES = {"read": "read weights", "move": "move experts", "verify": "compare bytes"}
_MEMORY_SHARE = 0.9  # of free memory; the rest is for the processes themselves


_MOST_CHECKPOINTS = 2  # one to move, and one to compare with


class RefusedError(EplbError):
    """The ranks agreed that they cannot begin. Rank 0 has reported why. `exit_code` is for all ranks."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__("the input was refused")


def run_local(job: RebalanceTask, console: Console) -> list[RankResult]:
    """Start the job's ranks as local processes, and return their results.

    Raises:
        InputError: the weights do not fit into memory.
        LocalRankError: a rank failed, or did not finish in time.
    """
    check_memory(job, job.num_ranks)
    with StageBars(console, _STAGES, job.num_ranks, heard_ranks=job.num_ranks) as bars:

        def show(rank: int, event: StageProgress) -> None:
            bars.update(rank, event.stage, event.done, event.total)

        try:
            outcomes = collect_local_ranks(run_rank, job.num_ranks, (job,), timeout_s=job.timeout_s, on_event=show)
        except KeyboardInterrupt:
            _report_interruption(bars, console)
            raise
    failed = [outcome for outcome in outcomes if not outcome.succeeded]
    if failed:
        # A rank that raised is more informative than one that died; ranks terminated as a consequence come last.
        first = min(failed, key=lambda outcome: (outcome.error is None, outcome.exit_code is None))
        if first.trace and _traceback_wanted():
            print(first.trace, file=sys.stderr)
        kind = getattr(errors, first.error or "", None)
        if isinstance(kind, type) and issubclass(kind, errors.ConfigError | errors.BackendError):
            raise InputError(first.message)  # no rank got as far as moving anything
        raise LocalRankError(
            f"rank {first.rank} failed" + (f" with {first.error}" if first.error else ""),
            rank=first.rank,
            why=first.message,
        )
    return [outcome.result for outcome in outcomes]


def _traceback_wanted() -> bool:
    """Whether `eplb --traceback` was given."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.find_root().params.get("traceback"))


def _report_interruption(bars: StageBars, console: Console) -> None:
    """Say how far the job came. Its ranks are gone by now, and their weights with them."""
    from eplb_core.cli.rebalance.report import format_bytes

    moved = bars.done("move")
    text = f"{format_bytes(moved)} had been received" if moved else "no expert had been moved"
    console.print(f"interrupted: {text}; the ranks have ended, and no file was written", markup=False)


class JoinedRanks:
    """This process among the ranks that torchrun started, on one machine or several."""

    def __init__(self, timeout_s: float) -> None:
        """Connect to the other ranks. Raises `InputError` if torchrun's environment is incomplete."""
        self.environment, self._control = join_torchrun("rebalance/input", timeout_s)
        self.world_size = self.environment.world_size
        self.is_first = self.environment.rank == 0
        self._timeout_s = 0.0
        self._num_opened = 0

    @property
    def num_nodes(self) -> int:
        """The number of machines, judged by torchrun's environment."""
        return max(1, self.world_size // self.environment.local_world_size)

    def open_checkpoint(self, directory: Path, part: str | None) -> Checkpoint:
        """Open a checkpoint on rank 0; it sends the others the location of the experts, so that they read no header.

        Raises:
            InputError: rank 0 could not open it, or this rank does not see the same files.
        """
        name = f"checkpoint {self._num_opened}"
        if self.is_first:
            checkpoint = Checkpoint.open(directory, part)
            self._control.publish(name, encode_checkpoint(checkpoint))
            self._num_opened += 1
            return checkpoint
        self._num_opened += 1
        payload = self._control.fetch(0, name, self._timeout_s)
        if not payload:
            raise InputError("rank 0 could not open the checkpoint", where=str(directory))
        return decode_checkpoint(payload)

    def agree(self, prepare: Callable[[], RebalanceTask], timeout_s: float) -> RebalanceTask:
        """Prepare the job on every rank; continue only if all succeeded and read the same input.

        Raises:
            RefusedError: a rank failed to prepare; rank 0 has printed the reason.
        """
        job, digest, refusal, code = None, "", "", 0
        self._timeout_s = timeout_s
        try:
            job = prepare()
            # It is unknown here how many ranks share a GPU: under torchrun each rank may see a different one.
            check_memory(job, self.environment.local_world_size if job.device == "cpu" else 1)
            digest = job.digest()
        except EplbError as error:
            refusal, code = one_line(error), exit_code_of(error)
            while self.is_first and self._num_opened < _MOST_CHECKPOINTS:  # so that no rank waits for them
                self._control.publish(f"checkpoint {self._num_opened}", b"")
                self._num_opened += 1
        said = msgspec.json.encode((code, digest))
        answers = all_say(self._control, "the input", timeout_s, value=said, problem=refusal)
        told = [msgspec.json.decode(answer.value, type=tuple[int, str]) for answer in answers]
        refusals = [(rank, told[rank][0], answers[rank].problem) for rank in failed_ranks(answers)]
        if not refusals and len(set(told)) > 1:
            other = next(rank for rank, each in enumerate(told) if each != told[0])
            refusals = [(other, 2, f"rank {other} has read different loads, placements or weights than rank 0")]
        if job is None or refusals:
            rank, code, message = refusals[0]
            if self.is_first:
                where = f"rank {rank}: " if len(refusals) < self.world_size else ""
                print(f"error: {where}{message}", file=sys.stderr, flush=True)
            # torchrun terminates all ranks as soon as one exits, so rank 0 must have printed the reason before.
            self._control.barrier("that rank 0 has reported why", timeout_s)
            raise RefusedError(code)
        return job

    def run(self, job: RebalanceTask, console: Console) -> list[RankResult]:
        """Do this rank's part, and return the results of all ranks.

        Raises:
            EplbError: the ranks do not agree, or a transfer failed.
        """
        with StageBars(console, _STAGES, self.world_size, heard_ranks=1) as bars:

            def show(event: StageProgress) -> None:
                if self.is_first:
                    bars.update(0, event.stage, event.done, event.total)

            result = run_rank(self.environment, job, show)
        payload = json.dumps(asdict(result)).encode()
        gathered = self._control.all_gather("the results", payload, job.timeout_s)
        return [RankResult(**json.loads(text)) for text in gathered]

    def share_exit_code(self, code: int, timeout_s: float) -> int:
        """Return the exit code of rank 0 on every rank, once it has written its files."""
        return int(self._control.all_gather("the exit code", str(code).encode(), timeout_s)[0])


def check_memory(job: RebalanceTask, ranks_here: int) -> None:
    """Raise `InputError` if the weights of `ranks_here` ranks do not fit into this machine's free memory."""
    ranks, free, where = ranks_here, _free_bytes(), "memory"
    if job.device == "cuda":
        import torch

        gpus = torch.cuda.device_count()
        ranks, where = -(-ranks_here // gpus), "memory on a GPU"
        free = min(torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus))
    needed = ranks * job.rank_bytes
    if needed > _MEMORY_SHARE * free:
        raise InputError(
            f"the weights of {ranks} ranks need {needed / 1e9:.1f} GB of {where}, but {free / 1e9:.1f} GB are free",
            remedy="give --layers COUNT for fewer layers, or --scale with --model",
        )


def _free_bytes() -> int:
    return free_memory()
