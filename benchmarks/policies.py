"""How much the `incremental` policy moves against fresh plans of the same balance, and how long it takes.

    python benchmarks/policies.py                 # all, a few minutes with numba (extra `policies`)
    python benchmarks/policies.py moves --seeds 2

Loads are lognormal (deviation 1 of the logarithm) or Zipf's law in random order; a drift of 20 % multiplies each by
exp(normal(0, 0.2)). Plans are judged by the true loads. Seconds are CPU seconds of one core, the best of three.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from eplb_core.planning.placement import imbalance
from eplb_core.planning.plan import RearrangementPlan, plan_rearrangement
from eplb_core.policies import PlacementRequest, minimize_movement, slots_anew
from eplb_core.policies.compiled import COMPILES
from eplb_core.policies.deepseek import POLICY as FRESH
from eplb_core.policies.incremental import POLICY, IncrementalOptions
from eplb_core.scheduling.layer import LayerMoves
from eplb_core.scheduling.schedule import Share, Step, in_turn, schedule_steps

LAYERS, EXPERTS = 58, 256
SLOTS = {8: 288, 32: 288, 64: 320, 256: 512}
DRIFTS = (0.05, 0.2, 0.5)
EXPERT_BYTES, WINDOW = 44_064_000, 192 << 20


def main() -> None:
    """Run the parts that are named, or all."""
    parts: dict[str, Callable[[int], None]] = {
        "moves": moves,
        "balance": balance,
        "noise": noise,
        "time": seconds,
        "schedules": schedules,
        "nodes": nodes,
        "wear": wear,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="which parts; all if none is named")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"numba: {'yes' if COMPILES else 'no'}; {arguments.seeds} seeds", flush=True)
    for name in arguments.parts or parts:
        print(f"\n== {name}", flush=True)
        parts[name](arguments.seeds)


def make_loads(kind: str, random: np.random.Generator) -> np.ndarray:
    """Return loads `[layers, experts]`."""
    if kind == "lognormal":
        return random.lognormal(0, 1, (LAYERS, EXPERTS))
    return np.stack([random.permutation(1 / np.arange(1, EXPERTS + 1)) for _ in range(LAYERS)])


def before_and_after(kind: str, drift: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return loads and what has become of them."""
    random = np.random.default_rng(seed)
    loads = make_loads(kind, random)
    return loads, loads * np.exp(random.normal(0, drift, loads.shape))


def share_anew(old: np.ndarray, new: np.ndarray, ranks: int) -> float:
    """Return the share of the slots that is received anew."""
    return float(slots_anew(old, new, ranks).sum() / old.size)


def moves(seeds: int) -> None:
    """Slots anew against the fresh plan's, as good as fresh in every layer."""
    print(
        "ranks  loads      drift   fresh: imbalance, anew   ours: imbalance, anew   ratio   worst layer against fresh"
    )
    for ranks, slots in SLOTS.items():
        sizes: dict[str, Any] = {"num_slots": slots, "num_ranks": ranks}
        for kind in ("lognormal", "zipf"):
            for drift in DRIFTS:
                rows = []
                for seed in range(seeds):
                    loads, later = before_and_after(kind, drift, seed)
                    old, fresh = FRESH.rebalance(loads, **sizes), FRESH.rebalance(later, **sizes)
                    ours = POLICY.rebalance(later, old=old, **sizes)
                    theirs, own = imbalance(fresh, later, ranks), imbalance(ours, later, ranks)
                    worse = float((own / theirs).max() - 1)
                    rows.append(
                        (theirs.mean(), share_anew(old, fresh, ranks), own.mean(), share_anew(old, ours, ranks), worse)
                    )
                mean = np.mean(rows, axis=0)
                print(
                    f"{ranks:5d}  {kind:9s} {drift:6.0%} {mean[0]:16.4f}, {mean[1]:6.1%} {mean[2]:16.4f}, "
                    f"{mean[3]:6.2%}   1/{mean[1] / mean[3]:.1f}   {max(row[4] for row in rows):+.1e}",
                    flush=True,
                )


