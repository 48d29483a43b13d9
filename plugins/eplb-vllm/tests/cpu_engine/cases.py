"""vLLM's own functions over this plugin's communicator, on CPU ranks without an engine; prints what was wrong.

    python -m cpu_engine.cases RESULT.json BACKEND...

The worlds, layers, slots and experts are those of vLLM's test suite. vLLM is imported once; the ranks are forked.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

SHAPES = {
    2: [(1, 2, 3), (2, 3, 4), (4, 8, 16)],
    3: [(2, 3, 5)],
    4: [(1, 2, 6), (2, 2, 5), (8, 8, 16)],
}
"""World -> (layers, local slots, logical experts)."""

POISON = 0xA5


def main() -> None:
    import vllm.distributed.eplb.eplb_communicator
    import vllm.distributed.eplb.rebalance_execute
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    torch.set_num_threads(1)
    results: dict[str, str] = {}
    context = multiprocessing.get_context("fork")
    for world in SHAPES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        queue = context.Queue()
        ranks = [
            context.Process(target=rank_main, args=(rank, world, port, sys.argv[2:], queue)) for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for _ in range(world):
            rank, answers = queue.get(timeout=240)
            results |= {f"{name} [rank {rank}]": answer for name, answer in answers.items()}
        for process in ranks:
            process.join(30)
            process.kill()
    Path(sys.argv[1]).write_text(json.dumps(results))
    assert vllm


def rank_main(rank: int, world: int, port: int, backends: list[str], queue: Any) -> None:
    store = dist.TCPStore("127.0.0.1", port, world, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    answers: dict[str, str] = {}
    for name, case in cases(rank, world, backends, store):
        try:
            problem = case()
        except Exception:  # noqa: BLE001 - the test shows it
            problem = traceback.format_exc()
        answers[name] = problem
        dist.barrier()
    queue.put((rank, answers))
    queue.close()
    queue.join_thread()
    store.set(f"done {rank}", "yes")
    store.wait([f"done {other}" for other in range(world)])
    if rank == 0:
        time.sleep(0.5)  # the others have read the answer to their last wait
    os._exit(0)


def cases(rank: int, world: int, backends: list[str], store: dist.Store) -> Iterator[tuple[str, Callable[[], str]]]:
    """All cases of a world, in an order that is the same on every rank."""
    whole = dist.group.WORLD
    for backend in backends:
        for shape in SHAPES[world]:
            for path in ("all layers", "one layer", "batched"):
                name = f"{backend}, {path}, world {world}, {shape}"
                yield name, functools.partial(moves, rank, whole, backend, shape, path)
        yield f"{backend}, no change, world {world}", functools.partial(changes_nothing, rank, whole, backend, False)
        yield f"{backend}, profile, world {world}", functools.partial(changes_nothing, rank, whole, backend, True)
        if world == 2:
            yield f"{backend}, error", functools.partial(names_the_expert, rank, whole, backend)
        if world == 4:
            halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
            half = halves[rank % 2]
            yield f"{backend}, sub-groups", functools.partial(moves, rank // 2, half, backend, (2, 3, 4), "all layers")
            yield (
                f"{backend}, sub-groups one layer",
                functools.partial(moves, rank // 2, half, backend, (2, 3, 4), "one layer"),
            )
            for mapping in ({0: 0, 1: 1}, {0: 0, 1: 1, 2: -1, 3: -1}):
                growth = "grows" if len(mapping) < world else "shrinks"
                yield f"{backend}, group {growth}", functools.partial(scales, rank, whole, backend, mapping)
    if world == 2:
        yield "nixl, vLLM's elastic coordinator", functools.partial(elastic, rank, world, store)


# --- cases: each returns what was wrong, or an empty text ------------------------------------------------------------


def moves(rank: int, group: Any, backend: str, shape: tuple[int, int, int], path: str) -> str:
    from vllm.distributed.eplb import rebalance_execute as engine

    layers, slots, experts = shape
    world = group.size()
    old, new = (placement(layers, world * slots, experts, seed) for seed in (1, 2))
    weights = expert_weights(rank, slots, old)
    buffer = [poisoned(tensor) for tensor in weights[0]]
    communicator = make(rank, world, group, backend, weights, buffer)
    if path == "all layers":
        engine.rearrange_expert_weights_inplace(old, new, weights, buffer, group, communicator)
    else:
        for layer in range(layers):
            move_layer(engine, rank, group, communicator, old, new, weights, buffer, layer, batched=path == "batched")
    communicator.close()
    return wrong(rank, slots, new, weights)


def changes_nothing(rank: int, group: Any, backend: str, is_profile: bool) -> str:
    from vllm.distributed.eplb import rebalance_execute as engine

    world, slots = group.size(), 2
    old = placement(2, world * slots, world, 3)
    new = placement(2, world * slots, world, 4) if is_profile else old
    weights = expert_weights(rank, slots, old)
    if is_profile:  # vLLM gathers the weights for once, and gloo knows few dtypes
        weights = [tensors[:1] for tensors in weights]
    buffer = [poisoned(tensor) for tensor in weights[0]]
    communicator = make(rank, world, group, backend, weights, buffer)
    engine.rearrange_expert_weights_inplace(old, new, weights, buffer, group, communicator, is_profile)
    communicator.close()
    return wrong(rank, slots, old, weights)


def scales(rank: int, group: Any, backend: str, mapping: dict[int, int]) -> str:
    """The group grows from two ranks, or shrinks to two, while vLLM's placements speak of the other size."""
    from vllm.distributed.eplb import rebalance_execute as engine

    world, slots, experts, small = group.size(), 4, 6, 2
    grows = len(mapping) < world
    old = placement(2, (small if grows else world) * slots, experts, 5)
    new = placement(2, (world if grows else small) * slots, experts, 6)
    absent = torch.full((2, (world - small) * slots), -1)
    here = torch.cat([old, absent], 1) if grows else old
    weights = expert_weights(rank, slots, here)
    buffer = [poisoned(tensor) for tensor in weights[0]]
    communicator = make(rank, world, group, backend, weights, buffer)
    engine.rearrange_expert_weights_inplace(old, new, weights, buffer, group, communicator, rank_mapping=mapping)
    communicator.close()
    return wrong(rank, slots, new if grows else torch.cat([new, absent], 1), weights)


