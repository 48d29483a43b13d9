#!/usr/bin/env python3
"""Compare `eplb` with vLLM's own EPLB weight transfer: the same workloads, run in turn, in processes of their own.

    python benchmarks/compare.py

fetches the wheel of vllm 0.33.0 once (336 MB; only its folder vllm/distributed/eplb is kept, under --cache), makes a
workload for each number of ranks, runs all contestants A B C D A B C D ..., and prints the medians and their ratios.
The environment needs eplb with its nixl extra. Exit code 1 if any contestant of ours failed or moved wrong bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import make_workload
import numpy as np
import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from eplb_core.launch.bounded import run_bounded

VLLM = "0.33.0"
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Contestant:
    """Who moves the weights. `rival` is the one that it is compared with."""

    name: str
    ours: bool
    backend: str
    rival: str


CONTESTANTS = (
    Contestant("eplb nixl", True, "nixl", "vLLM nixl"),
    Contestant("vLLM nixl", False, "nixl", ""),
    Contestant("eplb torch_gloo", True, "torch_gloo", "vLLM gloo"),
    Contestant("vLLM gloo", False, "gloo", ""),
)


def fetch_vllm(cache: Path) -> Path:
    """Return a folder that holds vLLM's transfer code; download it at the first call."""
    folder = cache / f"vllm-{VLLM}"
    if (folder / "vllm/distributed/eplb/rebalance_execute.py").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", f"vllm=={VLLM}", "--no-deps", "-d", scratch]
        if subprocess.run(command, check=False, timeout=1800).returncode:
            raise SystemExit(f"cannot fetch vllm {VLLM}: give --vllm FOLDER with its unzipped wheel")
        (wheel,) = Path(scratch).glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            wanted = [name for name in archive.namelist() if name.startswith("vllm/distributed/eplb/")]
            archive.extractall(folder, wanted)
    return folder


def run(contestant: Contestant, workload: Path, vllm: Path, device: str, timeout_s: float) -> dict[str, Any]:
    """Run one contestant once, and return what it measured, or `{"error": ...}`."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.json"
        if contestant.ours:
            command = [sys.executable, "-m", "eplb_core", "bench", "--workload", str(workload), "--json", str(out)]
        else:
            command = [sys.executable, str(HERE / "vllm_peer.py"), str(workload), "--vllm", str(vllm)]
        command += ["--backend", contestant.backend, "--device", device]
        environment = dict(os.environ)
        if not contestant.ours:
            environment.setdefault(
                "UCX_CUDA_IPC_ENABLE_GET_ZCOPY", "on"
            )  # without NVLink, READs run over tcp otherwise
        ended = run_bounded(command, timeout_s, environment)
        if ended.exit_code is None:
            return {"error": ended.reason, "correct": False}
        if contestant.ours:
            text = out.read_text() if out.exists() else ""
        else:
            text = (ended.stdout.strip().splitlines() or [""])[-1]
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError:
        return {"error": ended.reason or "it wrote no figures", "correct": False}
    return found


def summarize(runs: Sequence[dict[str, Any]], ranks: int, contestants: Sequence[Contestant]) -> list[dict[str, Any]]:
    """Return one row a contestant: the median of its rounds' medians, their range, and the ratio to its rival."""
    rows = []
    medians: dict[str, float] = {}
    for contestant in contestants:
        own = [run for run in runs if run["contestant"] == contestant.name and run["ranks"] == ranks]
        times = [run["seconds_median"] for run in own if "error" not in run]
        if times:
            medians[contestant.name] = statistics.median(times)
        rows.append(
            {
                "ranks": ranks,
                "contestant": contestant.name,
                "seconds_median": medians.get(contestant.name),
                "seconds_range": [min(times), max(times)] if times else None,
                "gb_per_s": own[0]["bytes_moved"] / medians[contestant.name] / 1e9 if len(times) == len(own) else None,
                "correct": all(run["correct"] for run in own),
                "errors": [run["error"] for run in own if "error" in run],
            }
        )
    for row, contestant in zip(rows, contestants, strict=True):
        if contestant.name in medians and contestant.rival in medians:
            row["rival"] = contestant.rival
            row["times_as_fast"] = medians[contestant.rival] / medians[contestant.name]
    return rows


