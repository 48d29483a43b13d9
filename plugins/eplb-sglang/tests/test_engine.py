"""A real SGLang on two CPU ranks moves its experts through this plugin, and answers as before."""

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
POLICY = "incremental?z=0"  # where experts are now is handed over, and every difference counts
TRANSPORTS = ("torch_gloo", "nixl", "shm")
REFUSED = {
    "backend": {"EPLB_BACKEND": "torch_glo"},
    "policy": {"EPLB_POLICY": "incrementl"},
}
_START_AND_CASES_S = 420
_LOOK = [["placement"], ["routed"], ["hashes"], ["tokens"]]


def cases() -> Iterator[dict[str, Any]]:
    """All cases, in the order in which they run on one engine."""
    for seed, transport in enumerate(TRANSPORTS):
        yield {"name": transport, "steps": [["use", transport], *_rearrange(2 * seed)]}
        yield {"name": f"{transport}, layer by layer", "steps": _rearrange(2 * seed + 1, layers_per_chunk=1)}
    yield {"name": "by itself", "steps": [["placement"], ["by_itself", 5], ["tokens"], ["by_itself", 10**9], *_LOOK]}
    yield {"name": "failing", "steps": [["use", "failing"], *_rearrange(20)]}
    yield {"name": "after a failure", "steps": [["use", "nixl"], *_rearrange(21)]}
    yield {"name": "after a sleep", "steps": [["sleep", ["weights"]], *_rearrange(23)]}
    yield {"name": "reloaded", "steps": [["reload", "new"], *_LOOK]}
    yield {"name": "reloaded back", "steps": [["reload", "old"], *_LOOK]}
    yield {"name": "sabotaged", "steps": [["use", "sabotaged"], *_rearrange(22)]}


def _rearrange(seed: int, layers_per_chunk: int | None = None) -> list[list[Any]]:
    rest = [["go_on", 1], ["placement"], ["tokens"], ["go_on", LAYERS + 1]] if layers_per_chunk else []
    return [["placement"], ["tokens"], ["begin", seed, layers_per_chunk], *rest, *_LOOK]


