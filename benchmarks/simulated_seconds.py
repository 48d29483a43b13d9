"""How far the seconds of `eplb simulate` are from those of real runs that it was not calibrated with.

    python benchmarks/simulated_seconds.py                  # 2 and 4 ranks on this machine's CPUs, some minutes
    python benchmarks/simulated_seconds.py --ranks 2 --backend nixl --rounds 5

For each number of ranks some workloads are measured to calibrate with and others to be predicted, in turn, round by
round, each by `eplb bench`. Then `eplb simulate --calibrate` predicts the others. Each line compares the median of all
rearrangements of a workload with the mean of the predicted ones.
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

CALIBRATE: list[tuple[Sizes, str]] = [
    ({"churn": 1.0, "seed": 1}, "64MiB"),
    ({"churn": 1.0, "seed": 2}, "12MiB"),
    ({"churn": 0.3, "seed": 3}, "64MiB"),
    ({"churn": 0.1, "seed": 4}, "12MiB"),
]
"""What `make_workload` is given beside the ranks, and the window."""

PREDICT: list[tuple[Sizes, str]] = [
    ({"churn": 1.0, "seed": 11, "layers": 6, "slots": 12}, "64MiB"),
    ({"churn": 0.6, "seed": 12, "expert_bytes": 2 << 20}, "24MiB"),
    ({"churn": 0.2, "seed": 13, "layers": 8}, "64MiB"),
    ({"churn": 1.0, "seed": 14, "expert_bytes": 4 << 20, "layers": 3}, "32MiB"),
]


def main() -> int:
    """Measure, predict, and print a line for each workload; return 1 if one is off by more than `--within`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--backend", default="torch_gloo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help="rearrangements of a run; the first one is left out")
    parser.add_argument("--within", type=float, default=0.2)
    parser.add_argument("--json", type=Path, help="write the lines here")
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {given.backend}, {given.rounds} rounds")
    print("ranks  workload                                         measured     range            predicted   ratio")
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
        (save(folder / f"{number}.npz", ranks, given.steps, sizes), sizes, window)
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
        real = [seconds for run in measured for seconds in run["seconds"][1:]]
        predicted = path.with_suffix(".json")
        # In place or not depends on the transport: the schedule that has the steps of the real one is the right one.
        for in_place in ("24MiB", "none"):
            how = ["--window", window, "--in-place-from", in_place]
            eplb("simulate", "--workload", path, *how, *calibration, "--json", predicted)
            steps = json.loads(predicted.read_text())["steps"]
            if [step["steps"] for step in steps] == measured[0]["bounded_steps"]:
                break
        exact = [step["experts_moved"] for step in steps] == measured[0]["experts_moved"]
        median, mean = statistics.median(real), statistics.mean(step["seconds"] for step in steps[1:])
        name = ", ".join(f"{key} {value:g}" for key, value in sizes.items()) + f", window {window}"
        print(
            f"{ranks:5d}  {name:46s} {1e3 * median:9.1f} ms  {1e3 * min(real):6.1f} - {1e3 * max(real):6.1f} ms "
            f"{1e3 * mean:9.1f} ms {mean / median:7.2f}{'' if exact else '  other experts'}",
            flush=True,
        )
        lines.append({"ranks": ranks, "workload": name, "measured": real, "predicted": mean, "ratio": mean / median})
    print("       " + json.loads(predicted.read_text())["calibration"]["text"])
    return lines


def save(path: Path, ranks: int, steps: int, sizes: Sizes) -> Path:
    """Write a workload and return its path."""
    work = make_workload(ranks=ranks, steps=steps, **sizes)  # type: ignore[arg-type]
    np.savez(path, placements=work.placements, tensor_bytes=np.array(work.tensor_bytes), ranks=np.array(ranks))
    return path


def eplb(*arguments: object) -> None:
    """Run the command; what it prints is shown only if it fails."""
    command = [sys.executable, "-m", "eplb_core", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    sys.exit(main())
