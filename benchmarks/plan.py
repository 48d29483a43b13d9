"""How long planning and scheduling take, on one core: `python benchmarks/plan.py`. Needs no ranks and no GPU."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from eplb_core.planning.plan import plan_rearrangement
from eplb_core.scheduling.schedule import schedule_steps

LAYERS, EXPERTS, EXPERT_BYTES = 58, 256, 44_040_192  # DeepSeek-V3
RANKS_PER_NODE = 8


def milliseconds(function: Callable[[], object], repeat: int) -> float:
    """Return the median of the processor time that the function takes."""
    function()
    times = []
    for _ in range(repeat):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return 1e3 * float(np.median(times))


def placements(slots: int, churn: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two random placements `[LAYERS, slots]`, of which the share `churn` of the slots differs."""
    random = np.random.default_rng(seed)
    copies = np.concatenate([np.arange(EXPERTS), random.integers(0, EXPERTS, slots - EXPERTS)])
    old = np.stack([random.permutation(copies) for _ in range(LAYERS)])
    new = old.copy()
    for row in new:
        some = random.choice(slots, round(slots * churn), replace=False)
        row[some] = random.permutation(row[some])
    return old, new


def main() -> None:
    """Print one line for each number of ranks and each share of slots that change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7, help="how often each is timed, after a first time")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    windows = {"window 256 MiB": 256 << 20, "window 1 expert": EXPERT_BYTES}
    heads = ["ranks", "slots", "nodes", "changed", "plan", "relay", "and keep_slots", *windows]
    print(" | ".join(heads))
    for ranks, slots in ((32, 288), (144, 288), (256, 512), (288, 288)):
        nodes = np.arange(ranks) // RANKS_PER_NODE
        for churn in (0.1, 1.0):
            old, new = placements(slots, churn, given.seed)
            planned = partial(plan_rearrangement, old, new, ranks, nodes)
            functions = [partial(planned, relay=False), planned, partial(planned, keep_slots=True)]
            plan = functions[-1]()
            functions += [
                partial(schedule_steps, plan, EXPERT_BYTES, window_bytes=window) for window in windows.values()
            ]
            values = [milliseconds(function, given.repeat) for function in functions]
            cells = [
                str(ranks),
                str(slots),
                str(nodes[-1] + 1),
                f"{churn:.0%}",
                *(f"{value:.1f} ms" for value in values),
            ]
            print(" | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
