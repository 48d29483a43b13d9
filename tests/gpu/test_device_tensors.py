"""Device tensors: stream order, all dtypes, and rearranged weights, several ranks sharing one GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from eplb_core.rearrange.rearranger import InPlace, Rearranger
from tests.rearrange import test_rearrange
from tests.support.ranks import (
    Member,
    Report,
    Scenario,
    Sent,
    all_pairs,
    bytes_of,
    content,
    exchange,
    ring,
    run_scenarios,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

BACKENDS = ("torch_gloo", "nixl?window=64MiB", "nixl?mode=packed&window=64MiB", "nixl?mode=direct&window=64MiB")
NBYTES = (9 << 20) + 5
DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
ROUNDS = 12


class Busy:
    """Keeps a stream busy for a while, so that what is queued behind has not run when the next call is made."""

    def __init__(self, device: torch.device) -> None:
        self._matrix = torch.randn(4096, 4096, device=device)
        self._product = torch.empty_like(self._matrix)

    def __call__(self) -> None:
        for _ in range(20):
            torch.matmul(self._matrix, self._matrix, out=self._product)


def neighbours(member: Member) -> tuple[int, int]:
    return (member.rank + 1) % member.world_size, (member.rank - 1) % member.world_size


def message(source: int, destination: int, epoch: int, member: Member) -> torch.Tensor:
    return torch.from_numpy(content(source, destination, 0, epoch, NBYTES)).to(member.device)


def work_queued_before_is_seen_and_work_queued_after_sees_the_result(member: Member, config: str) -> None:
    """In every round the source is filled, and the landing tensor copied out, by work that is still queued.

    The next round's bytes land in a tensor whose copies out have not run when `execute()` is called, and the source is
    overwritten as soon as it returns.
    """
    to, come_from = neighbours(member)
    busy, side = Busy(member.device), torch.cuda.Stream()
    outgoing = [message(member.rank, to, epoch, member) for epoch in range(ROUNDS)]
    expected = [message(come_from, member.rank, epoch, member) for epoch in range(ROUNDS)]
    source, landing = torch.empty_like(outgoing[0]), torch.empty_like(expected[0])
    kept = [torch.empty_like(landing) for _ in range(ROUNDS)]
    torch.cuda.synchronize()
    with member.communicator(config) as communicator:
        communicator.register([source])
        communicator.register([landing], landing=True)
        communicator.set_stream(side)
        for epoch in range(ROUNDS):
            with torch.cuda.stream(side):
                busy()
                source.copy_(outgoing[epoch])
            communicator.add_send(source, to)
            communicator.add_recv(landing, come_from)
            communicator.execute()
            with torch.cuda.stream(side):
                source.fill_(0xEE)
                busy()
                kept[epoch].copy_(landing)
                landing.fill_(0xEE)
        side.synchronize()
        wrong = [epoch for epoch in range(ROUNDS) if not torch.equal(kept[epoch], expected[epoch])]
    assert not wrong, f"rounds {wrong}"


def without_a_stream_the_current_one_counts(member: Member, config: str) -> None:
    to, come_from = neighbours(member)
    busy, current = Busy(member.device), torch.cuda.Stream()
    outgoing, expected = message(member.rank, to, 0, member), message(come_from, member.rank, 0, member)
    torch.cuda.synchronize()
    with member.communicator(config) as communicator, torch.cuda.stream(current):
        source, landing = torch.empty_like(outgoing), torch.empty_like(expected)
        communicator.register([source, landing])
        busy()
        source.copy_(outgoing)
        communicator.add_send(source, to)
        communicator.add_recv(landing, come_from)
        communicator.execute()
        source.zero_()
        arrived = landing.clone()
        current.synchronize()
    assert torch.equal(arrived, expected)


def weights_are_rearranged_behind_queued_work_on_a_side_stream(member: Member, config: str) -> list[Any]:
    """The weights are filled by queued work, and one rearrangement follows another without waiting for the device."""
    rng = np.random.default_rng(3)
    busy, side = Busy(member.device), torch.cuda.Stream()
    weights, filled = (test_rearrange.mixed_layers(member.device) for _ in range(2))
    layers = len(weights)
    placements = [test_rearrange.random_placement(rng, layers, member.world_size) for _ in range(6)]
    test_rearrange.fill(filled, placements[0], member.rank)
    torch.cuda.synchronize()
    with member.communicator(config, weights[0]) as communicator:
        in_place: InPlace = "never" if communicator.may_land_late else "always"
        rearranger = Rearranger(communicator, weights, window_bytes=200_960, in_place=in_place)
        rearranger.set_stream(side)
        with torch.cuda.stream(side), torch.no_grad():
            busy()
            for there, here in zip(weights, filled, strict=True):
                for target, origin in zip(there, here, strict=True):
                    target.copy_(origin)
        for old, new in itertools.pairwise(placements):
            rearranger.run(old, new)
            with torch.cuda.stream(side):
                busy()
        side.synchronize()
    return test_rearrange.wrong_slots(weights, placements[-1], member.rank)


def experts_move_while_a_stream_computes_with_them(member: Member, config: str) -> dict[str, Any]:
    """A job receives in the background; a busy engine stream reads every slot again and again, and commits."""
    rng = np.random.default_rng(8)
    busy, engine = Busy(member.device), torch.cuda.Stream()
    weights = [[torch.zeros(4, 1 << 20, dtype=torch.uint8, device=member.device)] for _ in range(6)]
    old, new = (test_rearrange.random_placement(rng, len(weights), member.world_size) for _ in range(2))
    test_rearrange.fill(weights, old, member.rank)
    torch.cuda.synchronize()
    reads: list[tuple[Any, list[torch.Tensor]]] = []
    with member.communicator(config, weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights, window_bytes=8 << 20)
        rearranger.set_stream(engine)
        job = rearranger.start(old, new)
        while not job.received:
            layers = job.ready_layers()
            with torch.cuda.stream(engine):
                if layers:
                    busy()  # what is queued before a commit reads the old weights, however late it runs
                    reads.append((job.placement, [layer[0].clone() for layer in weights]))
                    for layer in layers:
                        job.commit(layer)
                    reads.append((job.placement, [layer[0].clone() for layer in weights]))
        result = job.wait(60)
        engine.synchronize()
    torch.cuda.synchronize()
    wrong = [
        test_rearrange.wrong_slots([[tensor] for tensor in seen], placement, member.rank) for placement, seen in reads
    ]
    return {
        "wrong": [slots for slots in wrong if slots] + test_rearrange.wrong_slots(weights, new, member.rank),
        "reached": bool((result.placement == new).all()),
    }


def the_gpu_s_memory_is_given_back(member: Member, config: str) -> tuple[int, int]:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for epoch in range(3):
        with member.communicator(config) as communicator:
            exchange(member, communicator, ring(member.world_size, 1 << 20), epoch)
    torch.cuda.synchronize()
    return before, torch.cuda.memory_allocated()


def bytes_are_those_of_the_device(member: Member, config: str) -> None:
    """The comparison of the other scenarios is not fooled by host copies."""
    tensor = message(0, 1, 0, member)
    assert tensor.is_cuda
    assert bytes_of(tensor) == content(0, 1, 0, 0, NBYTES).tobytes(), config


def several_messages_of_a_pair_arrive_in_order(member: Member, config: str) -> None:
    sizes = (100, 100, 70_001, 5, 0, 100_000, 64 << 10, (64 << 10) - 1, 5, 9)
    with member.shared(config) as communicator:
        exchange(member, communicator, [Sent(*pair, size) for size in sizes for pair in all_pairs(member.world_size)])


def every_dtype_arrives_bit_for_bit(member: Member, config: str) -> None:
    small = [Sent(0, 1, 48 * torch.empty(0, dtype=dtype).element_size(), dtype) for dtype in DTYPES]
    large = [Sent(1, 0, 4_001 * torch.empty(0, dtype=dtype).element_size(), dtype) for dtype in DTYPES]
    with member.shared(config) as communicator:
        exchange(member, communicator, small + large)


def odd_and_empty_messages_arrive(member: Member, config: str) -> None:
    with member.shared(config) as communicator:
        for nbytes in (1, 3, 4095, (5 << 20) + 3):
            exchange(member, communicator, ring(member.world_size, nbytes), epoch=nbytes)
        exchange(member, communicator, [Sent(0, 1, 0), Sent(0, 1, 0, torch.bfloat16), Sent(0, 1, 7), Sent(1, 0, 0)])


def traffic_may_be_as_uneven_as_it_likes(member: Member, config: str) -> None:
    rng = np.random.default_rng(7)
    pairs = all_pairs(member.world_size)
    with member.shared(config) as communicator:
        for source in range(member.world_size):  # one rank feeds all others
            messages = [Sent(source, rank, 1000 + rank) for rank in range(member.world_size) if rank != source]
            exchange(member, communicator, messages, epoch=source)
        for epoch in range(6):
            chosen = rng.integers(0, len(pairs), rng.integers(0, 12))
            sizes = rng.integers(0, 200_000, len(chosen)).tolist()
            messages = [Sent(*pairs[at], size) for at, size in zip(chosen.tolist(), sizes, strict=True)]
            exchange(member, communicator, messages, epoch)


SCENARIOS: tuple[Callable[..., Any], ...] = (
    bytes_are_those_of_the_device,
    several_messages_of_a_pair_arrive_in_order,
    every_dtype_arrives_bit_for_bit,
    odd_and_empty_messages_arrive,
    traffic_may_be_as_uneven_as_it_likes,
    work_queued_before_is_seen_and_work_queued_after_sees_the_result,
    without_a_stream_the_current_one_counts,
)


@pytest.fixture(scope="module", params=(2, 4), ids=("2 ranks", "4 ranks"))
def report(request: pytest.FixtureRequest) -> Report:
    """All ranks on device 0."""
    scenarios = [Scenario(f"{each.__name__} {config}", each, (config,)) for config in BACKENDS for each in SCENARIOS]
    for config in BACKENDS[:3]:
        # Not direct: a rearrangement registers all that it sends, so there it is the same as auto.
        scenarios.append(
            Scenario(f"rearranged {config}", weights_are_rearranged_behind_queued_work_on_a_side_stream, (config,))
        )
        scenarios += [
            Scenario(f"chain {config} {window}", test_rearrange.a_chain_of_placements, (config, window))
            for window in ("default", "one expert")
        ]
        scenarios.append(Scenario(f"beside {config}", experts_move_while_a_stream_computes_with_them, (config,)))
        scenarios.append(Scenario(f"memory {config}", the_gpu_s_memory_is_given_back, (config,)))
    return run_scenarios(request.param, scenarios, device="cuda:0", timeout_s=270)


@pytest.mark.parametrize("config", BACKENDS)
@pytest.mark.parametrize("promise", [each.__name__ for each in SCENARIOS])
def test_contract_on_the_device(report: Report, promise: str, config: str) -> None:
    report.returned(f"{promise} {config}")


@pytest.mark.parametrize("config", BACKENDS[:3])
def test_weights_on_the_device_are_rearranged_behind_queued_work(report: Report, config: str) -> None:
    assert report.returned(f"rearranged {config}") == [[]] * len(report.outcomes)


@pytest.mark.parametrize("config", BACKENDS[:3])
def test_work_queued_before_a_commit_sees_old_weights_and_work_after_it_new_ones(report: Report, config: str) -> None:
    for one in report.returned(f"beside {config}"):
        assert one == {"wrong": [], "reached": True}


@pytest.mark.parametrize("window", ["default", "one expert"])
@pytest.mark.parametrize("config", BACKENDS[:3])
def test_every_slot_on_the_device_holds_its_expert(report: Report, config: str, window: str) -> None:
    for runs in report.returned(f"chain {config} {window}"):
        assert [run["wrong"] for run in runs] == [[]] * len(runs)
        assert all(run["placement"] and run["moved"][0] == run["moved"][1] for run in runs)


@pytest.mark.parametrize("config", BACKENDS[:3])
def test_closing_gives_the_device_memory_back(report: Report, config: str) -> None:
    for before, after in report.returned(f"memory {config}"):
        assert after <= before


def test_every_rank_exits_in_order(report: Report) -> None:
    assert report.exit_codes == [0] * len(report.outcomes)
