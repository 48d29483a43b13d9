#!/usr/bin/env python3
"""What each guarantee of a rearrangement costs: the commit record, checksums, background jobs, a pace.

    python benchmarks/guarantees.py --backend nixl --ranks 2

One set of local ranks does all of it. In each round every variant moves the same experts there and back, in turn and in
another order each time, so that whatever else the machine does hits all alike. A cost is the median over rounds of the
ratio to the variant that it is compared with in the same round. In the end every byte is compared, and a pace is
measured over every second of a job. Exit code 1 if a byte was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import make_workload
import numpy as np
import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from eplb_core.bench.pattern import fill, find_wrong
from eplb_core.bench.workload import Workload
from eplb_core.control.groups import TorchGroups
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment, run_local_ranks
from eplb_core.rearrange.pace import parse_pace
from eplb_core.rearrange.rearranger import Rearranger
from eplb_core.transport.pattern import Pattern

WINDOWS_MIB = (None, 8)  # what the backend allows, and one that makes many steps
LIMIT_S = 300.0
UNREACHABLE = "1TB/s"
PAUSE_S = 0.002


@dataclass(frozen=True)
class Variant:
    """One way to rearrange, and the one that it is compared with."""

    name: str
    rival: str = ""
    verify: str = "off"
    background: bool = False
    pace: str | None = None


VARIANTS = (
    Variant("run"),
    Variant("verify=sample", rival="run", verify="sample"),
    Variant("verify=full", rival="run", verify="full"),
    Variant("background job", rival="run", background=True),
    Variant("job with a pace out of reach", rival="background job", background=True, pace=UNREACHABLE),
)


@dataclass(frozen=True)
class Plan:
    """What the ranks do."""

    workload: Workload
    backend: str
    variants: tuple[Variant, ...]
    rounds: int
    pace: str


@dataclass(frozen=True)
class Found:
    """What one rank measured.

    Attributes:
        seconds: window -> variant -> seconds there and back, one a round.
        steps: window -> steps there and back, of `run`.
        pace: the least and the most that this rank received in any second of a paced job, as shares of the pace.
        wrong: tensors with wrong bytes.
    """

    seconds: dict[str, dict[str, list[float]]]
    steps: dict[str, int]
    pace: tuple[float, float]
    wrong: int


def measure(environment: RankEnvironment, plan: Plan) -> Found:
    """Run in each rank."""
    torch.set_num_threads(1)
    environment.init_process_group(LIMIT_S)
    work, rank = plan.workload, environment.rank
    weights = [
        [torch.empty(work.slots_per_rank, size, dtype=torch.uint8) for size in work.tensor_bytes]
        for _ in range(work.num_layers)
    ]
    pattern = Pattern(max(work.tensor_bytes), torch.device("cpu"))
    fill(weights, work.local(0, rank), pattern, lambda done, total: None)
    seconds: dict[str, dict[str, list[float]]] = {}
    steps: dict[str, int] = {}
    with create_eplb_communicator(TorchGroups(), plan.backend, weights[0]) as communicator:
        for mebibytes in WINDOWS_MIB:
            window = "default" if mebibytes is None else f"{mebibytes} MiB"
            rearranger = Rearranger(communicator, weights, window_bytes=mebibytes and mebibytes << 20)
            seconds[window] = {variant.name: [] for variant in plan.variants}
            for number in range(plan.rounds + 1):
                there, back = work.placements[0], work.placements[1 + number % work.num_steps]
                first = number % len(plan.variants)
                for variant in (*plan.variants[first:], *plan.variants[:first]):
                    dist.barrier()
                    began = time.perf_counter()
                    made = rearrange(rearranger, variant, there, back)
                    made += rearrange(rearranger, variant, back, there)
                    dist.barrier()
                    if number:  # connections, buffers and registrations are made in the first round
                        seconds[window][variant.name].append(time.perf_counter() - began)
                    if variant.name == "run":
                        steps[window] = made
        wrong = find_wrong(weights, work.local(0, rank), pattern, lambda done, total: None)
        pace = keep_pace(rearranger, work, parse_pace(plan.pace))
    return Found(seconds, steps, pace, len(wrong))


def rearrange(rearranger: Rearranger, variant: Variant, old: np.ndarray, new: np.ndarray) -> int:
    """Rearrange once, and return how many steps it took."""
    if variant.background:
        return rearranger.start(old, new, pace=variant.pace).wait(LIMIT_S).steps
    return rearranger.run(old, new, verify=variant.verify).steps  # type: ignore[arg-type]


def keep_pace(rearranger: Rearranger, work: Workload, bytes_per_s: float) -> tuple[float, float]:
    """Return the least and the most that arrived here in any second of a job, as shares of the pace.

    Every rank receives as much as every other: all slots of its neighbour.
    """
    slots = work.num_ranks * work.slots_per_rank
    old = np.tile(np.arange(slots), (work.num_layers, 1))
    dist.barrier()
    job = rearranger.start(old, np.roll(old, work.slots_per_rank, axis=1), pace=bytes_per_s)
    samples: list[tuple[float, int]] = []
    while not job.received:
        for layer in job.ready_layers():
            job.commit(layer)
        samples.append((time.monotonic(), job.progress[0]))
        time.sleep(PAUSE_S)
    job.wait(LIMIT_S)
    moving = [sample for sample in samples if 0 < sample[1] < job.progress[1]]
    times, received = np.array(moving).T
    ends = np.searchsorted(times, times + 1)
    whole = ends < len(times)
    if not whole.any():
        raise SystemExit(f"{job.progress[1]} bytes do not last a second: give a lower --pace")
    rates = (received[ends[whole]] - received[whole]) / (times[ends[whole]] - times[whole]) / bytes_per_s
    return float(rates.min()), float(rates.max())


def summarize(found: Sequence[Found], variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Return a row for each window and variant; times are those of rank 0, between two barriers of all ranks."""
    rows = []
    for window, by_variant in found[0].seconds.items():
        for variant in variants:
            own = by_variant[variant.name]
            row: dict[str, Any] = {"window": window, "variant": variant.name, "milliseconds": 1e3 * median(own) / 2}
            if variant.rival:
                ratios = [mine / other for mine, other in zip(own, by_variant[variant.rival], strict=True)]
                low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
                row |= {"rival": variant.rival, "cost": median(ratios) - 1, "quartiles": [low - 1, high - 1]}
            rows.append(row | {"steps": found[0].steps[window] / 2})
    return rows


