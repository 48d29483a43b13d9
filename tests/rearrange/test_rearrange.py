"""Experts are where the placement says, bit for bit, whatever the weights look like and however small the window."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from eplb_core.arrays import IntArray
from eplb_core.planning.placement import EMPTY
from eplb_core.rearrange.rearranger import Rearranger
from tests.support.ranks import Member, Report, Scenario, bytes_of, error_of, run_in_threads, run_scenarios

THREADS = "in_process"
REAL = ("torch_gloo", "nixl?window=1MiB")
RUNS = [
    *((ranks, THREADS) for ranks in (2, 3, 4)),
    *((3, config) for config in REAL),
    *(pytest.param(ranks, config, marks=pytest.mark.nightly) for ranks in (2, 4) for config in REAL),
]
"""Numbers of ranks and backends. The arithmetic of a rearrangement is the same whatever moves the bytes."""

SLOTS, EXPERTS = 4, 6
Weights = list[list[torch.Tensor]]


# --- weights, and what has to be in them ------------------------------------------------------------------------------


def expert_bytes(layer: int, tensor: int, expert: int, nbytes: int) -> np.ndarray:
    """Return one expert's bytes, uint8 `[nbytes]`: random, and a function of nothing but the arguments."""
    return np.random.default_rng([layer, tensor, expert]).integers(0, 256, nbytes, dtype=np.uint8)


def mixed_layers(device: torch.device) -> Weights:
    """Layers that have nothing in common: bf16, fp8 with scales, one number an expert, rows of one fused tensor."""
    fused = torch.zeros(SLOTS, 48, dtype=torch.float16, device=device)
    return [
        [
            torch.zeros(SLOTS, 6, 10, dtype=torch.bfloat16, device=device),
            torch.zeros(SLOTS, 32, 8, dtype=torch.float8_e4m3fn, device=device),
            torch.zeros(SLOTS, 3, dtype=torch.float32, device=device),
        ],
        [torch.zeros(SLOTS, dtype=torch.int64, device=device), torch.zeros(SLOTS, 7, dtype=torch.bool, device=device)],
        [fused[:, :16].unflatten(1, (4, 4)), fused[:, 16:47]],
        [torch.zeros(SLOTS, 40_001, dtype=torch.uint8, device=device)],
        [torch.nn.Parameter(torch.zeros(SLOTS, 5, 5, device=device)), torch.zeros(SLOTS, 0, 3, device=device)],
    ]


def row_bytes(tensor: torch.Tensor) -> int:
    return tensor[0].numel() * tensor.element_size()


def content(layer: int, tensor: int, expert: int, like: torch.Tensor) -> np.ndarray:
    raw = expert_bytes(layer, tensor, expert, row_bytes(like))
    return raw & 1 if like.dtype == torch.bool else raw


def fill(weights: Weights, placement: IntArray, rank: int) -> None:
    """Put the experts of `placement` into this rank's slots, and other bytes into empty ones."""
    with torch.no_grad():
        for layer, tensors in enumerate(weights):
            for number, tensor in enumerate(tensors):
                slots = len(tensor)
                for slot in range(slots if tensor.numel() else 0):
                    raw = content(layer, number, int(placement[layer, rank * slots + slot]) + 100, tensor)
                    tensor[slot] = torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape[1:]).to(tensor.device)


def wrong_slots(weights: Weights, placement: IntArray, rank: int) -> list[tuple[int, int, int]]:
    """Return `(layer, tensor, slot)` of what is not the expert that `placement` says, byte for byte."""
    return [
        (layer, number, slot)
        for layer, tensors in enumerate(weights)
        for number, tensor in enumerate(tensors)
        for slot in range(len(tensor))
        if (expert := int(placement[layer, rank * len(tensor) + slot])) != EMPTY
        and tensor.numel()
        and bytes_of(tensor[slot].contiguous()) != content(layer, number, expert + 100, tensor).tobytes()
    ]