def names_the_expert(rank: int, group: Any, backend: str) -> str:
    """Rank 0 sends an expert that rank 1 does not expect: the error says which, on which layer."""
    weights = expert_weights(rank, 2, placement(1, 4, 4, 1))
    buffer = [poisoned(tensor) for tensor in weights[0]]
    communicator = make(rank, 2, group, f"{backend}{'&' if '?' in backend else '?'}timeout=5s", weights, buffer)
    communicator.set_transfer_context(None, 0)
    if rank == 0:
        communicator.add_send([tensor[1] for tensor in weights[0]], 1, expert_id=3)
    try:
        communicator.execute()
    except Exception as error:  # noqa: BLE001 - which one depends on the transport
        said = "\n".join(getattr(error, "__notes__", []))
        expected = "layer 0, queued on this rank: " + ("expert 3 to rank 1" if rank == 0 else "nothing")
        return "" if said == expected else f"{type(error).__name__} with {said!r}"
    finally:
        communicator.close()
    # Where pairs of ranks compare by themselves, a rank without anything to do has nobody to compare with.
    return "" if rank == 1 and backend.startswith("nixl") else "no error"


def elastic(rank: int, world: int, store: dist.Store) -> str:
    """VLLM's coordinator without any process group that torch knows; the old communicator is dropped, not closed."""
    from vllm.distributed.eplb import eplb_communicator
    from vllm.distributed.eplb import rebalance_execute as engine
    from vllm.distributed.stateless_coordinator import StatelessGroupCoordinator

    coordinator = StatelessGroupCoordinator(
        group_ranks=[list(range(world))],
        local_rank=rank,
        torch_distributed_backend="gloo",
        use_device_communicator=False,
        coord_store=dist.PrefixStore("elastic", store),
        group_name="eplb",
        global_rank=rank,
        global_world_size=world,
    )
    slots = 3
    placements = [placement(2, world * slots, 4, seed) for seed in (7, 8, 9)]
    weights = expert_weights(rank, slots, placements[0])
    buffer = [poisoned(tensor) for tensor in weights[0]]
    for old, new in itertools.pairwise(placements):
        communicator = eplb_communicator.create_eplb_communicator(coordinator, "eplb:nixl", weights, buffer)
        for layer in range(2):
            move_layer(
                engine, rank, coordinator.cpu_group, communicator, old, new, weights, buffer, layer, batched=False
            )
        del communicator
    return wrong(rank, slots, placements[-1], weights)


