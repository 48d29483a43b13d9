#!/usr/bin/env python3
"""Try `cuda_ipc` on a machine with a CUDA GPU, in less than three minutes: does it work, and is it faster than nixl?

    pip install -e '.[test]' 'eplb[nixl]' && python gpu_check.py

Runs its probe; then `eplb bench` with nixl and with cuda_ipc in turn, with experts of DeepSeek-V3 (FP8) and smaller
ones, 2 and 4 ranks that share the GPUs, a line of a table for each; then its tests on the GPU: the conformance kit with
2 and 4 ranks, and its own. Exit code 1 if anything failed, moved wrong bytes, or was not run as the time was over.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SIZES = "44MB:8:16:8:44040192 4.7MB:16:32:16:4718592"
COLUMNS = "{:<7} {:>5}  {:<18} {:>10} {:>10} {:>9} {:>12} {:>14}  {}"
PROBE = "from eplb_cuda_ipc.probe import probe; found = probe('cuda'); print(found.reason); exit(not found.available)"


class Clock:
    """What is left of the time."""

    def __init__(self, seconds: float) -> None:
        self._began = time.monotonic()
        self._seconds = seconds

    @property
    def spent(self) -> float:
        return time.monotonic() - self._began

    def run(self, command: list[str], folder: Path = HERE) -> tuple[int | None, str]:
        """Run a command with all its children; return its exit code, None if the time was over, and what it printed."""
        left = self._seconds - self.spent
        if left < 1:
            return None, "not run: the time was over"
        environment = {"UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on", **os.environ}  # nixl reads over tcp otherwise, in VMs
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, cwd=folder, env=environment, start_new_session=True
            )
            try:
                code: int | None = process.wait(left)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            return code, output.read().strip() + ("" if code is not None else "\ncut: the time was over")


def bench(clock: Clock, backend: str, device: str, ranks: int, size: str, steps: int) -> dict[str, Any]:
    """Return what `eplb bench` measured, or `{"error": ...}`."""
    _, layers, slots, redundant, expert_bytes = size.split(":")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.json"
        command = [sys.executable, "-m", "eplb_core", "bench", "--backend", backend, "--device", device]
        command += ["--ranks", str(ranks), "--layers", layers, "--slots", slots, "--redundant", redundant]
        command += ["--expert-bytes", expert_bytes, "--steps", str(steps), "--json", str(out)]
        code, text = clock.run(command)
        if out.exists():
            found: dict[str, Any] = json.loads(out.read_text())
            return found
    return {"error": f"exit code {code}: {(text.splitlines() or ['it said nothing'])[-1]}"}


def line(name: str, ranks: int, backend: str, found: dict[str, Any], first: dict[str, Any]) -> str:
    """Return one line of the table; `first` is what the first backend did with the same."""
    if "error" in found:
        return COLUMNS.format(name, ranks, backend, "-", "-", "-", "-", "-", f"FAILED: {found['error']}")
    ratio = first["seconds_median"] / found["seconds_median"] if "seconds_median" in first else None
    return COLUMNS.format(
        name,
        ranks,
        backend,
        f"{1e3 * found['seconds_median']:,.1f}",
        f"{1e3 * found['seconds_min']:,.1f}",
        f"{found['gb_per_s']:,.1f}",
        f"{found['staging_bytes_max'] / 2**20:,.0f}",
        "-" if ratio is None else f"{ratio:.2f}",
        "right" if found["correct"] else f"WRONG: {found['wrong_tensors']} tensors",
    )


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=170.0, help="all of it is cut after so long")
    parser.add_argument("--backends", nargs="+", default=["nixl", "cuda_ipc"], help="config strings")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--sizes", nargs="+", default=SIZES.split(), help="name:layers:slots:redundant:expert_bytes")
    parser.add_argument("--steps", type=int, default=5, help="rearrangements of a run; the first is not counted")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu only tries this script")
    options = parser.parse_args()
    clock, good = Clock(options.seconds), True
    if options.device == "cuda":
        code, text = clock.run([sys.executable, "-c", PROBE])
        print(f"probe, {clock.spent:.0f} s: {'works' if code == 0 else 'FAILED'}: {text}", flush=True)
        if code != 0:
            return 1
    header = ("size", "ranks", "backend", "median ms", "fastest", "GB/s", "staging MiB", "times as fast", "bytes")
    print(COLUMNS.format(*header), flush=True)
    for size in options.sizes:
        for ranks in options.ranks:
            first: dict[str, Any] | None = None
            for backend in options.backends:
                found = bench(clock, backend, options.device, ranks, size, options.steps)
                first = first or found
                print(line(size.split(":")[0], ranks, backend, found, first), flush=True)
                good = good and found.get("correct", False)
    if options.device == "cuda":
        code, text = clock.run([sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short", "tests"])
        good = good and code == 0
        print(f"tests on the GPU: {'passed' if code == 0 else 'FAILED'}\n{text}\n")
    print(f"{clock.spent:.0f} s in all; {'all is well' if good else 'NOT all is well'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