def random_placement(rng: np.random.Generator, layers: int, ranks: int) -> IntArray:
    """Return a placement that has every expert, some of them several times, and empty slots."""
    rows = []
    for _ in range(layers):
        row = np.concatenate([np.arange(EXPERTS), rng.integers(-1, EXPERTS, ranks * SLOTS - EXPERTS)])
        rows.append(rng.permutation(row))
    return np.array(rows, np.int64)


def crossings(old: IntArray, new: IntArray, layer: int, rank: int) -> set[int]:
    """Return the experts of one layer that a rank needs and does not have: each crosses once."""
    mine = slice(rank * SLOTS, (rank + 1) * SLOTS)
    return set(new[layer, mine].tolist()) - set(old[layer, mine].tolist()) - {EMPTY}


# --- scenarios -------------------------------------------------------------------------------------------------------


def a_chain_of_placements(member: Member, config: str, window: str) -> list[dict[str, Any]]:
    """Go from one random placement to the next, and say after each what is wrong and what was counted."""
    rng = np.random.default_rng(5)
    weights = mixed_layers(member.device)
    layers = len(weights)
    payload = [sum(map(row_bytes, tensors)) for tensors in weights]
    limit = {"default": None, "one expert": 40_192, "two experts": 2 * 40_192}[window]
    placements = [random_placement(rng, layers, member.world_size) for _ in range(6)]
    placements.append(placements[-1])
    fill(weights, placements[0], member.rank)
    told = []
    with member.communicator(config, weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights, window_bytes=limit)
        for old, new in itertools.pairwise(placements):
            progress: list[tuple[int, int]] = []
            result = rearranger.run(old, new, progress=lambda *now: progress.append(now))  # noqa: B023 - called within
            ranks = range(member.world_size)
            per_layer = [sum(len(crossings(old, new, layer, rank)) for rank in ranks) for layer in range(layers)]
            incoming = sum(payload[layer] * len(crossings(old, new, layer, member.rank)) for layer in range(layers))
            told.append(
                {
                    "wrong": wrong_slots(weights, new, member.rank),
                    "placement": np.array_equal(result.placement, new),
                    "moved": (result.moved, sum(per_layer)),
                    "bytes": (result.bytes_moved, sum(map(int.__mul__, per_layer, payload))),
                    "progress": (progress[-1:], [(incoming, incoming)] if result.steps else []),
                    "rising": progress == sorted(progress) and len(progress) == result.steps,
                    "staging": (result.staging_bytes, rearranger.window_bytes + communicator.staging_bytes),
                    "window": rearranger.window_bytes,
                    "steps": result.steps,
                }
            )
    return told


def _uniform(member: Member) -> Weights:
    """Two layers, each slot of each rank with a number of its own."""
    numbers = torch.arange(SLOTS, dtype=torch.float32).add(10 * member.rank)
    return [[numbers.unsqueeze(1).repeat(1, 8)] for _ in range(2)]


def _valid(member: Member, seed: int) -> IntArray:
    return random_placement(np.random.default_rng(seed), 2, member.world_size)


def _asked_differently(member: Member, odd: dict[str, Any]) -> dict[str, Any]:
    """Let rank 1 ask for something else; return the error and whether every slot is as it was."""
    weights = _uniform(member)
    before = [layer[0].clone() for layer in weights]
    asked: dict[str, Any] = {"old": _valid(member, 1), "new": _valid(member, 2), "window": 2048, "nodes": None}
    if member.rank == 1:
        asked |= {key: value(member) for key, value in odd.items()}
    if "dtype" in asked:
        weights = [[tensor.view(asked["dtype"]) for tensor in layer] for layer in weights]
    with member.communicator(f"{THREADS}?timeout=5s") as communicator:
        rearranger = Rearranger(communicator, weights, window_bytes=asked["window"], node_of_rank=asked["nodes"])
        error = error_of(lambda: rearranger.run(asked["old"], asked["new"]))
        untouched = all(torch.equal(a, b[0].view(torch.float32)) for a, b in zip(before, weights, strict=True))
        usable = Rearranger(communicator, _uniform(member)).run(_valid(member, 1), _valid(member, 2)).steps > 0
    return {**error, "untouched": untouched, "usable": usable}


def another_placement(member: Member) -> IntArray:
    return _valid(member, 3)


