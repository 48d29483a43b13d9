"""Weights as engines hold them: made under inference mode, beside a default device, in other memory than before."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.rearrange.rearranger import Rearranger
from tests.support.ranks import Member, Report, Scenario, error_of, run_scenarios

BACKENDS = ("torch_gloo?timeout=20s", "nixl?window=1MiB&timeout=20s")
RANKS, SLOTS, LAYERS = 2, 2, 3
OLD = np.tile(np.arange(RANKS * SLOTS), (LAYERS, 1))
NEW = np.roll(OLD, SLOTS, axis=1)

Make = Callable[[], torch.Tensor]


def plain() -> torch.Tensor:
    return torch.zeros(SLOTS, 4, 6, dtype=torch.int32)


def transposed() -> torch.Tensor:
    return torch.zeros(SLOTS, 6, 4, dtype=torch.int32).transpose(1, 2)


def parameter() -> torch.Tensor:
    return torch.nn.Parameter(plain(), requires_grad=False)


def filled(rank: int, make: Make) -> list[list[torch.Tensor]]:
    """Return weights of which every element is known: its expert, layer, and place in the row."""
    weights = [[make(), make()] for _ in range(LAYERS)]
    for layer, tensors in enumerate(weights):
        for tensor in tensors:
            for slot in range(SLOTS):
                tensor[slot] = expected(tensor[slot].shape, layer, int(OLD[layer, rank * SLOTS + slot]))
    return weights


def expected(shape: torch.Size, layer: int, expert: int) -> torch.Tensor:
    count = shape.numel()
    return (torch.arange(count, dtype=torch.int32, device="cpu") + 1000 * expert + 100 * layer).view(shape)


def right(weights: list[list[torch.Tensor]], rank: int, placement: Any) -> bool:
    return all(
        torch.equal(tensor[slot], expected(tensor[slot].shape, layer, int(placement[layer, rank * SLOTS + slot])))
        for layer, tensors in enumerate(weights)
        for tensor in tensors
        for slot in range(SLOTS)
    )


def there_and_back(communicator: EplbCommunicator, weights: list[list[torch.Tensor]], rank: int) -> list[bool]:
    rearranger = Rearranger(communicator, weights)
    rearranger.run(OLD, NEW, verify="full")
    there = right(weights, rank, NEW)
    rearranger.start(None, OLD).wait(60)
    return [there, right(weights, rank, OLD)]


def moves(member: Member, config: str, make: Make) -> list[bool]:
    weights = filled(member.rank, make)
    with member.communicator(config, weights[0]) as communicator:
        return there_and_back(communicator, weights, member.rank)


def moves_under_inference_mode(member: Member, config: str, outside: bool) -> list[bool]:
    """Made under inference mode; moved within it, or outside, where such tensors refuse changes that autograd sees."""
    with torch.inference_mode():
        weights = filled(member.rank, plain)
        if not outside:
            with member.communicator(config, weights[0]) as communicator:
                return there_and_back(communicator, weights, member.rank)
    with member.communicator(config, weights[0]) as communicator:
        return there_and_back(communicator, weights, member.rank)


def moves_beside_a_default_device(member: Member, config: str) -> list[bool]:
    weights = filled(member.rank, plain)
    torch.set_default_device("meta")
    try:
        with member.communicator(config, weights[0]) as communicator:
            return there_and_back(communicator, weights, member.rank)
    finally:
        torch.set_default_device(None)


def moves_beside_a_default_dtype(member: Member, config: str) -> list[bool]:
    torch.set_default_dtype(torch.float64)
    try:
        return moves(member, config, plain)
    finally:
        torch.set_default_dtype(torch.float32)


def one_rank_has(member: Member, make: Callable[[], torch.Tensor]) -> dict[str, Any]:
    """One rank's last layer differs from that of the others, who hear of it before anything moves."""
    weights = filled(member.rank, plain)
    other = [*weights[:-1], [make(), weights[-1][1]]] if member.rank == 1 else weights
    with member.communicator(BACKENDS[0], weights[0]) as communicator:
        error = error_of(lambda: Rearranger(communicator, other).run(OLD, NEW))
        return {"error": error, "after": there_and_back(communicator, weights, member.rank)}


def one_rank_replaces_the_memory(member: Member, start: bool) -> dict[str, Any]:
    weights = filled(member.rank, parameter)
    with member.communicator(BACKENDS[0], weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights)
        rearranger.run(OLD, OLD)
        if member.rank == 1:
            weights[1][0].data = weights[1][0].data.clone()
        error = error_of(lambda: rearranger.start(OLD, NEW) if start else rearranger.run(OLD, NEW))
        return {"error": error, "after": there_and_back(communicator, weights, member.rank)}


