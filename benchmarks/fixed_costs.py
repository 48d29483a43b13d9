#!/usr/bin/env python3
"""What a rearrangement costs that moves little: its time, its messages to the store, and its calls of Python.

    python benchmarks/fixed_costs.py --backend nixl torch_gloo

Time differs from machine to machine; messages and calls do not. Each is of one rank and one rearrangement, the median
of many after the first few: `same` asks for the same placements every time, `new` for others each time.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from eplb_core.bench.workload import Workload, make_workload
from eplb_core.control.groups import TorchGroups
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment, run_local_ranks
from eplb_core.launch.rank_devices import device_group, rank_device
from eplb_core.rearrange.rearranger import Rearranger

_MESSAGES = ("set", "get", "add", "wait", "check", "compare_set", "multi_get", "delete_key")
_FIRST, _PROFILED = 5, 5  # rearrangements that are left out, and those whose calls are counted


@dataclass(frozen=True)
class Costs:
    """What one rank found.

    Attributes:
        seconds: of each rearrangement.
        phases: name -> median seconds.
        messages: kind -> messages to the store a rearrangement.
        calls: calls of Python functions a rearrangement.
    """

    seconds: list[float]
    phases: dict[str, float]
    messages: dict[str, float]
    calls: float


def count_messages(counted: Counter[str]) -> None:
    """Count what this process asks stores from now on. A prefix store asks the one below it: only that counts."""
    below = dist.PrefixStore

    def counting(name: str, kind: Any) -> Callable[..., object]:
        asked = getattr(kind, name)

        def ask(self: dist.Store, *arguments: object, **named: object) -> object:
            counted[name] += 1
            return asked(self, *arguments, **named)

        return ask

    for name in _MESSAGES:
        setattr(below, name, counting(name, below))


def measure(environment: RankEnvironment, backend: str, device_kind: str, work: Workload) -> Costs:
    """Run in each rank."""
    torch.set_num_threads(1)
    device = rank_device(device_kind, environment)
    weights = [
        [torch.zeros(work.slots_per_rank, size, dtype=torch.uint8, device=device) for size in work.tensor_bytes]
        for _ in range(work.num_layers)
    ]
    environment.init_process_group(300.0)
    counted: Counter[str] = Counter()
    group = TorchGroups(device_group=device_group(environment, device, 300.0))
    with create_eplb_communicator(group, backend, weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights)
        pairs = list(zip(work.placements[:-1], work.placements[1:], strict=True))
        seconds, phases = [], []
        for number, (old, new) in enumerate(pairs):
            if number == _FIRST:
                count_messages(counted)
            dist.barrier()
            began = time.perf_counter()
            result = rearranger.run(old, new)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
            phases.append(result.phases)
        asked = {name: count / (len(pairs) - _FIRST) for name, count in counted.items()}
        profile = cProfile.Profile()
        for number in range(_PROFILED):
            old, new = work.placements[[-1, -2] if number % 2 == 0 else [-2, -1]]
            profile.enable()
            rearranger.run(old, new)
            profile.disable()
        calls = pstats.Stats(profile).total_calls / _PROFILED  # type: ignore[attr-defined]
    return Costs(
        seconds[_FIRST:],
        {name: statistics.median(each.get(name, 0.0) for each in phases[_FIRST:]) for name in phases[-1]},
        asked,
        calls,
    )


def workload(given: argparse.Namespace, swaps: int, repeated: bool) -> Workload:
    """Return the placements to go through: there and back between two, or on and on."""
    sizes = {"ranks": given.ranks, "layers": given.layers, "slots": given.slots, "expert_bytes": given.expert_bytes}
    work = make_workload(**sizes, redundant=4, steps=1 if repeated else given.steps, swaps=swaps)
    if repeated:
        work = Workload(work.placements[np.arange(given.steps + 1) % 2], work.tensor_bytes, work.num_ranks)
    return work


def main() -> None:
    """Print one line for each backend and number of swaps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", default=["torch_gloo"], metavar="CONFIG")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--expert-bytes", type=int, default=147_456)
    parser.add_argument("--steps", type=int, default=105)
    parser.add_argument("--swaps", type=int, nargs="+", default=[0, 1, 20])
    given = parser.parse_args()
    print("backend | swaps | placements | median | fastest | messages | calls | which messages; phases in ms")
    for swaps in given.swaps:
        for backend in given.backend:
            for repeated in (True, False) if swaps else (True,):
                work = workload(given, swaps, repeated)
                found = run_local_ranks(measure, given.ranks, (backend, given.device, work), timeout_s=300.0)
                steps = [max(step) for step in zip(*(rank.seconds for rank in found), strict=True)]
                messages = {name: max(rank.messages.get(name, 0.0) for rank in found) for name in _MESSAGES}
                cells = [
                    backend,
                    str(swaps),
                    "same" if repeated else "new",
                    f"{1e3 * statistics.median(steps):.2f} ms",
                    f"{1e3 * min(steps):.2f} ms",
                    f"{max(sum(rank.messages.values()) for rank in found):.1f}",
                    f"{max(rank.calls for rank in found):.0f}",
                    ", ".join(f"{name} {count:.1f}" for name, count in messages.items() if count)
                    + "; "
                    + ", ".join(f"{name} {1e3 * value:.2f}" for name, value in found[0].phases.items()),
                ]
                print(" | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
