#!/usr/bin/env python3
"""Measure settings of the rearranger and of the backends side by side, on workloads of `many_gpus.py`.

    python benchmarks/variants.py --json variants.json
    python benchmarks/variants.py --only "44 MB" --variant "cuda_ipc?window=4GiB" --variant "cuda_ipc in_place=never"

All variants of a workload run one after the other in the same processes, each with a communicator and a rearranger of
its own, so that they meet the same machine. A variant is a config string, and words behind it: `window=BYTES` of the
rearranger, `in_place=never`, `set=module:NAME=literal` for a constant of a module, `profile` for the calls that take
most time, `env=NAME=VALUE` for a variable that libraries read once: those with the same variables share processes.
Every byte is compared after each variant. What fails becomes a row that says why.
"""

from __future__ import annotations

import argparse
import ast
import cProfile
import importlib
import io
import itertools
import json
import os
import pstats
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from workload_sizes import SIZES

from eplb_core.bench.pattern import Pattern, fill, find_wrong
from eplb_core.bench.workload import Workload
from eplb_core.control.groups import TorchGroups
from eplb_core.errors import EplbError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import LocalRankError, RankEnvironment, run_local_ranks
from eplb_core.launch.rank_devices import device_group, rank_device
from eplb_core.rearrange.rearranger import Rearranger

_KERNEL = "set=eplb_cuda_ipc.driver:_LARGE_BYTES=1<<62"
_SPINNING = "set=eplb_backends.nixl.engine:_SPINS=1000"
_LARGER = "set=eplb_backends.nixl.memory:_WINDOW_SHARE=4"
_CHANNELS = "env=NCCL_MIN_P2P_NCHANNELS=32 env=NCCL_MIN_CTAS=32"
_BUFFERS = "env=NCCL_MIN_P2P_NCHANNELS=64 env=NCCL_MIN_CTAS=64 env=NCCL_BUFFSIZE=16777216"
_ALL_DRAWN = (
    "cuda_ipc",
    "cuda_ipc in_place=never",
    "cuda_ipc in_place=always",
    f"cuda_ipc in_place=never {_KERNEL}",
    "cuda_ipc in_place=never set=eplb_cuda_ipc.batch:STREAMS=8",
    "cuda_ipc in_place=never set=eplb_cuda_ipc.exchange:_SPIN_S=0.01",
    "cuda_ipc?window=256MiB in_place=never",
    "cuda_ipc?window=4GiB in_place=never",
    "nixl?mode=direct",
    f"nixl?mode=direct in_place=never {_SPINNING}",
    "nixl?mode=packed",
    f"nixl?mode=packed {_SPINNING}",
    f"nixl?mode=packed {_SPINNING} {_LARGER}",
    "torch_nccl",
    "pynccl",
    "pynccl?coalesce=4MiB",
    "cuda_ipc in_place=never profile",
    "nixl?mode=packed profile",
)
_FEW = (
    "cuda_ipc",
    "cuda_ipc set=eplb_cuda_ipc.exchange:_SPIN_S=0.01",
    "nixl?mode=direct",
    f"nixl?mode=direct {_SPINNING}",
    f"nixl?mode=packed {_SPINNING}",
    "torch_nccl",
    "pynccl",
    "cuda_ipc profile",
    "nixl?mode=direct profile",
    "torch_nccl profile",
)
PLAN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("44 MB", _ALL_DRAWN),
    ("1 swap", _FEW),
    ("20 swaps", _FEW),
    ("4.7 MB", _ALL_DRAWN),
    (
        "DeepSeek-V3",
        ("cuda_ipc", "cuda_ipc in_place=never", "nixl?mode=direct", "nixl?mode=packed", "pynccl"),
    ),
    (
        "44 MB, one GPU",
        tuple(
            f"{variant} env=CUDA_VISIBLE_DEVICES=0"
            for variant in (
                "cuda_ipc",
                "cuda_ipc in_place=never",
                "nixl in_place=never",
                "cuda_ipc?window=256MiB",
            )
        ),
    ),
    ("44 MB", tuple(f"{name} {env}" for env in (_CHANNELS, _BUFFERS) for name in ("torch_nccl", "pynccl"))),
    ("4.7 MB", tuple(f"{name} {_CHANNELS}" for name in ("torch_nccl", "pynccl", "pynccl?coalesce=4MiB"))),
    ("DeepSeek-V3", tuple(f"{name} {_CHANNELS}" for name in ("pynccl",))),
    ("nothing", ("cuda_ipc",)),
)
"""Workload -> its variants."""


