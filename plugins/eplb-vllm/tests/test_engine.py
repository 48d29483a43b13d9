"""A real vLLM on two CPU ranks moves its experts through this plugin, and answers as before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cpu_engine.model import EXPERTS, LAYERS, make_checkpoint
from engine_process import run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

RANKS = 2
TRANSPORTS = ("eplb:torch_gloo", "eplb:nixl", "shm")
_START_AND_CASES_S = 420


def cases() -> Iterator[dict[str, Any]]:
    """All cases, in the order in which they run on one engine."""
    seed = 0
    for use_async in (False, True):
        for transport in TRANSPORTS:
            batching = use_async and transport == "eplb:nixl"
            seed += 1
            yield {
                "name": f"{'async' if use_async else 'sync'} {transport}",
                "steps": [
                    ["rpc", "eplb_use_async", use_async],
                    ["rpc", "eplb_batching", batching],
                    ["rpc", "eplb_use", transport],
                    *_rearrange(seed),
                ],
            }
    yield {"name": "sabotaged", "steps": [["rpc", "eplb_use", "sabotaged"], *_rearrange(seed + 1)]}


def _rearrange(seed: int) -> list[list[Any]]:
    return [
        ["rpc", "eplb_placement"],
        ["tokens"],
        ["rpc", "eplb_rearrange", seed],
        ["tokens"],
        ["rpc", "eplb_settle", 60.0],
        ["tokens"],
        ["rpc", "eplb_placement"],
        ["rpc", "eplb_hashes"],
    ]


@pytest.fixture(scope="module")
def engine(python: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one engine answered to all cases, and its log."""
    folder = tmp_path_factory.mktemp("engine")
    make_checkpoint(folder / "model")
    settings = {
        "model": str(folder / "model"),
        "ranks": RANKS,
        "tokens": 12,
        "prompts": [[5, 6, 7, 8, 9, 10], [100, 200, 300, 17], list(range(40, 80))],
        "use_async": True,
        "eplb_config": {},
        "cases": [
            {"name": "start", "steps": [["rpc", "eplb_placement"], ["rpc", "eplb_hashes"], ["tokens"]]},
            *cases(),
        ],
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    variables = environment | {"EPLB_BACKEND": "torch_gloo?timeout=45s"}
    command = [str(python), "-m", "cpu_engine.run", "settings.json", "result.json"]
    ran = run(command, variables, _START_AND_CASES_S, folder)
    result: dict[str, Any] = {"error": "it wrote no result"}
    if (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text())
    assert not result["error"], f"{result['error']}\n{ran.stdout[-6000:]}"
    return result | {"log": ran.stdout}


def answers(engine: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the answers of one case by what they are."""
    before, at_first, _, between, settled, at_last, after, hashes = engine["cases"][name]["steps"][-8:]
    return {
        "before": before, "after": after, "settled": settled, "hashes": hashes,
        "tokens": [at_first, between, at_last],
    }  # fmt: skip


def expert_hashes(engine: dict[str, Any]) -> list[dict[int, str]]:
    """Return, for each layer, expert -> hash of its bytes, as vLLM has loaded them."""
    placements, hashes, _ = engine["cases"]["start"]["steps"]
    found: list[dict[int, str]] = []
    for layer in range(LAYERS):
        slots = [each for rank in range(RANKS) for each in hashes[rank][layer]]
        found.append(dict(zip(placements[0][layer], slots, strict=True)))
        assert len(set(found[layer].values())) == EXPERTS, "the experts of the checkpoint do not differ"
    return found


def wrong_slots(engine: dict[str, Any], name: str) -> list[tuple[int, int]]:
    """Return `(layer, slot)` of each slot that does not hold the bytes of the expert that the placement says."""
    case, expected = answers(engine, name), expert_hashes(engine)
    wrong = []
    for layer in range(LAYERS):
        slots = [each for rank in range(RANKS) for each in case["hashes"][rank][layer]]
        experts = case["after"][0][layer]
        wrong += [(layer, slot) for slot, expert in enumerate(experts) if slots[slot] != expected[layer][expert]]
    return wrong


GOOD = [case["name"] for case in cases() if case["name"] != "sabotaged"]


@pytest.mark.parametrize("name", GOOD)
def test_answers_are_the_same_before_between_and_after(engine: dict[str, Any], name: str) -> None:
    expected = engine["cases"]["start"]["steps"][-1]
    assert answers(engine, name)["tokens"] == [expected] * 3


@pytest.mark.parametrize("name", GOOD)
def test_the_ranks_agree_where_experts_are_and_experts_crossed(engine: dict[str, Any], name: str) -> None:
    case = answers(engine, name)
    assert case["settled"] == [True] * RANKS
    assert case["after"][0] == case["after"][1]
    crossed = 0
    for before, after in zip(case["before"][0], case["after"][0], strict=True):
        slots = len(before) // RANKS
        for rank in range(RANKS):
            mine = slice(rank * slots, (rank + 1) * slots)
            crossed += len(set(after[mine]) - set(before[mine]))
    assert crossed >= LAYERS


@pytest.mark.parametrize("name", GOOD)
def test_every_slot_holds_the_bytes_of_its_expert(engine: dict[str, Any], name: str) -> None:
    assert wrong_slots(engine, name) == []


def test_a_sabotaged_transport_is_noticed(engine: dict[str, Any]) -> None:
    assert wrong_slots(engine, "sabotaged")
    tokens = answers(engine, "sabotaged")["tokens"]
    assert tokens[-1] != tokens[0]


def test_the_environment_variable_chooses_where_the_configuration_was_read_before_plugins(
    engine: dict[str, Any],
) -> None:
    assert (
        "eplb moves the experts: torch_gloo?start_timeout=10min&timeout=45s (from environment variable EPLB_BACKEND)"
        in engine["log"]
    )


def test_rank_0_says_backend_ranks_and_layers_once_for_each_communicator(engine: dict[str, Any]) -> None:
    lines = [line for line in engine["log"].splitlines() if "eplb moves the experts: nixl" in line]
    assert len(lines) == 2
    assert all(f"{RANKS} ranks, {LAYERS} layers of {EXPERTS // RANKS + 1} slots" in line for line in lines)
