"""Which GPU a rank uses, which ones it sees, and whether every rank has a separate one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import torch
import torch.distributed as dist

from eplb_core.control.plane import ControlPlane
from eplb_core.errors import InputError

if TYPE_CHECKING:
    from eplb_core.launch.local_ranks import RankEnvironment

VISIBLE_GPUS_VARIABLE: Final = "EPLB_VISIBLE_GPUS"
"""The GPUs visible to each local rank: `all` (default), `own`, or `own_first`. Engines' launchers use all three, and
they behave differently: the same GPU has different numbers in different processes."""

_CHOICES = ("all", "own", "own_first")
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def limit_visible_gpus(rank: int) -> bool:
    """Set the GPUs visible to this process, a new local rank; return whether its own GPU is then number 0.

    Call it before anything initialises CUDA.

    Raises:
        InputError: `EPLB_VISIBLE_GPUS` is not one of the choices, or CUDA has already counted its devices.
    """
    choice = os.environ.get(VISIBLE_GPUS_VARIABLE) or "all"
    if choice not in _CHOICES:
        raise InputError(
            f"{VISIBLE_GPUS_VARIABLE} is {choice!r}", remedy=f"set it to {', '.join(_CHOICES)}, or unset it"
        )
    count = torch.cuda.device_count()
    if choice == "all" or not count:
        return False
    names = os.environ[_VISIBLE].split(",") if os.environ.get(_VISIBLE) else [str(number) for number in range(count)]
    own = names[rank % count]
    others = [name for name in reversed(names[:count]) if name != own]
    os.environ[_VISIBLE] = ",".join([own, *(others if choice == "own_first" else [])])
    if torch.cuda.device_count() != (1 if choice == "own" else count):
        raise InputError(
            f"{VISIBLE_GPUS_VARIABLE} has no effect",
            why="CUDA counted its devices before the variable was applied",
        )
    return True


def rank_device(kind: str, environment: RankEnvironment) -> torch.device:
    """Return a rank's device, and make it the current one.

    Every rank gets a separate GPU if its host has enough of them; otherwise ranks share GPUs.

    Args:
        kind: `cpu` or `cuda`.
        environment: the rank.
    """
    if kind == "cpu":
        return torch.device("cpu")
    number = 0 if environment.own_gpu_first else environment.local_rank % torch.cuda.device_count()
    device = torch.device(kind, number)
    torch.cuda.set_device(device)
    return device


def own_gpus(environment: RankEnvironment, device: torch.device, timeout_s: float) -> bool:
    """Return whether no two ranks use the same GPU, as NCCL requires; every rank must call it.

    Args:
        environment: the rank.
        device: its device.
        timeout_s: the longest wait for the other ranks, in seconds.

    Raises:
        ControlPlaneError: a rank did not answer in time.
    """
    mine = "" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)
    store = dist.PrefixStore("gpus", environment.store)
    control = ControlPlane(store, environment.rank, environment.world_size)
    control.publish("gpu", mine.encode())  # the same each time: a rank's device does not change
    gpus = [control.fetch(rank, "gpu", timeout_s) for rank in range(environment.world_size)]
    return all(gpus) and len(set(gpus)) == len(gpus)


def device_group(environment: RankEnvironment, device: torch.device, timeout_s: float) -> dist.ProcessGroup | None:
    """Return an NCCL group of all ranks, or None if they do not have a GPU each; every rank must call it."""
    return dist.new_group(backend="nccl", device_id=device) if own_gpus(environment, device, timeout_s) else None
