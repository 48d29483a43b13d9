"""Ranks started by torchrun, on one machine or several: detect them, and connect them by a control plane."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eplb_core.control.plane import ControlPlane
    from eplb_core.launch.local_ranks import RankEnvironment


def started_by_torchrun() -> bool:
    """Whether this process is already one of several ranks. Imports nothing heavy."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join_torchrun(purpose: str, timeout_s: float) -> tuple[RankEnvironment, ControlPlane]:
    """Return this process's rank, and a control plane of all ranks for a single purpose.

    Args:
        purpose: a unique name.
        timeout_s: how long to wait for the store, in seconds.

    Raises:
        InputError: torchrun's environment is incomplete.
    """
    import torch.distributed as dist

    from eplb_core.control.plane import ControlPlane
    from eplb_core.launch.local_ranks import RankEnvironment

    environment = RankEnvironment.from_torchrun(timeout_s)
    store = dist.PrefixStore(purpose, environment.store)
    return environment, ControlPlane(store, environment.rank, environment.world_size)