@dataclass(frozen=True)
class Variant:
    """What is measured.

    Attributes:
        text: as it was written.
        config: of the backend.
        words: what is said besides.
    """

    text: str
    config: str
    words: tuple[str, ...]

    @staticmethod
    def of(text: str) -> Variant:
        """Return what a text says."""
        config, *words = text.split()
        return Variant(text, config, tuple(words))

    def values(self, kind: str) -> list[str]:
        """Return what follows `kind=`."""
        return [word.removeprefix(f"{kind}=") for word in self.words if word.startswith(f"{kind}=")]

    @property
    def environment(self) -> tuple[tuple[str, str], ...]:
        """Variables of the processes."""
        pairs = [value.partition("=") for value in self.values("env")]
        return tuple((name, value) for name, _, value in pairs)


@dataclass
class Found:
    """What one rank found of one variant.

    Attributes:
        seconds: of each rearrangement but the first.
        phases: name -> median milliseconds.
        steps: of a rearrangement.
        wrong: tensors with a wrong byte in the end.
        error: what went wrong instead.
        profile: the calls that took most time.
    """

    seconds: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    wrong: int = 0
    error: str = ""
    profile: str = ""


def measure(environment: RankEnvironment, device_kind: str, work: Workload, variants: Sequence[Variant]) -> list[Found]:
    """Measure in each rank."""
    torch.set_num_threads(1)
    device = rank_device(device_kind, environment)
    weights = [
        [torch.empty(work.slots_per_rank, size, dtype=torch.uint8, device=device) for size in work.tensor_bytes]
        for _ in range(work.num_layers)
    ]
    environment.init_process_group(120.0)
    group = TorchGroups(device_group=device_group(environment, device, 120.0))
    pattern = Pattern(max(work.tensor_bytes), device)
    found = []
    for number, variant in enumerate(variants):
        placements = work.placements if number % 2 == 0 else work.placements[::-1]
        held = placements[:, :, environment.rank * work.slots_per_rank : (environment.rank + 1) * work.slots_per_rank]
        if number == 0 or found[-1].error or found[-1].wrong:
            fill(weights, held[0], pattern, lambda done, total: None)
        kept = [(name, getattr(name[0], name[1])) for name, _ in map(constant, variant.values("set"))]
        try:
            for (module, name), value in map(constant, variant.values("set")):
                setattr(module, name, value)
            found.append(run(variant, group, weights, placements, device))
            found[-1].wrong = len(find_wrong(weights, held[-1], pattern, lambda done, total: None))
        except EplbError as error:
            found.append(Found(error=f"{type(error).__name__}: {error}"[:600]))
        finally:
            for (module, name), value in kept:
                setattr(module, name, value)
        environment.report((number, found[-1]))
        dist.barrier()
    return found


def constant(text: str) -> tuple[tuple[Any, str], Any]:
    """Return the module and name, and the value, of `module:NAME=literal`; a shift such as 1<<30 is a literal too."""
    name, _, value = text.partition("=")
    module, _, attribute = name.partition(":")
    first, _, bits = value.partition("<<")
    literal = ast.literal_eval(first) << int(bits) if bits else ast.literal_eval(value)
    return (importlib.import_module(module), attribute), literal


def run(
    variant: Variant, group: TorchGroups, weights: list[list[torch.Tensor]], placements: Any, device: torch.device
) -> Found:
    """Go through the placements."""
    window = next((int(value) for value in variant.values("window")), None)
    in_place: Any = next(iter(variant.values("in_place")), "auto")
    profile = cProfile.Profile()
    found, phases = Found(), []
    with create_eplb_communicator(group, variant.config, weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights, window_bytes=window, in_place=in_place)
        for step, (old, new) in enumerate(itertools.pairwise(placements)):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            dist.barrier()
            began = time.perf_counter()
            if "profile" in variant.words and step:
                profile.enable()
            result = rearranger.run(old, new)
            profile.disable()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if step:
                found.seconds.append(time.perf_counter() - began)
                phases.append(result.phases)
            found.steps = result.steps
    names = {name for each in phases for name in each}
    found.phases = {name: 1e3 * statistics.median(each.get(name, 0.0) for each in phases) for name in sorted(names)}
    if "profile" in variant.words:
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(45)
        found.profile = "\n".join(line[-130:] for line in text.getvalue().splitlines() if line.strip())
    return found