def balance(seeds: int) -> None:
    """What balance 256 ranks reach for half of the fresh plan's slots."""
    sizes: dict[str, Any] = {"num_slots": 512, "num_ranks": 256}
    policy = POLICY.with_options(IncrementalOptions(imbalance=1.03))
    print("loads      drift   fresh: imbalance, anew   imbalance=1.03: imbalance, anew")
    for kind in ("lognormal", "zipf"):
        for drift in DRIFTS:
            rows = []
            for seed in range(seeds):
                loads, later = before_and_after(kind, drift, seed)
                old, fresh = FRESH.rebalance(loads, **sizes), FRESH.rebalance(later, **sizes)
                ours = policy.rebalance(later, old=old, **sizes)
                values = [(imbalance(each, later, 256).mean(), share_anew(old, each, 256)) for each in (fresh, ours)]
                rows.append([value for pair in values for value in pair])
            mean = np.mean(rows, axis=0)
            print(f"{kind:9s} {drift:6.0%} {mean[0]:16.4f}, {mean[1]:6.1%} {mean[2]:24.4f}, {mean[3]:6.1%}", flush=True)


def noise(seeds: int) -> None:
    """Slots that move for two samples of the same loads: none should."""
    print("ranks  tokens   fresh anew   counts=on: anew   window of 16: anew   true imbalance: fresh, counts=on")
    for ranks in (8, 64, 256):
        sizes: dict[str, Any] = {"num_slots": SLOTS[ranks], "num_ranks": ranks}
        for tokens in (64_000, 4_000, 500):
            rows = []
            for seed in range(seeds):
                random = np.random.default_rng(seed)
                true = make_loads("lognormal", random)
                true *= tokens * EXPERTS / true.sum(axis=1, keepdims=True)
                old = FRESH.rebalance(random.poisson(true), **sizes)
                window = random.poisson(true / 16, (16, *true.shape))
                sample = window.sum(axis=0)
                fresh = FRESH.rebalance(sample, **sizes)
                counts = POLICY.with_options(IncrementalOptions(counts=True)).rebalance(sample, old=old, **sizes)
                windowed = POLICY.decide(PlacementRequest(loads=window, old=old, **sizes)).placement
                plans = (fresh, counts, windowed)
                rows.append(
                    [share_anew(old, each, ranks) for each in plans]
                    + [imbalance(each, true, ranks).mean() for each in (fresh, counts)]
                )
            mean = np.mean(rows, axis=0)
            print(
                f"{ranks:5d} {tokens:7,d} {mean[0]:12.1%} {mean[1]:17.3%} {mean[2]:20.3%} "
                f"{mean[3]:20.4f}, {mean[4]:.4f}",
                flush=True,
            )


