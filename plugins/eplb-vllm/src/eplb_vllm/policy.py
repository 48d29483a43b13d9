"""vLLM's balance policy: lets a policy of eplb choose placements (`EPLB_POLICY=incremental`)."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any, Final

import torch

from eplb_core.errors import EplbError
from eplb_core.registry.policies import load_policy
from eplb_vllm.engine_log import log

VARIABLE: Final = "EPLB_POLICY"
"""The environment variable with a policy's name, and its options if any. Unset: vLLM's own policy."""


def install(module: ModuleType) -> None:
    """Replace vLLM's policy `default` (the asynchronous mode refuses any other name), if one of eplb is requested.

    Args:
        module: `vllm.distributed.eplb.policy`.
    """
    text = os.environ.get(VARIABLE)
    engine_policy = module.EPLB_POLICIES["default"]
    if text and not hasattr(engine_policy, "__eplb_original__"):
        module.EPLB_POLICIES["default"] = policy_class(text, engine_policy)
        log.info("eplb chooses the placements: policy %s", text)


def check() -> None:
    """Check `EPLB_POLICY` when the configuration is read.

    Raises:
        ValueError: there is no such policy, or it cannot be used.
    """
    text = os.environ.get(VARIABLE)
    if text:
        try:
            load_policy(text)
        except EplbError as error:
            raise ValueError(f"{error} (from environment variable {VARIABLE})") from error


def policy_class(text: str, engine_policy: Any) -> type:
    """Return a vLLM policy class that uses the policy `text` of eplb, and vLLM's own if that one fails.

    Args:
        text: the policy's name, with its options.
        engine_policy: vLLM's own policy class.

    Raises:
        PolicyError: there is no such policy, or it cannot be used.
    """
    policy = load_policy(text)

    class EplbPluginPolicy(engine_policy):  # type: ignore[misc]
        """Asks a policy of eplb."""

        __eplb_original__ = engine_policy

        @classmethod
        def rebalance_experts(
            cls,
            weight: torch.Tensor,
            num_replicas: int,
            num_groups: int,
            num_nodes: int,
            num_ranks: int,
            old_global_expert_indices: torch.Tensor | None = None,
        ) -> torch.Tensor:
            """Return int64 `[layers, num_replicas]`, on the CPU, the same on every rank."""
            grouped = num_groups % num_nodes == 0  # otherwise vLLM ignores both
            old = None if old_global_expert_indices is None else old_global_expert_indices.cpu().numpy()
            if old is not None and (old.shape != (len(weight), num_replicas) or (old < 0).any()):
                old = None  # the group grows or shrinks: nothing to start from
            try:
                placement = policy.rebalance(
                    weight.double().cpu().numpy(),
                    num_slots=num_replicas,
                    num_ranks=num_ranks,
                    num_nodes=num_nodes if grouped else 1,
                    num_groups=num_groups if grouped else 1,
                    old=old,
                )
            except EplbError as error:
                log.warning("policy %s gives no placement, so vLLM's own decides this time: %s", text, error)
                fresh: torch.Tensor = engine_policy.rebalance_experts(
                    weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices
                )
                return fresh
            return torch.from_numpy(placement.copy())

    return EplbPluginPolicy
