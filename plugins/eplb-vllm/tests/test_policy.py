"""vLLM's policy class over a policy of eplb: same placements, and vLLM's own where that one cannot answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from eplb_vllm import policy

from eplb_core.errors import PlacementError
from eplb_core.registry.policies import load_policy

LAYERS, EXPERTS, SLOTS, RANKS = 3, 8, 12, 4


class EnginePolicy:
    """Stands for vLLM's own policy."""

    asked = 0

    @classmethod
    def rebalance_experts(cls, *_: object) -> torch.Tensor:
        """Count the call, and return something that no policy would."""
        cls.asked += 1
        return torch.full((LAYERS, SLOTS), 99)


def loads() -> torch.Tensor:
    return torch.randint(0, 1000, (LAYERS, EXPERTS), generator=torch.Generator().manual_seed(4))


def ask(made: Any, old: torch.Tensor | None, groups: int = 1, nodes: int = 1) -> torch.Tensor:
    answer: torch.Tensor = made.rebalance_experts(loads(), SLOTS, groups, nodes, RANKS, old)
    return answer


@pytest.mark.parametrize(("groups", "nodes", "used"), [(1, 1, (1, 1)), (4, 2, (4, 2)), (1, 2, (1, 1))])
def test_the_placement_is_that_of_the_policy(groups: int, nodes: int, used: tuple[int, int]) -> None:
    expected = load_policy("deepseek").rebalance(
        loads().numpy(), num_slots=SLOTS, num_ranks=RANKS, num_groups=used[0], num_nodes=used[1]
    )
    answer = ask(policy.policy_class("deepseek", EnginePolicy), None, groups, nodes)
    assert answer.device == torch.device("cpu")
    assert np.array_equal(answer.numpy(), expected)


class Recording:
    """A policy that keeps the old placement that it was given."""

    def __init__(self) -> None:
        self.old: list[Any] = []

    def rebalance(self, loads: Any, *, old: Any, num_slots: int, **_: object) -> Any:
        """Keep `old`; refuse every third request."""
        self.old.append(old)
        if len(self.old) % 3 == 0:
            raise PlacementError("nothing fits")
        return np.zeros((LAYERS, num_slots), np.int64)


def test_the_old_placement_is_handed_over_where_there_is_one_to_start_from(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording()
    monkeypatch.setattr(policy, "load_policy", lambda _: recording)
    made = policy.policy_class("recording", EnginePolicy)
    whole = torch.arange(SLOTS).remainder(EXPERTS).expand(LAYERS, -1)
    ask(made, whole)
    ask(made, torch.cat([whole[:, :-1], torch.full((LAYERS, 1), -1)], 1))
    assert np.array_equal(recording.old[0], whole.numpy())
    assert recording.old[1] is None
    before = EnginePolicy.asked
    assert ask(made, whole[:, :6])[0, 0] == 99
    assert EnginePolicy.asked == before + 1


def test_the_variable_replaces_the_policy_once_and_an_empty_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = SimpleNamespace(EPLB_POLICIES={"default": EnginePolicy})
    monkeypatch.setenv("EPLB_POLICY", "")
    policy.install(module)
    assert {"default": EnginePolicy} == module.EPLB_POLICIES
    monkeypatch.setenv("EPLB_POLICY", "deepseek")
    policy.install(module)
    first = module.EPLB_POLICIES["default"]
    policy.install(module)
    assert module.EPLB_POLICIES["default"] is first
    assert issubclass(first, EnginePolicy)


def test_a_misspelt_policy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPLB_POLICY", "deepsek")
    with pytest.raises(ValueError, match=r"deepseek.*environment variable EPLB_POLICY"):
        policy.check()
