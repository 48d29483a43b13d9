"""What a communicator is made for: the ranks, their process groups, and the control plane between them.

Anything with the attributes of `GroupCoordinator` is accepted as it is. `TorchGroups` makes one out of plain
torch.distributed groups, `StatelessGroup` out of a store alone.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import uuid
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist

from eplb_core.control import ControlPlane
from eplb_core.errors import ControlPlaneError, InputError

_ID_BYTES = 16


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
    """

    rank_in_group: int
    world_size: int
    store: dist.Store
    device_communicator: object | None = None

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


def open_control_plane(group: GroupCoordinator | StatelessGroup, timeout_s: float) -> ControlPlane:
    """Return a new control plane for the ranks of `group`. Every rank has to call it, equally often.

    It runs over the group's own store; without one, over a connection of its own to the store of the default process
    group, which torchrun hosts outside the workers; failing that, over a store that rank 0 of the group hosts.

    Raises:
        ControlPlaneError: the ranks cannot reach one another.
        InputError: the group offers neither a store nor a CPU process group.
    """
    store = getattr(group, "store", None)
    if isinstance(store, dist.Store):
        number = store.add(f"eplb/opened/{group.rank_in_group}", 1)
        prefixed = dist.PrefixStore(f"eplb/{number}", _own_connection(store))
        return ControlPlane(prefixed, group.rank_in_group, group.world_size)
    if is_stateless(group):
        raise InputError(
            "the group has neither a store nor a CPU process group that torch.distributed knows",
            remedy="give a group coordinator with cpu_group, or a StatelessGroup with a store",
        )
    shared = None
    with contextlib.suppress(ValueError, RuntimeError):
        # There is no public way to the store; engines and torch's own extensions use this one.
        shared = dist.distributed_c10d._get_default_store()
    return _meet(group, shared, timeout_s)


def _meet(group: GroupCoordinator | StatelessGroup, shared: dist.Store | None, timeout_s: float) -> ControlPlane:
    """Agree over the CPU group on a prefix, and on the address of a store where there is no shared one."""
    address = ("", 0)
    hosted = None
    token = uuid.uuid4().bytes
    if group.rank_in_group == 0 and shared is None:
        hosted = dist.TCPStore(socket.getfqdn(), 0, is_master=True, wait_for_workers=False)
        address = (hosted.host, hosted.port)
    message = token + address[1].to_bytes(4, "big") + address[0].encode()
    token_, port, host = _broadcast(group, message, timeout_s)
    if shared is not None:
        base = _own_connection(shared)
    elif hosted is not None:
        base = hosted
    else:
        base = dist.TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=timeout_s)
        )
    return ControlPlane(dist.PrefixStore(f"eplb/{token_.hex()}", base), group.rank_in_group, group.world_size)


def _broadcast(group: GroupCoordinator | StatelessGroup, message: bytes, timeout_s: float) -> tuple[bytes, int, str]:
    """Send rank 0's message to all: 16 bytes of token, 4 of port, the rest a host name; 256 bytes in all."""
    buffer = torch.zeros(256, dtype=torch.uint8)
    if group.rank_in_group == 0:
        buffer[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    try:
        work = dist.broadcast(buffer, group=group.cpu_group, group_src=0, async_op=True)
        if work is not None:
            work.wait(datetime.timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise ControlPlaneError(
            f"the ranks of the group did not meet within {timeout_s:g} s, in the CPU process group",
            why=str(error).splitlines()[0],
        ) from error
    received = bytes(buffer.tolist())
    host = received[_ID_BYTES + 4 :].rstrip(b"\0").decode()
    return received[:_ID_BYTES], int.from_bytes(received[_ID_BYTES : _ID_BYTES + 4], "big"), host


def _own_connection(store: dist.Store) -> dist.Store:
    """Return a second connection to the same store: waiting on a shared one blocks whoever else uses it."""
    try:
        copy: dist.Store = store.clone()  # type: ignore[attr-defined]  # there, but not in its stub
    except (AttributeError, RuntimeError):  # not every kind of store can be cloned
        return store
    return copy