def a_placement_of_other_shape(member: Member) -> IntArray:
    return _valid(member, 3)[:1]


def a_placement_that_needs_a_lost_expert(member: Member) -> IntArray:
    return np.full((2, member.world_size * SLOTS), EMPTY)


def a_smaller_window(member: Member) -> int:
    return 1024


def another_dtype(member: Member) -> torch.dtype:
    return torch.int32


def other_nodes(member: Member) -> list[int]:
    return list(range(member.world_size))


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "old placement": ({"old": another_placement}, "old placement"),
    "new placement": ({"new": another_placement}, "new placement"),
    "shape": ({"old": a_placement_of_other_shape, "new": a_placement_of_other_shape}, "problem"),
    "lost expert": ({"old": a_placement_that_needs_a_lost_expert}, "problem"),
    "dtype": ({"dtype": another_dtype}, "weights"),
    "nodes": ({"nodes": other_nodes}, "nodes"),
    "window": ({"window": a_smaller_window}, "window"),
}


def refused_weights(member: Member, kind: str) -> dict[str, Any]:
    good = torch.zeros(SLOTS, 6, 4)
    bad = {
        "rows that are not contiguous": torch.zeros(SLOTS, 4, 6)[:, :, ::2],
        "another number of slots": torch.zeros(SLOTS + 1, 4),
        "a scalar": torch.zeros(()),
        "another device": torch.zeros(SLOTS, 4, device="meta"),
        "one row for all slots": torch.zeros(1, 4).expand(SLOTS, 4),
    }[kind]
    with member.communicator(THREADS) as communicator:
        return error_of(lambda: Rearranger(communicator, [[good], [good, bad]]))


REFUSED = (
    "rows that are not contiguous",
    "another number of slots",
    "a scalar",
    "another device",
    "one row for all slots",
)


def a_window_below_one_expert(member: Member, config: str) -> dict[str, Any]:
    weights = [[torch.zeros(SLOTS, 1024)] for _ in range(2)]
    with member.communicator(config) as communicator:
        rearranger = Rearranger(communicator, weights, window_bytes=2048)
        return error_of(lambda: rearranger.run(_valid(member, 1), _valid(member, 2)))


def the_same_problem_everywhere(member: Member) -> dict[str, Any]:
    with member.communicator(THREADS) as communicator:
        rearranger = Rearranger(communicator, _uniform(member))
        return error_of(lambda: rearranger.run(np.zeros((2, 3)), np.zeros((2, 3))))


def two_rearrangers_share_a_communicator(member: Member, config: str) -> list[tuple[int, int, int]]:
    first, second = mixed_layers(member.device), mixed_layers(member.device)
    rng = np.random.default_rng(9)
    placements = [random_placement(rng, len(first), member.world_size) for _ in range(4)]
    fill(first, placements[0], member.rank)
    fill(second, placements[2], member.rank)
    with member.communicator(config) as communicator:
        one, other = Rearranger(communicator, first), Rearranger(communicator, second)
        one.run(placements[0], placements[1])
        other.run(placements[2], placements[3])
        one.run(placements[1], placements[0])
    return wrong_slots(first, placements[0], member.rank) + wrong_slots(second, placements[3], member.rank)


WINDOWS = ("default", "two experts", "one expert")


def chains(config: str) -> list[Scenario]:
    return [Scenario(f"chain {config} {window}", a_chain_of_placements, (config, window)) for window in WINDOWS]


@functools.cache
def real(num_ranks: int) -> Report:
    """Ranks that are processes, and real transports."""
    scenarios = [scenario for config in REAL for scenario in chains(config)]
    if num_ranks == 3:
        scenarios += [Scenario(f"small {config}", a_window_below_one_expert, (config,)) for config in REAL]
        scenarios += [Scenario(f"two {config}", two_rearrangers_share_a_communicator, (config,)) for config in REAL]
    return run_scenarios(num_ranks, scenarios)


