#!/usr/bin/env python3
"""Write one rearrangement workload as an .npz that every contestant reads, so all move the same experts.

Needs only numpy. `eplb bench` without --workload makes the same arrays, bit for bit, from the same numbers.

Arrays in the file:
    placements    int64 [steps + 1, layers, ranks * slots]  slot -> expert; step i goes from row i to i + 1
    tensor_bytes  int64 [tensors]                           bytes of one expert's tensors, in order
    ranks         int64 []
Each placement holds every logical expert at least once. `--churn` is the share of slots that a step redraws (1 = all).
`--swaps`, instead of it, is how many pairs of experts change places between ranks in a step, over all layers; 0 moves
nothing.
"""

from __future__ import annotations

import argparse

import numpy as np

DEFAULTS = {"ranks": 2, "layers": 4, "slots": 16, "redundant": 4, "expert_bytes": 3 << 20, "steps": 6, "seed": 0}


def make(
    ranks: int,
    layers: int,
    slots: int,
    redundant: int,
    expert_bytes: int,
    steps: int,
    churn: float,
    seed: int,
    swaps: int | None = None,
) -> dict[str, np.ndarray]:
    """Return the arrays of the file."""
    rng = np.random.default_rng(seed)
    total = ranks * slots
    logical = total - redundant
    if not 0 <= redundant < total:
        raise SystemExit("--redundant must lie in [0, ranks * slots)")
    rows = [np.stack([rng.permutation(np.r_[:logical, rng.integers(0, logical, redundant)]) for _ in range(layers)])]
    for _ in range(steps):
        nxt = rows[-1].copy()
        if swaps is None:
            for layer in nxt:
                chosen = rng.choice(total, max(2, round(churn * total)), replace=False)
                layer[chosen] = layer[rng.permutation(chosen)]
        else:
            order = rng.permutation(layers)
            for number in range(swaps):
                swap(nxt[order[number % layers]], rows[-1][order[number % layers]], slots, rng)
        rows.append(nxt)
    big = expert_bytes // 3 // 128 * 128
    return {
        "placements": np.stack(rows).astype(np.int64),
        "tensor_bytes": np.array([2 * big, big, max(2 * big // 4096, 1), max(big // 4096, 1)], np.int64),
        "ranks": np.array(ranks, np.int64),
    }


def swap(layer: np.ndarray, before: np.ndarray, slots: int, rng: np.random.Generator) -> None:
    """Let two ranks exchange an expert that the other one lacks, in slots that have not changed since `before`."""
    free = rng.permutation(np.flatnonzero(layer == before))

    def lacks(rank: int, expert: int) -> bool:
        mine = slice(rank * slots, (rank + 1) * slots)
        return expert not in layer[mine] and expert not in before[mine]

    for i, a in enumerate(free):
        for b in free[i + 1 :]:
            if lacks(b // slots, layer[a]) and lacks(a // slots, layer[b]):
                layer[a], layer[b] = layer[b], layer[a]
                return
    raise SystemExit("--swaps is more than the slots leave room for")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out")
    for name, default in DEFAULTS.items():
        p.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    how_much = p.add_mutually_exclusive_group()
    how_much.add_argument("--churn", type=float, default=1.0)
    how_much.add_argument("--swaps", type=int)
    a = vars(p.parse_args())
    np.savez(a.pop("out"), **make(**a))
