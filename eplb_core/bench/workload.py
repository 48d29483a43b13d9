"""The input of a benchmark: a sequence of placements, and the bytes of one expert's tensors.

It is stored as an `.npz` of three arrays, which any contestant can read:

    placements    int64 [steps + 1, layers, ranks * slots]  slot -> expert; step i goes from row i to i + 1
    tensor_bytes  int64 [tensors]                           bytes of one expert's tensors, in order
    ranks         int64 []
"""

from __future__ import annotations

import itertools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eplb_core.arrays import IntArray
from eplb_core.errors import InputError, PlacementError
from eplb_core.planning.placement import EMPTY, check_pair

_LEAST_EXPERT_BYTES = 384
_SCALE_BLOCK = 4096  # bytes of weights per byte of scales, as for float8 in 128 x 128 blocks with float32 scales


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Placements to go through in order.

    Attributes:
        placements: int64 `[steps + 1, layers, ranks * slots]`.
        tensor_bytes: bytes of each tensor of one expert; the same in every layer.
        num_ranks: how many ranks share the slots.
    """

    placements: IntArray
    tensor_bytes: tuple[int, ...]
    num_ranks: int

    @property
    def num_steps(self) -> int:
        """Rearrangements."""
        return len(self.placements) - 1

    @property
    def num_layers(self) -> int:
        """Layers."""
        return int(self.placements.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """Slots of one rank in one layer."""
        return int(self.placements.shape[2]) // self.num_ranks

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in one layer."""
        return sum(self.tensor_bytes)

    @property
    def rank_bytes(self) -> int:
        """Bytes of the weights of one rank."""
        return self.num_layers * self.slots_per_rank * self.expert_bytes

    def local(self, step: int, rank: int) -> IntArray:
        """Return what a rank's slots hold before step `step`, int64 `[layers, slots]`; -1 counts from the end."""
        per_rank = self.slots_per_rank
        local: IntArray = self.placements[step, :, rank * per_rank : (rank + 1) * per_rank]
        return local

    def arriving_bytes(self) -> float:
        """Return the mean bytes per step of experts that are new to their rank, all ranks together."""
        arriving = 0
        for step in range(self.num_steps):
            for rank in range(self.num_ranks):
                for before, after in zip(self.local(step, rank), self.local(step + 1, rank), strict=True):
                    arriving += len(set(after.tolist()) - set(before.tolist()) - {EMPTY})
        return arriving * self.expert_bytes / self.num_steps