@functools.cache
def logic(num_ranks: int) -> Report:
    """Ranks that are threads."""
    scenarios = chains(THREADS)
    if num_ranks == 3:
        scenarios += [Scenario(f"asked {name}", _asked_differently, (odd,)) for name, (odd, _) in DIFFERENCES.items()]
        scenarios += [Scenario(f"refused {kind}", refused_weights, (kind,)) for kind in REFUSED]
        scenarios.append(Scenario("same problem", the_same_problem_everywhere))
    return run_in_threads(num_ranks, scenarios)


def report_of(num_ranks: int, config: str) -> Report:
    return logic(num_ranks) if config == THREADS else real(num_ranks)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("ranks", "config"), RUNS)
def test_every_slot_holds_the_expert_that_the_placement_says(ranks: int, config: str, window: str) -> None:
    for runs in report_of(ranks, config).returned(f"chain {config} {window}"):
        assert [run["wrong"] for run in runs] == [[]] * len(runs)
        assert all(run["placement"] for run in runs)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("ranks", "config"), RUNS)
def test_what_is_counted_is_what_has_to_cross_once_for_each_rank(ranks: int, config: str, window: str) -> None:
    for runs in report_of(ranks, config).returned(f"chain {config} {window}"):
        for run in runs:
            assert run["moved"][0] == run["moved"][1]
            assert run["bytes"][0] == run["bytes"][1]
            assert run["progress"][0] == run["progress"][1]
            assert run["rising"]


@pytest.mark.parametrize(("ranks", "config"), RUNS)
def test_a_smaller_window_means_more_steps_and_is_kept(ranks: int, config: str) -> None:
    report = report_of(ranks, config)
    steps = {}
    for window, limit in zip(WINDOWS, (1 << 20, 2 * 40_192, 40_192), strict=True):
        runs = report.returned(f"chain {config} {window}")[0]
        assert all(run["window"] <= limit for run in runs)
        assert all(run["staging"][0] == run["staging"][1] for run in runs)
        steps[window] = sum(run["steps"] for run in runs)
    assert steps["default"] <= steps["two experts"] <= steps["one expert"]
    assert steps["default"] < steps["one expert"]


def test_the_whole_staging_memory_stays_within_the_option() -> None:
    for runs in real(3).returned("chain nixl?window=1MiB default"):
        assert max(run["staging"][0] for run in runs) <= 1 << 20


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_same_placement_again_takes_no_step(ranks: int) -> None:
    for runs in logic(ranks).returned(f"chain {THREADS} default"):
        assert runs[-1]["steps"] == 0


@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_are_asked_differently_all_refuse_and_move_nothing(name: str) -> None:
    errors = logic(3).returned(f"asked {name}")
    assert {error["type"] for error in errors} == {"HandshakeError"}
    assert len({error["text"] for error in errors}) == 1
    values = errors[0]["table"][DIFFERENCES[name][1]]
    assert values[0] == values[2] != values[1]
    assert all(error["untouched"] and error["usable"] for error in errors)


@pytest.mark.parametrize("kind", REFUSED)
def test_weights_that_cannot_be_moved_are_refused_by_layer_and_tensor(kind: str) -> None:
    for error in logic(3).returned(f"refused {kind}"):
        assert error["type"] == "InputError"
        assert "layer 1, tensor 1" in error["text"]


@pytest.mark.parametrize("config", REAL)
def test_a_window_below_one_expert_is_refused_with_both_sizes(config: str) -> None:
    for error in real(3).returned(f"small {config}"):
        assert error["type"] == "PlacementError"
        assert "2048" in error["text"]
        assert "4096" in error["text"]


def test_a_problem_of_every_rank_is_raised_as_itself() -> None:
    assert {error["type"] for error in logic(3).returned("same problem")} <= {"PlacementError", "InputError"}


@pytest.mark.parametrize("config", REAL)
def test_two_rearrangers_of_one_communicator_do_not_disturb_one_another(config: str) -> None:
    assert real(3).returned(f"two {config}") == [[]] * 3


@pytest.mark.parametrize("ranks", [3, *(pytest.param(ranks, marks=pytest.mark.nightly) for ranks in (2, 4))])
def test_every_rank_exits_in_order(ranks: int) -> None:
    assert real(ranks).exit_codes == [0] * ranks
