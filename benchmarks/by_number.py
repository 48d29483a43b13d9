#!/usr/bin/env python3
"""Measure what prepared lists save the `nixl` backend: the same transfers by number and by address, in turn.

    python benchmarks/by_number.py

Two ranks read random rows of each other's registered weights into landing memory. One process does both ways, every
other transfer the other one, so that what else the machine does meets both alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from eplb_backends.nixl.prepared import LandingPieces
from eplb_core.control.groups import StatelessGroup
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment, collect_local_ranks

SLOTS = 32
CASES = ((4, 65536, 8, 2000), (16, 65536, 8, 1500), (64, 65536, 8, 800), (16, 1 << 20, 4, 400), (1024, 4096, 232, 300))
"""Rows of a READ, bytes of a row, registered tensors of 32 rows each, transfers."""
WARM_UP = 6


def measure(environment: RankEnvironment, rounds: int) -> list[list[tuple[float, float]]]:
    """Return for each case and round the median microseconds by number and by address."""
    torch.set_num_threads(1)
    group = StatelessGroup(environment.rank, 2, dist.PrefixStore("group", environment.store))
    return [[_transfers(group, 1 - environment.rank, *case) for _ in range(rounds)] for case in CASES]


def _transfers(
    group: StatelessGroup, peer: int, rows: int, nbytes: int, tensors: int, times: int
) -> tuple[float, float]:
    drawn = np.random.default_rng(0)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    prepared = LandingPieces.prepared
    with create_eplb_communicator(group, "nixl?mode=direct") as communicator:
        weights = [torch.ones(SLOTS, nbytes, dtype=torch.uint8) for _ in range(tensors)]
        # With gaps, or else neighbours could be joined.
        landing = torch.zeros(rows, nbytes + 256, dtype=torch.uint8)[:, :nbytes]
        communicator.register(weights)
        communicator.register([landing], landing=True)
        communicator.trust_matching(True)
        for number in range(times):
            by_number = number % 2 == 0
            LandingPieces.prepared = prepared if by_number else _nothing  # type: ignore[method-assign]
            for slot in drawn.permutation(SLOTS * tensors)[:rows].tolist():
                communicator.add_send(weights[slot // SLOTS][slot % SLOTS], peer)
            for place in landing:
                communicator.add_recv(place, peer)
            began = time.perf_counter()
            communicator.execute()
            if number >= WARM_UP:
                seconds[by_number].append(time.perf_counter() - began)
    LandingPieces.prepared = prepared  # type: ignore[method-assign]
    return statistics.median(seconds[True]) * 1e6, statistics.median(seconds[False]) * 1e6


def _nothing(*_: Any) -> None:
    """Stand in for `LandingPieces.prepared`: there is no list."""


def main() -> None:
    """Run all cases, and print medians of both ranks and all rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    outcomes = collect_local_ranks(measure, 2, (arguments.rounds,), timeout_s=600)
    print("rows of a READ, bytes of a row: by address, by number, difference in microseconds (range)")
    for case, (rows, nbytes, *_) in enumerate(CASES):
        if not all(outcome.succeeded for outcome in outcomes):
            raise SystemExit(str(outcomes))
        pairs = [pair for outcome in outcomes for pair in outcome.result[case]]
        number, address = (statistics.median(column) for column in zip(*pairs, strict=True))
        saved = sorted(slow - fast for fast, slow in pairs)
        print(f"{rows:5}, {nbytes:8}: {address:6.0f} {number:6.0f}  {statistics.median(saved):4.0f}", end=" ")
        print(f"({saved[0]:.0f} to {saved[-1]:.0f})")


if __name__ == "__main__":
    main()
