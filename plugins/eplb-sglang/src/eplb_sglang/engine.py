"""What this plugin asks of a running SGLang: who shares the slots, who is alive, where experts are said to be."""

from __future__ import annotations

import hashlib
import os
from typing import Any, Final

import numpy as np
import torch.distributed as dist

from eplb_core import StatelessGroup, TorchGroups
from eplb_core.errors import InputError
from eplb_sglang.mover import Group
from eplb_sglang.survivors import Placement

CANARY: Final = "SGLANG_EXPERT_LOCATION_UPDATER_CANARY"
"""SGLang's own variable for checking what a rearrangement brought; here all bytes of all experts are compared."""


def alive_ranks(num_ranks: int) -> tuple[int, ...]:
    """Return the ranks that are alive, of those that share the slots. Without elastic expert parallelism: all."""
    from sglang.srt.elastic_ep.elastic_ep import ElasticEPStateManager

    state = ElasticEPStateManager.instance()
    if state is None or state.active_ranks_cpu is None:
        return tuple(range(num_ranks))
    active = state.active_ranks_cpu.tolist()
    return tuple(rank for rank in range(num_ranks) if rank >= len(active) or active[rank])


def group(num_ranks: int) -> Group:
    """Return the ranks between which experts move now.

    Args:
        num_ranks: how many share the slots, dead ones included.

    Raises:
        InputError: SGLang's groups are not of these ranks.
    """
    from sglang.srt.elastic_ep.elastic_ep import ElasticEPStateManager
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    alive = alive_ranks(num_ranks)
    state = ElasticEPStateManager.instance()
    flat = state is not None and state.has_scaled
    nodes = 1 if flat or num_ranks % parallel.nnodes else parallel.nnodes
    node_of_rank = tuple(rank // (num_ranks // nodes) for rank in alive) if nodes > 1 else None
    if state is None:
        ranks = parallel.moe_ep_group
        if ranks.world_size != num_ranks:
            raise InputError(
                f"SGLang's placements speak of {num_ranks} ranks, its group for expert parallelism has "
                f"{ranks.world_size}",
                remedy="unset EPLB_BACKEND, and report this with SGLang's arguments",
            )
        return Group(TorchGroups(ranks.cpu_group, ranks.device_group), alive, node_of_rank)
    # Ranks come and go, and torch's groups of them stay as they were at the start.
    mine = parallel.tp_rank + parallel.ep_join_rank_offset
    name = hashlib.sha256(repr(alive).encode()).hexdigest()[:16]
    store = dist.PrefixStore(f"eplb-sglang/{name}", dist.distributed_c10d._get_default_store())
    return Group(StatelessGroup(alive.index(mine), len(alive), store), alive, node_of_rank)


def joins_later() -> bool:
    """Return whether this process joins ranks that serve already, and will not wait for it now."""
    from sglang.srt.runtime_context import get_exec

    return bool(getattr(get_exec().moe, "is_ep_joiner", False))


def current_placement() -> Placement | None:
    """Return where SGLang says that experts are, int64 `[layers, slots]`; None before it knows."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata()
    return None if metadata is None else placement_of(metadata)


def placement_of(metadata: Any) -> Placement:
    """Return the placement of an `ExpertLocationMetadata`, a copy."""
    return np.array(metadata.physical_to_logical_map_cpu.cpu().numpy(), dtype=np.int64)


def dispatch_table(metadata: Any, where: Any) -> Any:
    """Return the slot of each expert that this rank sends to, `[layers, experts]`, as SGLang chooses it."""
    from sglang.srt.eplb.expert_location import compute_logical_to_rank_dispatch_physical_map

    return compute_logical_to_rank_dispatch_physical_map(
        logical_to_all_physical_map=where,
        ep_size=metadata.ep_size,
        num_physical_experts=metadata.num_physical_experts,
        ep_rank=dist.get_rank() % metadata.ep_size,
    )


def checks_bytes() -> bool:
    """Return whether SGLang was told to check what a rearrangement brings."""
    return os.environ.get(CANARY, "").lower() in ("1", "true")