def row(work: Workload, workload: str, variant: Variant, ranks: Sequence[Found]) -> dict[str, Any]:
    """Return a row of the result."""
    error = next((rank.error for rank in ranks if rank.error), "")
    line: dict[str, Any] = {"workload": workload, "variant": variant.text, "error": error}
    if error or not all(rank.seconds for rank in ranks):
        return line
    steps = [max(step) for step in zip(*(rank.seconds for rank in ranks), strict=True)]
    crossing = [moved_bytes(work, old, new) for old, new in zip(work.placements[:-1], work.placements[1:], strict=True)]
    a_gpu = statistics.mean(crossing) / work.num_ranks
    return {
        **line,
        "ms": round(1e3 * statistics.median(steps), 3),
        "ms_min": round(1e3 * min(steps), 3),
        "gb_per_s_of_a_gpu": round(a_gpu / statistics.median(steps) / 1e9, 1),
        "steps": ranks[0].steps,
        "right": not any(rank.wrong for rank in ranks),
        "phases": {name: round(value, 2) for name, value in ranks[0].phases.items()},
        **({"profile": ranks[0].profile} if ranks[0].profile else {}),
    }


def moved_bytes(work: Workload, old: Any, new: Any) -> int:
    """Return the bytes of experts that ranks did not hold before, of all ranks together."""
    moved = 0
    for rank in range(work.num_ranks):
        own = slice(rank * work.slots_per_rank, (rank + 1) * work.slots_per_rank)
        for before, after in zip(old[:, own].tolist(), new[:, own].tolist(), strict=True):
            moved += len(set(after) - set(before) - {-1})
    return moved * sum(work.tensor_bytes)


def main() -> None:
    """Measure, print a line for each variant, and write the JSON file anew after every group of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORKLOAD")
    parser.add_argument("--variant", action="append", default=[])
    parser.add_argument("--limit", type=float, default=460.0, help="seconds for everything")
    parser.add_argument("--group-limit", type=float, default=110.0, help="seconds for those that share processes")
    given = parser.parse_args()
    ends = time.monotonic() + given.limit
    sizes = {size.name: size for size in SIZES[given.device]}
    rows: list[dict[str, Any]] = []
    plan = [(workload, given.variant) for workload in given.only] if given.variant else PLAN
    for workload, texts in plan:
        if given.only and workload not in given.only:
            continue
        size = sizes[workload.partition(",")[0]]
        work = size.workload(given.ranks)
        groups: dict[tuple[tuple[str, str], ...], list[Variant]] = {}
        for variant in map(Variant.of, texts):
            groups.setdefault(variant.environment, []).append(variant)
        for variables, variants in groups.items():
            left = min(ends - time.monotonic(), given.group_limit)
            said: dict[int, dict[int, Found]] = {}
            problem = "the time is used up" if left < 10 else ""
            if not problem:
                os.environ.update(variables)
                try:
                    run_local_ranks(
                        measure,
                        given.ranks,
                        (given.device, work, variants),
                        timeout_s=left,
                        on_event=lambda rank, event, said=said: said.setdefault(event[0], {}).update({rank: event[1]}),
                    )
                except LocalRankError as error:
                    problem = str(error)[-600:]
                for name, _ in variables:
                    with suppress(KeyError):
                        del os.environ[name]
            for number, variant in enumerate(variants):
                ranks = said.get(number, {})
                whole = [ranks[rank] for rank in sorted(ranks)]
                if len(whole) < given.ranks:
                    whole = [Found(error=problem or "it was not reported")]
                rows.append(row(work, workload, variant, whole))
                line = {name: value for name, value in rows[-1].items() if name != "profile"}
                print(json.dumps(line), flush=True)
            if given.json is not None:
                given.json.write_text(json.dumps({"given": {**vars(given), "json": None}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