median: Callable[[Sequence[float]], float] = statistics.median


def chosen(names: Sequence[str] | None) -> tuple[Variant, ...]:
    """Return the variants of these names, all if there are none, with those that they are compared with."""
    rivals = {variant.name: variant.rival for variant in VARIANTS}
    wanted = set(names or rivals) | {"run"}
    wanted |= {rivals[name] for name in wanted}
    return tuple(variant for variant in VARIANTS if variant.name in wanted)


def print_table(title: str, rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print what `summarize` returned."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in ("window", "variant", "one way", "cost", "middle half of rounds", "compared with"):
        table.add_column(column, justify="right" if column in ("one way", "cost", "middle half of rounds") else "left")
    for row in rows:
        cost = (f"{row['cost']:+.1%}", "{:+.1%} to {:+.1%}".format(*row["quartiles"])) if "rival" in row else ("", "")
        window = f"{row['window']}, {row['steps']:g} steps"
        table.add_row(window, row["variant"], f"{row['milliseconds']:.1f} ms", *cost, row.get("rival", ""))
    console.print(table)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", default=["nixl", "torch_gloo"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pace", default="50MB/s", help="what has to be kept; a job has to last for seconds")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these, and what they are compared with")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    for name, default in make_workload.DEFAULTS.items():
        if name != "ranks":
            parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    given = parser.parse_args()
    sizes = {name: getattr(given, name) for name in make_workload.DEFAULTS if name != "ranks"}
    unknown = sorted(set(given.only or ()) - {variant.name for variant in VARIANTS})
    if unknown:
        parser.error(f"there is no variant {unknown[0]!r}: {', '.join(variant.name for variant in VARIANTS)}")
    variants = chosen(given.only)
    console = Console(highlight=False, width=None if os.isatty(1) else 110)
    documents, wrong = [], 0
    for ranks in given.ranks:
        arrays = make_workload.make(ranks=ranks, churn=1.0, **sizes)
        work = Workload(arrays["placements"], tuple(map(int, arrays["tensor_bytes"])), ranks)
        for backend in given.backend:
            before = os.getloadavg()[0]
            plan = Plan(work, backend, variants, given.rounds, given.pace)
            found = run_local_ranks(measure, ranks, (plan,), timeout_s=LIMIT_S)
            rows = summarize(found, variants)
            print_table(f"{backend}, {ranks} ranks", rows, console)
            least, most = min(each.pace[0] for each in found), max(each.pace[1] for each in found)
            console.print(f"a pace of {given.pace}: {least:.1%} to {most:.1%} of it arrived in any second of a job")
            load = f"{before:.1f} before, {os.getloadavg()[0]:.1f} after, with {os.cpu_count()} cores"
            console.print(f"load of the machine: {load}; wrong tensors: {sum(each.wrong for each in found)}\n")
            wrong += sum(each.wrong for each in found)
            documents.append({"backend": backend, "ranks": ranks, "load": load, "rows": rows, **asdict(found[0])})
    if given.json is not None:
        given.json.write_text(json.dumps(documents, indent=2) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
