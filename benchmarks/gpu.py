#!/usr/bin/env python3
"""Measure on a machine with one CUDA GPU (all ranks share it) and no internet; print a line and write a JSON a run.

    OUT=bench-out python benchmarks/gpu.py

Environment variables change what is run:

    OUT         where the JSON files go                                  bench-out
    DEVICE      cuda or cpu                                              cuda
    RANKS       numbers of ranks                                         2 4
    BACKENDS    config strings                                           nixl torch_gloo
    SIZES       name:layers:slots:redundant:expert_bytes, any number     experts of DeepSeek-V3 (FP8), and smaller ones
    STEPS       rearrangements of a run                                  6
    SLOW_STEPS  the same where every byte goes through the host (gloo)   3
    ROUNDS      runs of each, in turn                                    1
    TIMEOUT     seconds that a run may take                              150
    VLLM_PEER   a folder with vllm/distributed/eplb (see compare.py); vLLM's NIXL transfer is then run as well

A run that fails or hangs becomes a line that says so; the others still run. Exit code 1 if any of ours did, or moved
wrong bytes.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import make_workload
import numpy as np
from compare import Contestant, run

SIZES = "44MB:8:16:8:44040192 4.7MB:16:32:16:4718592"
COLUMNS = "{:<8} {:>5}  {:<22} {:>10} {:>10} {:>9} {:>9}  {}"


def setting(name: str, default: str) -> str:
    """Return an environment variable, or its default."""
    return os.environ.get(name) or default


def line(name: str, ranks: int, contestant: Contestant, found: dict[str, Any]) -> str:
    """Return one line of the table."""
    if "error" in found:
        return COLUMNS.format(name, ranks, contestant.name, "-", "-", "-", "-", f"FAILED: {found['error']}")
    staging = found.get("staging_bytes_max")
    return COLUMNS.format(
        name,
        ranks,
        contestant.name,
        f"{1e3 * found['seconds_median']:,.1f}",
        f"{1e3 * found['seconds_min']:,.1f}",
        f"{found['gb_per_s']:,.2f}",
        "-" if staging is None else f"{staging / 2**20:,.0f}",
        "right" if found["correct"] else f"WRONG: {found['wrong_tensors']} tensors",
    )


def main() -> int:
    """Run everything."""
    out = Path(setting("OUT", "bench-out"))
    out.mkdir(parents=True, exist_ok=True)
    device, peer = setting("DEVICE", "cuda"), os.environ.get("VLLM_PEER")
    contestants = [
        Contestant(f"eplb {text}", True, text, "") for text in setting("BACKENDS", "nixl torch_gloo").split()
    ]
    if peer:
        contestants.append(Contestant("vLLM nixl", False, "nixl", ""))
    print(COLUMNS.format("size", "ranks", "contestant", "median ms", "min ms", "GB/s", "staging", "bytes"), flush=True)
    good = True
    for size in setting("SIZES", SIZES).split():
        name, *numbers = size.split(":")
        layers, slots, redundant, expert_bytes = map(int, numbers)
        for ranks in map(int, setting("RANKS", "2 4").split()):
            for number in range(int(setting("ROUNDS", "1"))):
                for contestant in contestants:
                    steps = setting("SLOW_STEPS", "3") if "gloo" in contestant.backend else setting("STEPS", "6")
                    arrays = make_workload.make(
                        ranks, layers, slots, redundant, expert_bytes, int(steps), churn=1.0, seed=0
                    )
                    with tempfile.TemporaryDirectory() as scratch:
                        workload = Path(scratch) / "w.npz"
                        np.savez(workload, **arrays)
                        found = run(contestant, workload, Path(peer or "."), device, float(setting("TIMEOUT", "150")))
                    label = re.sub(r"[^A-Za-z0-9.]+", "-", f"{name}-{ranks}ranks-{contestant.name}-{number}")
                    document = {"size": name, "contestant": contestant.name, "round": number, **found}
                    (out / f"{label}.json").write_text(json.dumps(document, indent=2) + "\n")
                    print(line(name, ranks, contestant, found), flush=True)
                    good = good and (found["correct"] or not contestant.ours)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
