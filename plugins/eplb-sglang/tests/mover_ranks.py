"""What the ranks of `test_mover.py` do: weights of a made-up model, moved without SGLang."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import engine_env
import numpy as np
import torch
import torch.distributed as dist
from eplb_sglang import signatures
from eplb_sglang.mover import ExpertMover, Group, RearrangementFailedError
from eplb_sglang.survivors import Placement

from eplb_core import StatelessGroup
from eplb_core.launch.local_ranks import RankEnvironment

LAYERS = (1, 2, 5)
"""The layers with experts, of a model of six."""
MODEL_LAYERS = 6
POISON = 0xA5
WIDE = 20_000
"""Elements of the largest row, so that a small window takes several steps."""


def placement(world: int, slots: int, experts: int, seed: int) -> Placement:
    """Return a random placement of all layers of the model, every expert at least once; zeros where there are none."""
    random = np.random.default_rng(seed)
    found = np.zeros((MODEL_LAYERS, world * slots), np.int64)
    for layer in LAYERS:
        more = random.integers(0, experts, world * slots - experts)
        found[layer] = random.permutation(np.concatenate([np.arange(experts), more]))
    return found


def content(layer: int, tensor: int, expert: int, nbytes: int) -> torch.Tensor:
    """Return what the bytes of an expert are; unlike the others' in every layer and tensor."""
    numbers = torch.arange(nbytes)
    return (numbers * 7 + expert * 31 + layer * 5 + tensor * 3 + (numbers >> 8) + 1).to(torch.uint8)


def memory(tensor: torch.Tensor, slot: int) -> torch.Tensor:
    """Return a slot's bytes as they lie in memory, uint8 `[bytes]`."""
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    nbytes = tensor.stride(0) * tensor.element_size()
    return whole[slot * nbytes : (slot + 1) * nbytes]


def weights(rank: int, slots: int, held: Placement) -> dict[int, list[torch.Tensor]]:
    """Return this rank's slots, filled as `held` says and poisoned where that is -1; one tensor is transposed."""
    found: dict[int, list[torch.Tensor]] = {}
    for layer in LAYERS:
        found[layer] = [
            torch.empty(slots, WIDE),
            torch.empty(slots, 6, 10).transpose(1, 2),
            torch.empty(slots, 24, dtype=torch.float8_e4m3fn),
        ]
        for number, tensor in enumerate(found[layer]):
            for slot in range(slots):
                expert, row = int(held[layer, rank * slots + slot]), memory(tensor, slot)
                row.copy_(content(layer, number, expert, len(row)) if expert >= 0 else torch.full_like(row, POISON))
    return found


def wrong(rank: int, slots: int, expected: Placement, tensors: dict[int, list[torch.Tensor]]) -> list[str]:
    """Return the slots that do not hold the bytes of the expert that `expected` says; -1 is not looked at."""
    found = []
    for layer in LAYERS:
        for slot in range(slots):
            expert = int(expected[layer, rank * slots + slot])
            rows = [memory(tensor, slot) for tensor in tensors[layer]]
            if expert >= 0 and not all(
                torch.equal(row, content(layer, n, expert, len(row))) for n, row in enumerate(rows)
            ):
                found.append(f"layer {layer}, slot {slot}: not the bytes of expert {expert}")
    return found


def group(environment: RankEnvironment, alive: tuple[int, ...]) -> Group:
    """Return the group of some ranks."""
    store = dist.PrefixStore(f"among {alive}", environment.store)
    return Group(StatelessGroup(alive.index(environment.rank), len(alive), store), alive)


def everyone(environment: RankEnvironment) -> tuple[int, ...]:
    return tuple(range(environment.world_size))


# --- scenarios -------------------------------------------------------------------------------------------------------


def moves_layers_apart(environment: RankEnvironment, backend: str) -> list[str]:
    """Move layer 2 alone, then all of them to a third placement."""
    rank, slots, experts = environment.rank, 3, 5
    first, second, third = (placement(environment.world_size, slots, experts, seed) for seed in (1, 2, 3))
    tensors = weights(rank, slots, first)
    mover = ExpertMover(backend, tensors, group(environment, everyone(environment)))
    assert mover.fits(tensors, everyone(environment))
    assert not mover.fits(tensors, everyone(environment)[:-1])
    assert not mover.fits(weights(rank, slots, first), everyone(environment))
    mover.move(first, second, [2])
    between = first.copy()
    between[2] = second[2]
    found = wrong(rank, slots, between, tensors)
    moved = mover.move(between, third, LAYERS, verify=True)
    assert moved.missing == {}
    mover.close()
    mover.close()
    return found + wrong(rank, slots, third, tensors)