# --- what they share -------------------------------------------------------------------------------------------------


def make(rank: int, world: int, group: Any, backend: str, weights: Any, buffer: Any) -> Any:
    from vllm.distributed.eplb import eplb_communicator

    coordinator = SimpleNamespace(
        rank_in_group=rank, world_size=world, cpu_group=group, device_group=group, device_communicator=None
    )
    made = eplb_communicator.create_eplb_communicator(coordinator, f"eplb:{backend}", weights, buffer)
    assert isinstance(made, eplb_communicator.EplbCommunicator)
    assert type(made).__name__ == "EplbPluginCommunicator"
    return made


def move_layer(
    engine: Any,
    rank: int,
    group: Any,
    communicator: Any,
    old: torch.Tensor,
    new: torch.Tensor,
    weights: Any,
    buffer: Any,
    layer: int,
    *,
    batched: bool,
) -> None:
    """Move one layer as vLLM's asynchronous worker and its main thread do."""
    metadata = engine.transfer_layer(
        old_layer_indices=old[layer],
        new_layer_indices=new[layer],
        expert_weights=weights[layer],
        expert_weights_buffer=buffer,
        ep_group=group,
        communicator=communicator,
        layer_idx=layer,
        enable_migration_batching=batched,
    )
    engine.move_from_buffer(weights[layer], buffer, metadata, new[layer].numpy(), rank)


def placement(layers: int, slots: int, experts: int, seed: int) -> torch.Tensor:
    """Return a random placement that holds every expert, the same on every rank."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(layers):
        more = torch.randint(0, experts, (slots - experts,), generator=random)
        row = torch.cat([torch.arange(experts), more])
        rows.append(row[torch.randperm(slots, generator=random)])
    return torch.stack(rows)


def content(layer: int, tensor: int, expert: int, nbytes: int) -> torch.Tensor:
    """Return what the bytes of an expert are; unlike the others' in every layer and tensor."""
    return (torch.arange(nbytes) * 7 + expert * 31 + layer * 5 + tensor * 3 + (torch.arange(nbytes) >> 8) + 1).to(
        torch.uint8
    )


def expert_weights(rank: int, slots: int, old: torch.Tensor) -> list[list[torch.Tensor]]:
    """Return this rank's slots, filled as `old` says: several dtypes, one-byte views, transposed rows, scalars."""
    layers = []
    for layer in range(len(old)):
        tensors = [
            torch.empty(slots, 48, 16),
            torch.empty(slots, 16, 40, dtype=torch.bfloat16),
            torch.empty(slots, 33, dtype=torch.uint8),
            torch.empty(slots, 6, 10).transpose(1, 2),
            torch.empty(slots, dtype=torch.float64),
            torch.empty(slots, 24, dtype=torch.float8_e4m3fn),
        ]
        for number, tensor in enumerate(tensors):
            for slot in range(slots):
                expert = int(old[layer, rank * slots + slot])
                row = memory(tensor, slot)
                row.copy_(content(layer, number, expert, len(row)) if expert >= 0 else torch.full_like(row, POISON))
        layers.append(tensors)
    return layers


def memory(tensor: torch.Tensor, slot: int) -> torch.Tensor:
    """Return a slot's bytes as they lie in memory, uint8 `[bytes]`."""
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    nbytes = tensor.stride(0) * tensor.element_size()
    start = tensor.storage_offset() * tensor.element_size() + slot * nbytes
    return whole[start : start + nbytes]


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    torch.empty(0, dtype=torch.uint8).set_(empty.untyped_storage()).fill_(POISON)
    return empty


def wrong(rank: int, slots: int, expected: torch.Tensor, weights: list[list[torch.Tensor]]) -> str:
    """Return the first slot that does not hold its expert's bytes, or an empty text."""
    for layer, tensors in enumerate(weights):
        for slot in range(slots):
            expert = int(expected[layer, rank * slots + slot])
            for number, tensor in enumerate(tensors):
                row = memory(tensor, slot)
                if expert >= 0 and not torch.equal(row, content(layer, number, expert, len(row))):
                    return f"layer {layer}, slot {slot}, tensor {number}: not the bytes of expert {expert}"
    return ""


if __name__ == "__main__":
    main()