@pytest.fixture(scope="module")
def engine(python: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one engine answered to all cases, and its log."""
    folder = tmp_path_factory.mktemp("engine")
    make_checkpoint(folder / "old")
    make_checkpoint(folder / "new", seed=1)
    settings = {
        "model": "old",
        "ranks": RANKS,
        "tokens": 12,
        "prompts": [[5, 6, 7, 8, 9, 10], [100, 200, 300, 17], list(range(40, 80))],
        "refused": REFUSED,
        "cases": [
            {"name": "new", "steps": [["reload", "new"], *_LOOK]},
            {"name": "start", "steps": [["reload", "old"], *_LOOK]},
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


def steps(engine: dict[str, Any], name: str, of: list[dict[str, Any]] | None = None) -> list[tuple[str, Any]]:
    """Return what was asked in a case and what was answered, step by step."""
    asked = next(case["steps"] for case in of or cases() if case["name"] == name)
    return [(step[0], answer) for step, answer in zip(asked, engine["cases"][name]["steps"], strict=True)]


def every(engine: dict[str, Any], name: str, step: str) -> list[Any]:
    """Return all answers to one kind of step in a case."""
    return [answer for asked, answer in steps(engine, name) if asked == step]


def expected_tokens(engine: dict[str, Any], weights: str = "start") -> Any:
    return engine["cases"][weights]["steps"][-1]


def expert_hashes(engine: dict[str, Any], weights: str = "start") -> list[dict[int, str]]:
    """Return, for each layer, expert -> hash of its bytes, as SGLang has loaded them before any expert had moved."""
    _, placements, _, hashes, _ = engine["cases"][weights]["steps"]
    found: list[dict[int, str]] = []
    for layer in range(LAYERS):
        slots = [each for rank in range(RANKS) for each in hashes[rank][layer]]
        found.append(dict(zip(placements[0][layer], slots, strict=True)))
        assert len(set(found[layer].values())) == EXPERTS, "the experts of the checkpoint do not differ"
    return found


def wrong_slots(engine: dict[str, Any], name: str, weights: str = "start") -> list[tuple[int, int]]:
    """Return `(layer, slot)` of each slot without the bytes of the expert whose tokens the router sends there."""
    expected = expert_hashes(engine, weights)
    routed, hashes = every(engine, name, "routed")[-1], every(engine, name, "hashes")[-1]
    wrong = []
    for layer in range(LAYERS):
        slots = [each for rank in range(RANKS) for each in hashes[rank][layer]]
        experts = enumerate(routed[0][layer])
        wrong += [
            (layer, slot) for expert, places in experts for slot in places if slots[slot] != expected[layer][expert]
        ]
    return wrong


MOVED = [name for transport in TRANSPORTS for name in (transport, f"{transport}, layer by layer")]
SOUND = [*MOVED, "by itself", "failing", "after a failure", "after a sleep"]


@pytest.mark.parametrize("name", SOUND)
def test_answers_are_the_same_before_between_and_after(engine: dict[str, Any], name: str) -> None:
    answered = every(engine, name, "tokens")
    assert len(answered) >= 2
    assert answered == [expected_tokens(engine)] * len(answered)


@pytest.mark.parametrize("name", SOUND)
def test_the_ranks_agree_where_experts_are_and_experts_crossed(engine: dict[str, Any], name: str) -> None:
    placements, routed = every(engine, name, "placement"), every(engine, name, "routed")[-1]
    assert all(one == other for one, other in placements)
    assert routed[0] == routed[1]
    crossed = 0
    for before, after in zip(placements[0][0], placements[-1][0], strict=True):
        slots = len(before) // RANKS
        for rank in range(RANKS):
            mine = slice(rank * slots, (rank + 1) * slots)
            crossed += len(set(after[mine]) - set(before[mine]))
    assert crossed >= (1 if name == "failing" else LAYERS)


@pytest.mark.parametrize("name", SOUND)
def test_every_slot_holds_the_bytes_of_its_expert(engine: dict[str, Any], name: str) -> None:
    assert wrong_slots(engine, name) == []


@pytest.mark.parametrize("name", [*MOVED, "by itself", "after a failure", "after a sleep"])
def test_the_router_uses_every_slot_for_the_expert_that_the_placement_says(engine: dict[str, Any], name: str) -> None:
    placement, routed = every(engine, name, "placement")[-1][0], every(engine, name, "routed")[-1][0]
    for layer in range(LAYERS):
        assert sorted(slot for places in routed[layer] for slot in places) == list(range(len(placement[layer])))
        assert all(placement[layer][slot] == expert for expert, places in enumerate(routed[layer]) for slot in places)


def test_layer_by_layer_some_layers_have_moved_and_others_not_while_it_serves(engine: dict[str, Any]) -> None:
    for transport in TRANSPORTS:
        before, between, after = (each[0] for each in every(engine, f"{transport}, layer by layer", "placement"))
        changed = [layer for layer in range(LAYERS) if before[layer] != after[layer]]
        assert [layer for layer in changed if between[layer] == after[layer]] == [
            layer for layer in changed if layer == 0
        ]


def test_a_sabotaged_transport_is_noticed(engine: dict[str, Any]) -> None:
    assert wrong_slots(engine, "sabotaged")
    tokens = every(engine, "sabotaged", "tokens")
    assert tokens[-1] != tokens[0]


def test_after_a_failure_it_serves_on_with_the_experts_that_arrived(engine: dict[str, Any]) -> None:
    assert "SGLang serves on with those that arrived, all ranks with the same: this transport fails" in engine["log"]
    before, after = (each[0] for each in every(engine, "failing", "placement"))
    wanted = every(engine, "after a failure", "placement")
    assert before != after
    assert wanted[0][0] == after


# --- how it starts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("backend", "did you mean 'torch_gloo'"),
        ("policy", "did you mean incremental"),
    ],
)
def test_a_typo_is_refused_at_the_start(engine: dict[str, Any], name: str, said: str) -> None:
    assert engine["refused"][name] is False
    assert said in engine["log"]
    assert f"from environment variable EPLB_{name.upper()}" in engine["log"]


def test_rank_0_says_backend_ranks_and_layers_once_for_each_communicator(engine: dict[str, Any]) -> None:
    lines = [line for line in engine["log"].splitlines() if "eplb moves the experts: " in line]
    first = "torch_gloo?start_timeout=10min&timeout=45s (from environment variable EPLB_BACKEND)"
    assert first in lines[0]
    assert all(f"{RANKS} ranks, {LAYERS} layers of {EXPERTS // RANKS + 1} slots" in line for line in lines)
    used = [case["steps"][0] for case in cases() if case["steps"][0][0] in ("use", "sleep")]
    assert len(lines) == 1 + len(used)
    assert all("are live" in line for line in lines)


# --- weights that are loaded anew ------------------------------------------------------------------------------------


def test_the_two_checkpoints_answer_differently(engine: dict[str, Any]) -> None:
    assert expected_tokens(engine, "start") != expected_tokens(engine, "new")


@pytest.mark.parametrize(("name", "weights"), [("reloaded", "new"), ("reloaded back", "start")])
def test_weights_that_are_loaded_after_experts_have_moved_are_where_the_router_looks(
    engine: dict[str, Any], name: str, weights: str
) -> None:
    assert every(engine, name, "reload") == [True]
    assert every(engine, name, "tokens") == [expected_tokens(engine, weights)]
    assert wrong_slots(engine, name, weights) == []