def outlives_a_rank(environment: RankEnvironment, backend: str) -> dict[str, Any] | None:
    """Rank 1 of three is gone. Expert 2 has a copy elsewhere; expert 3 has none in layers 1 and 5.

    What is missing is then filled in, as SGLang does, and everything moves once more.
    """
    rank, slots, alive = environment.rank, 2, (0, 2)
    if rank == 1:
        return None
    old, new = (np.zeros((MODEL_LAYERS, 6), np.int64) for _ in range(2))
    old[1], new[1] = [0, 1, 2, 3, 2, 0], [2, 3, 0, 0, 0, 1]
    old[2], new[2] = [0, 1, 2, 3, 2, 3], [0, 2, 0, 0, 3, 1]
    old[5], new[5] = [0, 1, 2, 3, 2, 1], [0, 1, 0, 0, 2, 3]
    tensors = weights(rank, slots, old)
    mover = ExpertMover(backend, tensors, group(environment, alive))
    missing = mover.move(old, new, LAYERS).missing
    reachable = new.copy()
    reachable[1, 1] = reachable[5, 5] = -1  # to be read from elsewhere
    found = wrong(rank, slots, reachable, tensors)
    for layer, slot in ((1, 1), (5, 5)):
        if slot // slots == rank:
            for number, tensor in enumerate(tensors[layer]):
                row = memory(tensor, slot % slots)
                row.copy_(content(layer, number, 3, len(row)))
    again = new.copy()
    again[:, :2], again[:, 4:] = new[:, 4:], new[:, :2]
    assert mover.move(new, again, LAYERS).missing == {}
    assert mover.move(again, new, LAYERS).missing == {}
    mover.move(new, again, LAYERS)
    mover.close()
    again[:, 2:4] = -1
    return {"missing": missing, "wrong": found + wrong(rank, slots, again, tensors)}


def fails_half_way(environment: RankEnvironment, backend: str) -> dict[str, Any]:
    """Move over a transport that fails in its second step, then on over a sound one from where it stopped."""
    rank, slots, experts = environment.rank, 4, 6
    with tempfile.TemporaryDirectory() as site:
        entry_points = f"[eplb.backends]\n{backend} = sabotaged:{backend.upper()}\n"
        engine_env.add_distribution(Path(site), "eplb-harmful", entry_points)
        sys.path.insert(0, site)
        environment.init_process_group()
        from eplb_core import TorchGroups

        old, new = (placement(environment.world_size, slots, experts, seed) for seed in (4, 5))
        tensors = weights(rank, slots, old)
        between = Group(TorchGroups(), everyone(environment))
        mover = ExpertMover(backend, tensors, between)
        try:
            mover.move(old, new, LAYERS)
        except RearrangementFailedError as failure:
            held = failure.placement
        else:
            raise AssertionError("nothing failed")
        mover.close()
    found = wrong(rank, slots, held, tensors)
    mover = ExpertMover("torch_gloo", tensors, between)
    mover.move(held, new, LAYERS)
    mover.close()
    rows = list(LAYERS)
    return {
        "wrong": found + wrong(rank, slots, new, tensors),
        "held": held[rows].tolist(),
        "halfway": bool((held[rows] != old[rows]).any() and (held[rows] != new[rows]).any()),
        "empty": bool((held[rows] == -1).any()),
    }


def outlives_a_rank_inside_sglang(environment: RankEnvironment, backend: str) -> dict[str, Any] | None:
    """The same through the hook, with what SGLang says of its ranks: rank 1 dies between two rearrangements."""
    from eplb_sglang import choice
    from eplb_sglang.hooks import Hooks

    rank, slots, world = environment.rank, 2, environment.world_size
    environment.init_process_group()
    state = SimpleNamespace(active_ranks_cpu=torch.ones(world, dtype=torch.int32), has_scaled=False)
    pretend_to_be_sglang(rank, state)
    first, second = (placement(world, slots, 4, seed) for seed in (6, 7))
    second[1] = [0, 1, 2, 3, 2, 0]  # expert 3 on rank 1 alone
    third = second.copy()
    third[1] = [3, 2, 0, 0, 0, 1]
    tensors = weights(rank, slots, first)
    hooks = Hooks(choice.Choice(backend, None, "serve", "leave"))
    before = hooks.move(tensors, metadata(first), metadata(second), LAYERS, 1, rank)
    found = wrong(rank, slots, second, tensors)
    environment.store.set(f"moved/{rank}", "yes")
    environment.store.wait([f"moved/{other}" for other in range(world)])
    if rank == 1:
        return None
    state.active_ranks_cpu[1] = 0
    missing = hooks.move(tensors, metadata(second), metadata(third), [1], 1, rank)
    hooks.release()
    reachable = third.copy()
    reachable[1, 0] = -1
    reachable[:, 2:4] = -1
    return {"before": before, "missing": missing, "wrong": found + wrong(rank, slots, reachable, tensors)}


def metadata(held: Placement) -> SimpleNamespace:
    return SimpleNamespace(physical_to_logical_map_cpu=torch.from_numpy(held.copy()))


def pretend_to_be_sglang(rank: int, state: SimpleNamespace) -> None:
    """Put what the plugin asks of SGLang's modules into modules of their names."""
    elastic, runtime = ModuleType(signatures.ELASTIC), ModuleType("sglang.srt.runtime_context")
    parallel = SimpleNamespace(tp_rank=rank, ep_join_rank_offset=0, nnodes=1)
    elastic.ElasticEPStateManager = SimpleNamespace(instance=lambda: state)  # type: ignore[attr-defined]
    runtime.get_parallel = lambda: parallel  # type: ignore[attr-defined]
    for module in (elastic, runtime):
        *parents, _ = module.__name__.split(".")
        for depth in range(1, len(parents) + 1):
            sys.modules.setdefault(".".join(parents[:depth]), ModuleType(parents[depth - 1]))
        sys.modules[module.__name__] = module