def one_rank_replaces_the_memory_beside_a_job(member: Member, commits: bool) -> dict[str, Any]:
    weights = filled(member.rank, parameter)
    with member.communicator(BACKENDS[0], weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights)
        job = rearranger.start(OLD, NEW)
        while not (job.ready_layers() or job.received):  # the other rank may have ended it
            time.sleep(0.001)
        error = {"type": "", "text": ""}
        if member.rank == 1:
            for tensors in weights:
                tensors[1].data = tensors[1].data.clone()
            if commits:
                error = error_of(lambda: job.commit(job.ready_layers()[0]))
        ended = error_of(lambda: job.wait(60))
        return {"commit": error, "ended": ended}


def one_rank_has_a_distributed_tensor(member: Member) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (member.world_size,))
    weights = filled(member.rank, plain)
    spread = DTensor.from_local(weights[0][0], mesh, [Shard(0)])
    with member.communicator(BACKENDS[0], weights[0]) as communicator:
        error = error_of(lambda: Rearranger(communicator, [[spread, weights[0][1]], *weights[1:]]))
        local = [[spread.to_local(), weights[0][1]], *weights[1:]]
        return {"error": error, "after": there_and_back(communicator, local, member.rank)}


def another_dtype() -> torch.Tensor:
    return torch.zeros(SLOTS, 4, 6, dtype=torch.float32)


DIFFERS: dict[str, tuple[Make, str]] = {
    "another dtype": (another_dtype, "float32"),
    "another order of dimensions": (transposed, "strides (1, 4)"),
}


@functools.cache
def report_of() -> Report:
    scenarios = [
        Scenario(f"{make.__name__} {config}", moves, (config, make))
        for config in BACKENDS
        for make in (plain, transposed, parameter)
    ]
    for config in BACKENDS:
        scenarios += [
            Scenario(f"inference {outside} {config}", moves_under_inference_mode, (config, outside))
            for outside in (True, False)
        ]
        scenarios.append(Scenario(f"device {config}", moves_beside_a_default_device, (config,)))
        scenarios.append(Scenario(f"dtype {config}", moves_beside_a_default_dtype, (config,)))
    scenarios += [Scenario(f"has {kind}", one_rank_has, (make,)) for kind, (make, _) in DIFFERS.items()]
    scenarios += [Scenario(f"replaces {start}", one_rank_replaces_the_memory, (start,)) for start in (True, False)]
    scenarios += [
        Scenario(f"beside {commits}", one_rank_replaces_the_memory_beside_a_job, (commits,))
        for commits in (True, False)
    ]
    scenarios.append(Scenario("distributed", one_rank_has_a_distributed_tensor))
    return run_scenarios(RANKS, scenarios)


@pytest.fixture(scope="module")
def report() -> Report:
    return report_of()


@pytest.mark.parametrize("config", BACKENDS)
@pytest.mark.parametrize(
    "kind", ["plain", "transposed", "parameter", "inference True", "inference False", "device", "dtype"]
)
def test_every_element_is_where_it_was_in_its_expert(report: Report, config: str, kind: str) -> None:
    assert report.returned(f"{kind} {config}") == [[True, True]] * RANKS


@pytest.mark.parametrize("kind", DIFFERS)
def test_weights_that_differ_on_one_rank_are_an_error_on_all_and_can_be_given_again(report: Report, kind: str) -> None:
    for one in report.returned(f"has {kind}"):
        assert one["error"]["type"] == "HandshakeError"
        assert DIFFERS[kind][1] in one["error"]["text"]
        assert one["after"] == [True, True]


@pytest.mark.parametrize("start", [True, False], ids=["start", "run"])
def test_memory_that_one_rank_has_replaced_is_noticed_on_all_before_anything_moves(report: Report, start: bool) -> None:
    told = report.returned(f"replaces {start}")
    for one in told:
        assert one["error"]["type"] == "HandshakeError"
        assert "a tensor has other memory than when the rearranger was made (layer 1, tensor 0)" in one["error"]["text"]
        assert one["after"] == [True, True]


@pytest.mark.parametrize("commits", [True, False], ids=["commit", "wait"])
def test_memory_that_one_rank_has_replaced_beside_a_job_ends_the_job_on_all(report: Report, commits: bool) -> None:
    told = report.returned(f"beside {commits}")
    for one in told:
        assert one["ended"]["type"] == "TransferError"
        assert "rank 1 gave a tensor other memory while a background job was under way" in one["ended"]["text"]
    assert told[1]["commit"]["type"] == ("InputError" if commits else "")


def test_of_a_distributed_tensor_the_local_part_is_to_be_given(report: Report) -> None:
    for one in report.returned("distributed"):
        assert one["error"]["type"] == "InputError"
        assert "give this rank's part, .to_local()" in one["error"]["text"]
        assert one["after"] == [True, True]


def test_every_rank_exits_in_order(report: Report) -> None:
    assert report.exit_codes == [0] * RANKS
