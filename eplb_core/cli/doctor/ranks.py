"""The ranks of `eplb doctor`: processes that it starts, or that torchrun started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import msgspec
import torch.distributed as dist

from eplb_core.doctor.links import LinkReport, LinkTest, measure_in_new_rank, measure_links, open_groups
from eplb_core.doctor.machine import Machine
from eplb_core.launch.local_ranks import collect_local_ranks
from eplb_core.launch.torchrun import join_torchrun

_Shared = TypeVar("_Shared")


class Ranks(Protocol):
    """Ranks that measure together. Every rank makes the same calls."""

    world_size: int
    is_first: bool

    def share(self, value: _Shared) -> _Shared:
        """Return the value of rank 0."""
        ...

    def machines(self, here: Machine) -> list[Machine]:
        """Return one machine for each host."""
        ...

    def measure(self, job: LinkTest) -> list[LinkReport]:
        """Return the report of each rank, in rank order."""
        ...

    def leave(self, code: int) -> int:
        """Return the exit code of rank 0, once it has printed everything."""
        ...


class LocalRanks:
    """New local processes for each backend, so that a crash does not affect the next one.

    Args:
        world_size: how many.
        timeout_s: for each backend, in seconds.
    """

    is_first = True

    def __init__(self, world_size: int, timeout_s: float) -> None:
        self.world_size = world_size
        self._timeout_s = timeout_s

    def share(self, value: _Shared) -> _Shared:
        """Return the value unchanged: only one process asks."""
        return value

    def machines(self, here: Machine) -> list[Machine]:
        """Return this machine."""
        return [here]

    def measure(self, job: LinkTest) -> list[LinkReport]:
        """Return the report of each rank; for a dead rank, a report of its death."""
        outcomes = collect_local_ranks(measure_in_new_rank, self.world_size, (job,), timeout_s=self._timeout_s)
        return [
            outcome.result
            if outcome.succeeded
            else LinkReport(outcome.rank, error=outcome.message or f"{outcome.error}, exit code {outcome.exit_code}")
            for outcome in outcomes
        ]

    def leave(self, code: int) -> int:
        """Return the code unchanged."""
        return code


class JoinedRanks:
    """This process among the ranks that torchrun started, on one machine or several.

    Args:
        timeout_s: how long to wait for the slowest rank, in seconds.

    Raises:
        InputError: torchrun's environment is incomplete.
    """

    def __init__(self, timeout_s: float) -> None:
        self._environment, self._control = join_torchrun("doctor", timeout_s)
        self.world_size = self._environment.world_size
        self.is_first = self._environment.rank == 0
        self._timeout_s = timeout_s

    def share(self, value: _Shared) -> _Shared:
        """Return the value of rank 0, which consists of lists, texts and numbers."""
        gathered = self._control.all_gather("what rank 0 says", msgspec.json.encode(value), self._timeout_s)
        first: _Shared = msgspec.json.decode(gathered[0])
        return first

    def machines(self, here: Machine) -> list[Machine]:
        """Return the machine of the first rank on each host."""
        payload = msgspec.json.encode(here if self._environment.local_rank == 0 else None)
        gathered = self._control.all_gather("what the machines are like", payload, self._timeout_s)
        answers = [msgspec.json.decode(each, type=Machine | None) for each in gathered]
        return [answer for answer in answers if answer is not None]

    def measure(self, job: LinkTest) -> list[LinkReport]:
        """Do this rank's part, and return the reports of all ranks."""
        if not dist.is_initialized():
            self._environment.init_process_group(self._timeout_s)
        control = self._control.scoped(f"links/{job.config}")
        report = measure_links(
            self._environment, open_groups(self._environment, job.device, job.timeout_s), control, job
        )
        payload = msgspec.json.encode(report)
        gathered: Sequence[bytes] = self._control.all_gather("the reports", payload, self._timeout_s)
        return [msgspec.json.decode(each, type=LinkReport) for each in gathered]

    def leave(self, code: int) -> int:
        """Return the exit code of rank 0, once it has printed everything."""
        shared = self.share(code)
        if dist.is_initialized():
            dist.destroy_process_group()
        return shared
