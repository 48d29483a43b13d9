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
OLD, NEW = "old/model.safetensors", "new/model.safetensors"
POLICY = "incremental?z=0"  # where experts are now is handed over, and every difference counts
PART = "model.layers.1.mlp.experts."
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
    yield {"name": "refreshed whole", "steps": [["rpc", "eplb_use", "eplb:nixl"], *_refreshed(NEW, "")]}
    yield {"name": "refreshed in part", "steps": _refreshed(OLD, PART)}
    failing = _refreshed("nowhere.safetensors", "")
    yield {"name": "refresh that fails", "steps": [each for each in failing if each != ["tokens"]]}
    yield {"name": "refreshed by vLLM alone", "steps": _refreshed(OLD, "", repaired=False)}
    yield {"name": "refreshed back", "steps": _refreshed(OLD, "")}
    yield {"name": "sabotaged", "steps": [["rpc", "eplb_use", "sabotaged"], *_rearrange(seed + 1)]}


def _refreshed(path: str, prefix: str, *, repaired: bool = True) -> list[list[Any]]:
    return [
        ["rpc", "eplb_refresh", path, prefix, repaired],
        ["tokens"],
        ["rpc", "eplb_placement"],
        ["rpc", "eplb_hashes"],
    ]


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
    make_checkpoint(folder / "old")
    make_checkpoint(folder / "new", seed=1)
    settings = {
        "model": str(folder / "old"),
        "ranks": RANKS,
        "tokens": 12,
        "prompts": [[5, 6, 7, 8, 9, 10], [100, 200, 300, 17], list(range(40, 80))],
        "use_async": True,
        "eplb_config": {},
        "cases": [
            {"name": "new", "steps": [["rpc", "eplb_refresh", NEW, "", True], *_LOOK]},
            {"name": "start", "steps": [["rpc", "eplb_refresh", OLD, "", True], *_LOOK]},
            *cases(),
        ],
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    variables = environment | {"EPLB_BACKEND": "torch_gloo?timeout=45s", "EPLB_POLICY": POLICY}
    command = [str(python), "-m", "cpu_engine.run", "settings.json", "result.json"]
    ran = run(command, variables, _START_AND_CASES_S, folder)
    result: dict[str, Any] = {"error": "it wrote no result"}
    if (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text())
    assert not result["error"], f"{result['error']}\n{ran.stdout[-6000:]}"
    return result | {"log": ran.stdout}


_LOOK = [["rpc", "eplb_placement"], ["rpc", "eplb_hashes"], ["tokens"]]


def answers(engine: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the answers of one case by what they are."""
    before, at_first, _, between, settled, at_last, after, hashes = engine["cases"][name]["steps"][-8:]
    return {
        "before": before, "after": after, "settled": settled, "hashes": hashes,
        "tokens": [at_first, between, at_last],
    }  # fmt: skip


def expert_hashes(engine: dict[str, Any], weights: str = "start") -> list[dict[int, str]]:
    """Return, for each layer, expert -> hash of its bytes, as vLLM has loaded them before any expert had moved."""
    _, placements, hashes, _ = engine["cases"][weights]["steps"]
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


GOOD = [case["name"] for case in cases() if case["name"].startswith(("sync", "async"))]


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
    assert len(lines) == 3  # synchronous, asynchronous, and the one that serves the refreshes
    assert all(f"{RANKS} ranks, {LAYERS} layers of {EXPERTS // RANKS + 1} slots" in line for line in lines)


def test_a_policy_of_eplb_decides_where_experts_go(engine: dict[str, Any]) -> None:
    assert f"eplb chooses the placements: policy {POLICY}" in engine["log"]


# --- refreshes of the weights ----------------------------------------------------------------------------------------


def refreshed(engine: dict[str, Any], name: str) -> tuple[list[str], list[list[int]], list[list[str]]]:
    """Return what a refresh answered, the tokens after it, and the weights that each layer's slots hold, in words.

    The words are the names of the weights, `start` or `new`, or `wrong` if a slot holds another expert's bytes.
    """
    steps = engine["cases"][name]["steps"]
    placements, hashes = steps[-2:]
    tokens = steps[-3] if name != "refresh that fails" else []  # vLLM's layers are half taken apart then
    said = steps[-4] if name != "refresh that fails" else steps[-3]
    known = {weights: expert_hashes(engine, weights) for weights in ("start", "new")}
    layers = []
    for layer in range(LAYERS):
        slots = [each for rank in range(RANKS) for each in hashes[rank][layer]]
        held = set()
        for slot, expert in enumerate(placements[0][layer]):
            names = [weights for weights, experts in known.items() if experts[layer][expert] == slots[slot]]
            held.add(names[0] if names else "wrong")
        layers.append(sorted(held))
    return said, tokens, layers


def tokens_of(engine: dict[str, Any], weights: str) -> list[list[int]]:
    answered: list[list[int]] = engine["cases"][weights]["steps"][-1]
    return answered


def test_the_two_checkpoints_answer_differently(engine: dict[str, Any]) -> None:
    assert tokens_of(engine, "start") != tokens_of(engine, "new")


def test_vllm_alone_writes_a_refresh_into_wrong_slots(engine: dict[str, Any]) -> None:
    _, tokens, layers = refreshed(engine, "refreshed by vLLM alone")
    assert all("wrong" in held for held in layers)
    assert tokens != tokens_of(engine, "start")


@pytest.mark.parametrize(("name", "weights"), [("refreshed whole", "new"), ("refreshed back", "start")])
def test_after_a_refresh_experts_are_where_the_router_looks(engine: dict[str, Any], name: str, weights: str) -> None:
    said, tokens, layers = refreshed(engine, name)
    assert said == [""] * RANKS
    assert layers == [[weights]] * LAYERS
    assert tokens == tokens_of(engine, weights)


def test_a_refresh_of_some_experts_leaves_the_others_right(engine: dict[str, Any]) -> None:
    _, _, layers = refreshed(engine, "refreshed in part")
    assert layers == [["new"], ["start"], ["new"]]


def test_a_refresh_that_fails_leaves_the_experts_in_their_places(engine: dict[str, Any]) -> None:
    said, _, layers = refreshed(engine, "refresh that fails")
    assert said == ["FileNotFoundError"] * RANKS
    assert layers == refreshed(engine, "refreshed in part")[2]
