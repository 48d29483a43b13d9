"""A toy engine: its ranks answer requests while their experts move, and compare every answer with the right one.

torchrun --nproc-per-node 3 examples/toy_engine.py [BACKEND]
"""

import functools
import sys

import numpy as np
import torch
import torch.distributed as dist

from eplb_core import Rearranger, TorchGroups, create_eplb_communicator

LAYERS, EXPERTS, SLOTS, WIDTH, TOKENS = 6, 8, 4, 48, 64


@functools.cache
def expert(layer, logical):
    """One expert as a checkpoint holds it. Whole numbers that wrap around: no rounding hides a wrong bit."""
    random = torch.Generator().manual_seed(layer * EXPERTS + logical)
    return torch.randint(-(2**62), 2**62, (WIDTH, WIDTH), generator=random)


def chosen(layer, batch):
    """The logical expert that each token wants."""
    return (np.arange(TOKENS) + batch + layer) % EXPERTS


def route(layer, batch, routing):
    """The slot that each token goes to: the copies of an expert take turns, and all have some."""
    copies = [np.flatnonzero(routing[layer] == logical) for logical in chosen(layer, batch)]
    return np.array([slots[token // EXPERTS % len(slots)] for token, slots in enumerate(copies)])


def answer(batch, multiply):
    """All layers' outputs; the numbers that are multiplied are odd, so that nothing wrong becomes zero."""
    tokens, outputs = torch.arange(TOKENS * WIDTH).reshape(TOKENS, WIDTH) + batch | 1, []
    for layer in range(LAYERS):
        outputs.append(multiply(layer, tokens))
        tokens = outputs[-1] | 1
    return torch.stack(outputs)


def serve(batch, weights, routing, rank):
    """Answer a batch: each rank multiplies the tokens that are routed to its slots."""

    def multiply(layer, tokens):
        output, slots = torch.zeros_like(tokens), route(layer, batch, routing)
        for slot in range(SLOTS):
            mine = torch.from_numpy(slots == rank * SLOTS + slot)
            output[mine] = tokens[mine] @ weights[layer][0][slot]
        dist.all_reduce(output)
        return output

    def multiply_right(layer, tokens):
        wanted = chosen(layer, batch).tolist()
        return torch.stack([token @ expert(layer, logical) for token, logical in zip(tokens, wanted, strict=True)])

    if not torch.equal(answer(batch, multiply), answer(batch, multiply_right)):
        raise SystemExit(f"rank {rank}: the answer to batch {batch} is wrong")


def main(backend="nixl"):
    """Serve, and move the experts meanwhile."""
    dist.init_process_group("gloo")
    rank, slots = dist.get_rank(), dist.get_world_size() * SLOTS
    old = np.tile(np.arange(slots) % EXPERTS, (LAYERS, 1))
    new = np.stack([np.random.default_rng(layer).permutation(old[layer]) for layer in range(LAYERS)])
    mine = old[:, rank * SLOTS : (rank + 1) * SLOTS].tolist()
    weights = [[torch.stack([expert(layer, logical) for logical in mine[layer]])] for layer in range(LAYERS)]
    routing, batch, received = old.copy(), 0, False
    with create_eplb_communicator(TorchGroups(), backend, weights[0]) as communicator:
        job = Rearranger(communicator, weights).start(old, new, pace="500kB/s")
        while not received:
            serve(batch, weights, routing, rank)
            # Rank 0 says what all ranks commit before the next batch: a token must find its expert where it is sent.
            said = torch.zeros(LAYERS + 1, dtype=torch.int64)
            if rank == 0:
                said[LAYERS] = job.received  # asked first: then the layers that are ready now are all there will be
                said[job.ready_layers()] = 1
            dist.broadcast(said, src=0)
            for layer in said[:LAYERS].nonzero().flatten().tolist():
                routing[layer] = job.commit(layer)
            batch, received = batch + 1, bool(said[LAYERS])
        result = job.wait(timeout=30)  # commits what is left
        serve(batch, weights, result.placement, rank)
    if rank == 0:
        print(f"{result.moved} experts moved while {batch} batches were served; every answer was right")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
