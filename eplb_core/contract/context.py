"""What a factory is given about a group, and what a communicator is told of how it was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from eplb_core.control.plane import ControlPlane


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendContext:
    """All that a factory is given about the group that it builds a communicator for.

    Attributes:
        rank: this process's rank in the group.
        world_size: the number of ranks in the group.
        device: the device of the expert weights.
        control: small typed messages between the ranks of the group, with deadlines.
        cpu_group: a CPU process group of the same ranks, or None in a stateless group.
        device_group: the device's process group (NCCL) of the same ranks, or None.
        device_communicator: the engine's own device communicator, or None. It may carry `pynccl_comm`.
    """

    rank: int
    world_size: int
    device: torch.device
    control: ControlPlane
    cpu_group: ProcessGroup | None = None
    device_group: ProcessGroup | None = None
    device_communicator: object | None = None


class EventSink(Protocol):
    """Takes events of transfers and rearrangements; `eplb_core.hooks.host.PluginHost` is one."""

    def listens(self, *events: Any) -> bool:
        """Return whether anybody listens to one of these classes of events."""
        ...

    def notify(self, event: Any) -> None:
        """Take an event, without waiting for anybody who listens."""
        ...


@dataclass(slots=True)
class Binding:
    """What `create_eplb_communicator` knows of a communicator that it made.

    Attributes:
        config: the canonical config string.
        context: the group that it was made for.
        plugins: who is told of what is done with it; None for the installed plugins.
        timeout_s: the `timeout` option: the longest that any wait for a peer may take, in seconds.
        background: whether the backend may run beside inference, on a thread of its own.
    """

    config: str
    context: BackendContext
    plugins: EventSink | None = field(default=None, repr=False)
    timeout_s: float = 60.0
    background: bool = False
    _scopes: int = field(default=0, repr=False)

    def next_scope(self, name: str) -> str:
        """Return a new name for `ControlPlane.scoped`, the same on every rank that asks in the same order."""
        self._scopes += 1
        return f"{name}/{self._scopes}"
