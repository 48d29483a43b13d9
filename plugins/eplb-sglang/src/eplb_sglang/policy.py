"""SGLang's balance policy: lets a policy of eplb decide where experts go (`EPLB_POLICY=incremental`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from eplb_core.registry.policies import load_policy
from eplb_sglang.locations import logical_to_physical
from eplb_sglang.survivors import Placement, columns


def place(
    policy_text: str,
    loads: torch.Tensor,
    *,
    num_slots: int,
    slots_per_rank: int,
    num_groups: int | None,
    num_nodes: int,
    old: Placement | None,
    alive: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ask a policy of eplb, and answer as SGLang's own do.

    Args:
        policy_text: the policy's name, with its options.
        loads: `[steps, layers, experts]`.
        num_slots: slots of all ranks.
        slots_per_rank: slots of one.
        num_groups: groups that the router picks experts from, or None.
        num_nodes: nodes that share the ranks evenly.
        old: int64 `[layers, slots]`, where experts are, -1 for empty slots; None if that is not known.
        alive: the ranks that experts can be on. While some are dead, groups and nodes are left out of account.

    Returns:
        Slot -> expert `[layers, slots]`, expert -> slots `[layers, experts, most]` with -1 behind, and how many these
        are, `[layers, experts]`; int64, on the CPU. Slots of dead ranks have expert 0 and are no expert's.

    Raises:
        EplbError: the policy cannot answer.
    """
    policy = load_policy(policy_text)
    window = loads.double().cpu().numpy()
    num_logical = window.shape[2]
    all_alive = len(alive) * slots_per_rank == num_slots
    grouped = all_alive and num_groups is not None and num_groups % num_nodes == 0
    here = columns(alive, slots_per_rank)
    found = policy.rebalance(
        # Policies that decide from a window see how loads vary; others take one sum.
        window if hasattr(policy, "decide") else window.sum(axis=0),
        num_slots=len(here),
        num_ranks=len(alive),
        num_nodes=num_nodes if grouped else 1,
        num_groups=num_groups or 1 if grouped else 1,
        old=_usable(old, here, window.shape[1], num_logical),
    )
    placement = np.full((window.shape[1], num_slots), -1, np.int64)
    placement[:, here] = found
    slots_of = logical_to_physical(placement, num_logical)
    return torch.from_numpy(placement.clip(min=0)), slots_of, (slots_of >= 0).sum(-1)


def _usable(old: Placement | None, here: np.ndarray, num_layers: int, num_logical: int) -> Placement | None:
    """Return the part of the old placement on ranks that are alive, if a policy can start from it."""
    if old is None or old.shape[0] != num_layers or old.shape[1] <= here.max():
        return None
    part = np.ascontiguousarray(old[:, here])
    complete = all(set(range(num_logical)) <= set(row.tolist()) for row in part)
    return part if complete and (part >= 0).all() else None
