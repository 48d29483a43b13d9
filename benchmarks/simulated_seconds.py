"""How far the seconds of `eplb simulate` are from those of real runs that it was not calibrated with.

    python benchmarks/simulated_seconds.py                  # 2 and 4 ranks on this machine's CPUs, some minutes
    python benchmarks/simulated_seconds.py --ranks 2 --backend nixl --rounds 5

For each number of ranks some workloads are measured to calibrate with and others to be predicted, in turn, round by
round, each by `eplb bench`. Then `eplb simulate --calibrate` predicts the others. A workload goes round six placements
again and again: more than the plans that ranks remember. Of each of the six rearrangements the fastest counts, since
what else the machine does only ever adds time; the medians stand beside, and say how much that was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from eplb_core.bench.workload import make_workload

Sizes = dict[str, float]
RING = 6
"""Placements that a workload goes round."""

CALIBRATE: list[tuple[Sizes, str]] = [
    ({"layers": 4, "slots": 8, "expert_bytes": 1 << 20, "churn": 1.0, "seed": 1}, "16MiB"),
    ({"layers": 4, "slots": 8, "expert_bytes": 1 << 18, "churn": 1.0, "seed": 2}, "768KiB"),
    ({"layers": 2, "slots": 16, "expert_bytes": 1 << 19, "churn": 0.5, "seed": 3}, "8MiB"),
    ({"layers": 4, "slots": 8, "expert_bytes": 1 << 20, "churn": 0.4, "seed": 4}, "3MiB"),
]
"""What `make_workload` is given beside the ranks, and the window."""

PREDICT: list[tuple[Sizes, str]] = [
    ({"layers": 3, "slots": 12, "expert_bytes": 700_000, "churn": 1.0, "seed": 11}, "8MiB"),
    ({"layers": 4, "slots": 12, "expert_bytes": 1 << 19, "churn": 0.5, "seed": 12}, "2MiB"),
    ({"layers": 2, "slots": 10, "expert_bytes": 3 << 19, "churn": 1.0, "seed": 13}, "6MiB"),
    ({"layers": 6, "slots": 8, "expert_bytes": 1 << 19, "churn": 0.7, "seed": 14}, "4MiB"),
]


def main() -> int:
    """Measure, predict, and print a line for each workload; return 1 if one is off by more than `--within`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--backend", default="torch_gloo")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--laps", type=int, default=31, help="how often a run goes round; the first lap is left out")
    parser.add_argument("--within", type=float, default=0.2)
    parser.add_argument("--json", type=Path, help="write the lines here")
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {given.backend}, {given.rounds} rounds")
    print("ranks  workload                                                       fastest   median   predicted   ratio")
    lines = []
    for ranks in given.ranks:
        with tempfile.TemporaryDirectory() as folder:
            lines += compare(ranks, given, Path(folder))
    if given.json:
        given.json.write_text(json.dumps(lines, indent=1))
    return int(any(abs(line["ratio"] - 1) > given.within for line in lines))


def compare(ranks: int, given: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Return a line for each workload that is predicted."""
    workloads = [
        (save(folder / f"{number}.npz", ranks, given.laps, sizes), sizes, window)
        for number, (sizes, window) in enumerate(CALIBRATE + PREDICT)
    ]
    runs: dict[Path, list[Path]] = {path: [] for path, _, _ in workloads}
    for number in range(given.rounds):
        for path, _, window in workloads:
            runs[path].append(path.with_suffix(f".{number}.json"))
            options = ["--backend", given.backend, "--workload", path, "--window", window]
            eplb("bench", *options, "--json", runs[path][-1])
    calibration = [
        argument
        for path, _, _ in workloads[: len(CALIBRATE)]
        for run in runs[path]
        for argument in ("--calibrate", run)
    ]
    lines: list[dict[str, object]] = []
    for path, sizes, window in workloads[len(CALIBRATE) :]:
        measured = [json.loads(run.read_text()) for run in runs[path]]
        real = np.stack([np.reshape(run["seconds"], (-1, RING))[1:] for run in measured]).reshape(-1, RING)
        predicted = path.with_suffix(".json")
        # In place or not depends on the transport: the schedule that has the steps of the real one is the right one.
        for in_place in ("24MiB", "none"):
            how = ["--window", window, "--in-place-from", in_place]
            eplb("simulate", "--workload", path, *how, *calibration, "--json", predicted)
            steps = json.loads(predicted.read_text())["steps"]
            if [step["steps"] for step in steps] == measured[0]["bounded_steps"]:
                break
        exact = [step["experts_moved"] for step in steps] == measured[0]["experts_moved"]
        least, median = float(real.min(axis=0).mean()), float(np.median(real, axis=0).mean())
        mean = statistics.mean(step["seconds"] for step in steps[:RING])
        name = (
            f"{sizes['layers']} layers, {sizes['slots']} slots, {sizes['expert_bytes'] / 2**20:.2f} MiB, "
            f"churn {sizes['churn']:g}, window {window}"
        )
        print(
            f"{ranks:5d}  {name:58s} {1e3 * least:7.1f}  {1e3 * median:7.1f} {1e3 * mean:11.1f} "
            f"{mean / least:7.2f}{'' if exact else '  other experts'}",
            flush=True,
        )
        lines.append(
            {
                "ranks": ranks,
                "workload": name,
                "fastest": least,
                "median": median,
                "predicted": mean,
                "ratio": mean / least,
            }
        )
    print("       " + json.loads(predicted.read_text())["calibration"]["text"])
    return lines


def save(path: Path, ranks: int, laps: int, sizes: Sizes) -> Path:
    """Write a workload that goes round so often, and return its path."""
    work = make_workload(ranks=ranks, steps=RING - 1, **sizes)  # type: ignore[arg-type]
    placements = np.concatenate([np.tile(work.placements, (laps, 1, 1)), work.placements[:1]])
    np.savez(path, placements=placements, tensor_bytes=np.array(work.tensor_bytes), ranks=np.array(ranks))
    return path


def eplb(*arguments: object) -> None:
    """Run the command; what it prints is shown only if it fails."""
    command = [sys.executable, "-m", "eplb_core", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    sys.exit(main())
