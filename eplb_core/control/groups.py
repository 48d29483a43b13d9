"""What a communicator is made for: the ranks, their process groups, and the control plane between them.

Anything with the attributes of `GroupCoordinator` is accepted as it is. `TorchGroups` makes one out of plain
torch.distributed groups, `StatelessGroup` out of a store alone.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch.distributed as dist

from eplb_core.control.plane import ControlPlane
from eplb_core.control.rendezvous import meet
from eplb_core.control.store_connection import connect
from eplb_core.errors import InputError

_MEET_S = 1.0  # that ranks have to meet at a store that took nearly all of the timeout to connect to


@runtime_checkable
class GroupCoordinator(Protocol):
    """What an engine hands to `create_eplb_communicator`: its own coordinator object, accepted as it is.

    Attributes:
        rank_in_group: this process's rank in the group.
        world_size: the number of ranks in the group.
        cpu_group: a CPU process group of these ranks, or None if the group is stateless.
        device_group: the device's process group of these ranks, or None.
        device_communicator: the engine's own device communicator, or None; it may carry `pynccl_comm`.
    """

    rank_in_group: int
    world_size: int
    cpu_group: dist.ProcessGroup | None
    device_group: dist.ProcessGroup | None
    device_communicator: object | None


@dataclass(slots=True)
class TorchGroups:
    """A group made of plain torch.distributed process groups; ranks are those inside `cpu_group`.

    Args:
        cpu_group: a CPU (gloo) group; None means the default group.
        device_group: the device's (NCCL) group of the same ranks, or None.
        device_communicator: the engine's own device communicator, or None.

    Raises:
        InputError: torch.distributed is not initialised, this process is not in the group, or the two groups differ.
    """

    cpu_group: dist.ProcessGroup | None = None
    device_group: dist.ProcessGroup | None = None
    device_communicator: object | None = None
    rank_in_group: int = field(init=False)
    world_size: int = field(init=False)

    def __post_init__(self) -> None:
        """Find this process's place in the group."""
        if not dist.is_initialized():
            raise InputError(
                "torch.distributed is not initialised",
                remedy="call torch.distributed.init_process_group first, or give a StatelessGroup with a store",
            )
        if self.cpu_group is None:
            self.cpu_group = dist.group.WORLD
        self.rank_in_group = dist.get_rank(self.cpu_group)
        if self.rank_in_group < 0:
            raise InputError("this process is not a member of the group that it was given")
        self.world_size = dist.get_world_size(self.cpu_group)
        if self.device_group is not None:
            ours, theirs = (dist.get_process_group_ranks(group) for group in (self.cpu_group, self.device_group))
            if ours != theirs:
                raise InputError(
                    "cpu_group and device_group are not of the same ranks", why=f"global ranks {ours} and {theirs}"
                )


@dataclass(frozen=True, slots=True)
class StatelessGroup:
    """A group without any process group: ranks that come and go and meet at a store (elastic expert parallelism).

    Attributes:
        rank_in_group: this process's rank in the group.
        world_size: the number of ranks.
        store: a store that no other group, and no other incarnation of this one, writes to: give each a prefix.
        device_communicator: the engine's own device communicator, or None.

    Raises:
        InputError: the rank is not one of the group, or the store is none.
    """

    rank_in_group: int
    world_size: int
    store: dist.Store
    device_communicator: object | None = None

    def __post_init__(self) -> None:
        """Check what would else be found out by the other ranks, in vain.

        Raises:
            InputError: the rank is not one of the group, or the store is none.
        """
        for name, number in (("rank_in_group", self.rank_in_group), ("world_size", self.world_size)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise InputError(f"{name} is {number!r}, which is not a whole number")
        if not 0 <= self.rank_in_group < self.world_size:
            raise InputError(
                f"there is no rank {self.rank_in_group} in a group of {self.world_size}", why="ranks are counted from 0"
            )
        if not isinstance(self.store, dist.Store):
            raise InputError(f"the store is a {type(self.store).__name__}", remedy="give a torch.distributed.Store")

    @property
    def cpu_group(self) -> None:
        """None: there is no process group."""
        return

    @property
    def device_group(self) -> None:
        """None: there is no process group."""
        return


def is_stateless(group: GroupCoordinator | StatelessGroup) -> bool:
    """Whether the group's ranks come and go: it has no process group, or one that torch.distributed knows nothing of.

    Engines make such process groups for elastic expert parallelism; torch's own functions refuse them.
    """
    if group.cpu_group is None:
        return True
    try:
        dist.get_process_group_ranks(group.cpu_group)
    except (KeyError, ValueError, RuntimeError):
        return True
    return False


def open_control_plane(
    group: GroupCoordinator | StatelessGroup, timeout_s: float, answer_s: float | None = None
) -> ControlPlane:
    """Return a new control plane for the ranks of `group`. Every rank has to call it.

    It runs over a connection of its own to the group's store; without one, to the store of the default process group,
    which torchrun hosts outside the workers. No collective is used: one that a rank does not join would leave the
    engine's process group out of step.

    Args:
        group: the ranks.
        timeout_s: how long to wait for the slowest of them, in seconds.
        answer_s: how long the store may take for each answer once all are here, in seconds; None means as long.

    Raises:
        ControlPlaneError: a rank did not come in time (`missing` says which), or the store is gone.
        InputError: the group offers no store.
    """
    store = _own_store(group)
    place = "eplb/meeting"
    if store is None and group.cpu_group is not None and not is_stateless(group):
        place += f"/{group.cpu_group.group_name}"
        with contextlib.suppress(ValueError, RuntimeError):
            # There is no public way to the store; engines and torch's own extensions use this one.
            store = dist.distributed_c10d._get_default_store()
    if store is None:
        raise InputError(
            "the group has neither a store nor a CPU process group that torch.distributed knows",
            remedy="give a group coordinator with cpu_group, or a StatelessGroup with a store",
        )
    rank, world_size = group.rank_in_group, group.world_size
    began = time.monotonic()
    connection = connect(store, timeout_s)
    left_s = max(timeout_s - (time.monotonic() - began), min(timeout_s, _MEET_S))
    name = meet(connection, place, rank, world_size, left_s)
    if answer_s is not None:
        connection.answer_within(answer_s)
    store = dist.PrefixStore(f"eplb/{name}", connection.store)
    return ControlPlane(store, rank, world_size, connection=connection)


def generation_group(
    store: dist.Store, generation: int, rank: int, world_size: int, device_communicator: object | None = None
) -> StatelessGroup:
    """Return the group of one generation, whose messages cannot meet those of another one at the same store.

    Args:
        store: outlives every rank: hosted outside the workers, or by the one that starts them.
        generation: a number that no other membership at this store has, the same on every rank.
        rank: this process's rank in the generation.
        world_size: the number of ranks in it.
        device_communicator: the engine's device communicator of these ranks, or None.
    """
    return StatelessGroup(
        rank, world_size, dist.PrefixStore(f"eplb/generation/{generation}", store), device_communicator
    )


def _own_store(group: object) -> dist.Store | None:
    """Return the store that a group carries, itself or, as elastic coordinators do, in a group of its own."""
    for holder in (group, getattr(group, "tcp_store_group", None)):
        store = getattr(holder, "store", None)
        if isinstance(store, dist.Store):
            return store
    return None