def make_workload(
    *,
    ranks: int = 2,
    layers: int = 4,
    slots: int = 16,
    redundant: int = 4,
    expert_bytes: int = 3 << 20,
    steps: int = 6,
    churn: float = 1.0,
    swaps: int | None = None,
    seed: int = 0,
) -> Workload:
    """Return random placements that hold every expert at least once.

    Its arrays are identical, bit for bit, to those of `benchmarks/make_workload.py`.

    Args:
        ranks: how many ranks.
        layers: how many layers.
        slots: slots of one rank in one layer.
        redundant: slots of a layer, all ranks together, that hold an extra copy of an expert.
        expert_bytes: approximate bytes of one expert: two matrices, rounded, and their scales.
        steps: how many rearrangements.
        churn: the share of the slots that a step redraws; 1 is all.
        swaps: instead of `churn`, how many pairs of experts two ranks swap in a step, over all layers. 0 moves
            nothing.
        seed: of the random numbers.

    Raises:
        InputError: a number is out of range, or the slots leave no room for that many swaps.
    """
    for name, value in (("ranks", ranks), ("layers", layers), ("slots", slots), ("steps", steps)):
        if value < 1:
            raise InputError(f"--{name} is {value}", why="it must be 1 or more")
    total = ranks * slots
    if total < 2:
        raise InputError("one slot leaves nothing to rearrange", remedy="give more --slots or more --ranks")
    if not 0 <= redundant < total:
        raise InputError(
            f"--redundant is {redundant}", why=f"it must be 0 or more, and less than ranks * slots = {total}"
        )
    if expert_bytes < _LEAST_EXPERT_BYTES:
        raise InputError(f"--expert-bytes is {expert_bytes}", why=f"it must be {_LEAST_EXPERT_BYTES} or more")
    if not 0 < churn <= 1:
        raise InputError(f"--churn is {churn:g}", why="it must be above 0, and at most 1")
    if swaps is not None and swaps < 0:
        raise InputError(f"--swaps is {swaps}", why="it must be 0 or more")
    if swaps is not None and churn != 1:
        raise InputError("--swaps and --churn were given", why="both define how much moves", remedy="give only one")
    if seed < 0:
        raise InputError(f"--seed is {seed}", why="it must be 0 or more")
    rng = np.random.default_rng(seed)
    logical = total - redundant
    first = [rng.permutation(np.r_[:logical, rng.integers(0, logical, redundant)]) for _ in range(layers)]
    rows = [np.stack(first)]
    for _ in range(steps):
        following = rows[-1].copy()
        if swaps is None:
            for layer in following:
                chosen = rng.choice(total, max(2, round(churn * total)), replace=False)
                layer[chosen] = layer[rng.permutation(chosen)]
        else:
            order = rng.permutation(layers)
            for number in range(swaps):
                _swap(following[order[number % layers]], rows[-1][order[number % layers]], slots, rng)
        rows.append(following)
    third = expert_bytes // 3 // 128 * 128
    matrices = (2 * third, third)
    scales = tuple(max(size // _SCALE_BLOCK, 1) for size in matrices)
    return Workload(np.stack(rows).astype(np.int64), (*matrices, *scales), ranks)


def _swap(layer: IntArray, before: IntArray, slots: int, rng: np.random.Generator) -> None:
    """Swap two experts between ranks that lack each other's, in slots that have not changed since `before`.

    Raises:
        InputError: no two such slots exist.
    """
    some = rng.permutation(np.flatnonzero(layer == before))
    held = {
        rank: {*layer[rank * slots :][:slots].tolist(), *before[rank * slots :][:slots].tolist()}
        for rank in some // slots
    }
    for number, one in enumerate(some.tolist()):
        for other in some[number + 1 :].tolist():
            if layer[one] not in held[other // slots] and layer[other] not in held[one // slots]:
                layer[[one, other]] = layer[[other, one]]
                return
    raise InputError(
        "--swaps is more than the slots leave room for",
        why="a swap takes two slots of different ranks, each with an expert that the other rank lacks",
        remedy="give fewer --swaps or --redundant, or more --slots, --layers or --ranks",
    )


def read_workload(path: Path) -> Workload:
    """Read a workload from an `.npz`.

    Raises:
        InputError: the file cannot be read, lacks an array, or one has the wrong shape or type.
        PlacementError: a placement is not valid, or cannot be reached from the one before it.
    """
    arrays = _read_arrays(path)
    where = str(path)
    ranks, sizes, placements = arrays["ranks"], arrays["tensor_bytes"], arrays["placements"]
    for name, array in arrays.items():
        if array.dtype.kind not in "iu":
            raise InputError(f"'{name}' must hold whole numbers, not {array.dtype}", where=where)
    if ranks.size != 1 or ranks.item() < 1:
        raise InputError(f"'ranks' must be one number, 1 or more, not {ranks.tolist()}", where=where)
    if sizes.ndim != 1 or not sizes.size or sizes.min() < 1:
        raise InputError(f"'tensor_bytes' must be a list of numbers, each 1 or more, not {sizes.tolist()}", where=where)
    if placements.ndim != 3 or len(placements) < 2 or not placements.size:
        raise InputError(
            f"'placements' must be [steps + 1, layers, slots] with at least one step, not {list(placements.shape)}",
            where=where,
        )
    placements = placements.astype(np.int64)
    num_ranks = int(ranks.item())
    for step, (old, new) in enumerate(itertools.pairwise(placements)):
        try:
            check_pair(old, new, num_ranks)
        except PlacementError as error:
            raise PlacementError(f"step {step} is not valid", where=where, why=str(error)) from error
    return Workload(placements, tuple(int(size) for size in sizes), num_ranks)


def _read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    remedy = "write one with benchmarks/make_workload.py, or omit --workload"
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise InputError("the workload is not an .npz file", where=str(path), remedy=remedy)
        with loaded as file:
            return {name: file[name] for name in ("ranks", "tensor_bytes", "placements")}
    except OSError as error:
        raise InputError("cannot read the workload", where=str(path), why=error.strerror or str(error)) from error
    except KeyError as error:
        raise InputError(
            "the workload lacks an array", where=str(path), why=str(error.args[0]), remedy=remedy
        ) from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError("the workload is not an .npz file", where=str(path), why=str(error), remedy=remedy) from error