def print_table(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the rows of `summarize`."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("ranks")
    table.add_column("contestant")
    for column in ("median", "range over rounds", "GB/s", "bytes", "times as fast"):
        table.add_column(column, justify="right")
    for row in rows:
        if row["seconds_median"] is None:
            table.add_row(str(row["ranks"]), row["contestant"], *["-"] * 3, "failed", "")
            continue
        low, high = (f"{1e3 * seconds:,.0f}" for seconds in row["seconds_range"])
        table.add_row(
            str(row["ranks"]),
            row["contestant"],
            f"{1e3 * row['seconds_median']:,.1f} ms",
            f"{low} - {high} ms",
            f"{row['gb_per_s']:.2f}" if row["gb_per_s"] else "-",
            "right" if row["correct"] else "WRONG",
            f"{row['times_as_fast']:.2f} x {row['rival']}" if "rival" in row else "",
        )
    console.print(table)
    for row in rows:
        for error in row["errors"]:
            console.print(f"{row['contestant']}, {row['ranks']} ranks: {error}", markup=False)


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--also", nargs="+", default=[], metavar="CONFIG", help="further backends, against vLLM's nixl")
    parser.add_argument("--only", nargs="+", metavar="CONTESTANT", help='of all contestants, such as "vLLM nixl"')
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "eplb-bench")
    parser.add_argument("--vllm", type=Path, help="an unzipped wheel, instead of fetching it")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that a run may take")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    for name, default in make_workload.DEFAULTS.items():
        if name != "ranks":
            parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--churn", type=float, default=1.0)
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in (*make_workload.DEFAULTS, "churn") if name != "ranks"}
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    contestants = [*(Contestant(f"eplb {also}", True, also, "vLLM nixl") for also in arguments.also), *CONTESTANTS]
    unknown = sorted(set(arguments.only or ()) - {contestant.name for contestant in contestants})
    if unknown:
        parser.error(f"there is no contestant {unknown[0]!r}: {', '.join(each.name for each in contestants)}")
    contestants = [each for each in contestants if not arguments.only or each.name in arguments.only]
    vllm = arguments.vllm or fetch_vllm(arguments.cache)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for ranks in arguments.ranks:
            workload = Path(scratch) / f"{ranks}.npz"
            np.savez(workload, **make_workload.make(ranks=ranks, **sizes))
            for number in range(arguments.rounds):
                for contestant in contestants:
                    with console.status(f"{ranks} ranks, round {number + 1}, {contestant.name}"):
                        found = run(contestant, workload, vllm, arguments.device, arguments.timeout)
                    runs.append({"contestant": contestant.name, "round": number, "ranks": ranks, **found})
    rows = [row for ranks in arguments.ranks for row in summarize(runs, ranks, contestants)]
    print_table(rows, console)
    machine = {"platform": platform.platform(), "cpus": psutil.cpu_count(), "memory": psutil.virtual_memory().total}
    versions = {"python": platform.python_version(), "vllm": VLLM}
    versions |= {name: version(name) for name in ("eplb", "torch", "nixl", "numpy")}
    console.print(f"{machine['cpus']} CPUs; " + ", ".join(f"{name} {text}" for name, text in versions.items()))
    if arguments.json:
        document = {
            "device": arguments.device,
            "rounds": arguments.rounds,
            "workload": sizes,
            "machine": machine,
            "versions": versions,
            "contestants": [asdict(contestant) for contestant in contestants],
            "summary": rows,
            "runs": runs,
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    ours = {contestant.name for contestant in contestants if contestant.ours}
    return 0 if all(row["correct"] for row in rows if row["contestant"] in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