def best_of_three(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return CPU seconds, and what the work returned."""
    times = []
    result = None
    for _ in range(3):
        began = time.process_time()
        result = work()
        times.append(time.process_time() - began)
    return min(times), result


def seconds(seeds: int) -> None:
    """Policy, plan and schedule of 58 layers on one core."""
    print("ranks  loads      drift   policy    plan   schedule   together")
    for ranks, slots in SLOTS.items():
        sizes: dict[str, Any] = {"num_slots": slots, "num_ranks": ranks}
        for kind in ("lognormal", "zipf"):
            for drift in DRIFTS:
                loads, later = before_and_after(kind, drift, 0)
                old = FRESH.rebalance(loads, **sizes)
                decided, new = best_of_three(lambda: POLICY.rebalance(later, old=old, **sizes))  # noqa: B023
                planned, plan = best_of_three(lambda: plan_rearrangement(old, new, ranks))  # noqa: B023
                scheduled, _ = best_of_three(
                    lambda: schedule_steps(plan, EXPERT_BYTES, window_bytes=WINDOW, in_place_from=1 << 30)  # noqa: B023
                )
                print(
                    f"{ranks:5d}  {kind:9s} {drift:6.0%} {decided:8.3f} {planned:7.3f} {scheduled:10.3f} "
                    f"{decided + planned + scheduled:10.3f}",
                    flush=True,
                )


def schedules(seeds: int) -> None:
    """`schedule_steps` of real plans: experts of 44 MB, a window of 192 MiB."""
    print("ranks  plan          moves   CPU (step as 24 MiB): alone, rank, steps   GPU (1 GiB): alone, rank, steps")
    for ranks, slots in SLOTS.items():
        sizes: dict[str, Any] = {"num_slots": slots, "num_ranks": ranks}
        loads, later = before_and_after("lognormal", 0.2, 0)
        old, fresh = FRESH.rebalance(loads, **sizes), FRESH.rebalance(later, **sizes)
        plans = {
            "fresh": fresh,
            "relabelled": minimize_movement(old, fresh, ranks),
            "incremental": POLICY.rebalance(later, old=old, **sizes),
        }
        for name, new in plans.items():
            plan = plan_rearrangement(old, new, ranks)
            cells = []
            for step_bytes in (24 << 20, 1 << 30):
                alone, own, steps = schedule_alone_and_shared(plan, ranks, step_bytes)
                cells.append(f"{alone:.3f}, {own:.3f}, {steps}")
            print(f"{ranks:5d}  {name:11s} {plan.num_moves:7d} {cells[0]:>40s} {cells[1]:>32s}", flush=True)


def schedule_alone_and_shared(plan: RearrangementPlan, ranks: int, step_bytes: int) -> tuple[float, float, int]:
    """Return seconds of one process alone, of the busiest rank where ranks share the work, and the steps."""
    taken = dict.fromkeys(range(ranks), 0.0)

    def share(cut: Callable[[int], list[LayerMoves]], groups: int) -> list[list[LayerMoves]]:
        shares = []
        for rank in range(min(ranks, groups)):
            began = time.process_time()
            shares.append(msgspec.msgpack.encode({group: cut(group) for group in range(rank, groups, ranks)}))
            taken[rank] = time.process_time() - began
        cuts: dict[int, list[LayerMoves]] = {}
        for encoded in shares:
            cuts |= msgspec.msgpack.decode(encoded, type=dict[int, list[LayerMoves]])
        return [cuts[group] for group in range(groups)]

    def schedule(share: Share) -> list[Step]:
        return schedule_steps(plan, EXPERT_BYTES, window_bytes=WINDOW, in_place_from=step_bytes, share=share)

    alone, steps = best_of_three(lambda: schedule(in_turn))
    own = []
    for _ in range(3):
        taken.update(dict.fromkeys(range(ranks), 0.0))
        began = time.process_time()
        schedule(share)
        own.append(time.process_time() - began - sum(taken.values()) + max(taken.values()))
    return alone, min(own), len(steps)


def nodes(seeds: int) -> None:
    """DeepSeek-V3 with its eight groups kept on nodes."""
    print("nodes x ranks   drift   fresh: imbalance, anew   ours: imbalance, anew   ratio   plans")
    for num_nodes, ranks, slots in ((4, 32, 288), (8, 64, 320)):
        sizes: dict[str, Any] = {"num_slots": slots, "num_ranks": ranks, "num_nodes": num_nodes, "num_groups": 8}
        for drift in DRIFTS:
            rows, plans = [], []
            for seed in range(seeds):
                loads, later = before_and_after("lognormal", drift, seed)
                old, fresh = FRESH.rebalance(loads, **sizes), FRESH.rebalance(later, **sizes)
                decision = POLICY.decide(PlacementRequest(loads=later, old=old, **sizes))
                plans.extend(decision.plans)
                values = [
                    (imbalance(each, later, ranks).mean(), share_anew(old, each, ranks))
                    for each in (fresh, decision.placement)
                ]
                rows.append([value for pair in values for value in pair])
            mean = np.mean(rows, axis=0)
            counted = {name: plans.count(name) for name in sorted(set(plans))}
            print(
                f"{num_nodes:5d} x {ranks // num_nodes:<5d} {drift:8.0%} {mean[0]:14.4f}, {mean[1]:6.1%} "
                f"{mean[2]:16.4f}, {mean[3]:6.2%}   1/{mean[1] / mean[3]:.1f}   {counted}",
                flush=True,
            )


def wear(seeds: int) -> None:
    """1,000 rebalances in a row, 16 ranks, 64 experts in 80 slots, 8 layers."""
    random = np.random.default_rng(0)
    spread = random.normal(0, 1, (8, 64))
    sizes: dict[str, Any] = {"num_slots": 80, "num_ranks": 16}
    old = FRESH.rebalance(np.exp(spread), **sizes)
    share, worse = [], 0.0
    for _ in range(1000):
        spread = 0.9 * spread + np.sqrt(1 - 0.9**2) * random.normal(0, 1, spread.shape)
        loads = np.exp(spread)
        new = POLICY.rebalance(loads, old=old, **sizes)
        worse = max(
            worse, float((imbalance(new, loads, 16) / imbalance(FRESH.rebalance(loads, **sizes), loads, 16)).max())
        )
        share.append(share_anew(old, new, 16))
        old = new
    hundreds = ", ".join(f"{np.mean(share[first : first + 100]):.1%}" for first in range(0, 1000, 100))
    print(f"slots anew, mean of each hundred: {hundreds}; worst layer against fresh {worse - 1:+.1e}")


if __name__ == "__main__":
    main()
