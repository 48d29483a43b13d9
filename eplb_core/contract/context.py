"""What a factory receives about its group, and what a communicator knows about its creation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from eplb_core.contract.staging import DEFAULT_STAGING_BYTES

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from eplb_core.control.plane import ControlPlane


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendContext:
    """The group that a factory builds a communicator for.

    Attributes:
        rank: this process's rank in the group.
        world_size: the number of ranks in the group.
        device: the device of the expert weights.
        control: small typed messages between the ranks, with deadlines.
        cpu_group: a CPU process group of the same ranks, or None in a stateless group.
        device_group: the device's process group (NCCL) of the same ranks, or None.
        device_communicator: the engine's own device communicator, or None. It may carry `pynccl_comm`.
        staging_bytes: the staging memory of a rank where the configuration does not say it; the same on every rank.
    """

    rank: int
    world_size: int
    device: torch.device
    control: ControlPlane
    cpu_group: ProcessGroup | None = None
    device_group: ProcessGroup | None = None
    device_communicator: object | None = None
    staging_bytes: int = DEFAULT_STAGING_BYTES


class EventSink(Protocol):
    """Takes events of transfers and rearrangements; `eplb_core.hooks.host.PluginHost` is one."""

    def listens(self, *events: Any) -> bool:
        """Return whether any plugin listens to one of these classes of events."""
        ...

    def notify(self, event: Any) -> None:
        """Take an event, without waiting for any listener."""
        ...


@dataclass(slots=True)
class Binding:
    """How `create_eplb_communicator` made a communicator.

    Attributes:
        config: the canonical config string.
        context: the communicator's group.
        plugins: the plugins that receive its events; None for the installed plugins.
        timeout_s: the `timeout` option: the longest that any wait for a peer may take, in seconds.
        background: whether the backend may run beside inference, on a separate thread.
        shared: what all users of the communicator on this rank have in common, by a name of theirs.
    """

    config: str
    context: BackendContext
    plugins: EventSink | None = field(default=None, repr=False)
    timeout_s: float = 60.0
    background: bool = False
    shared: dict[str, Any] = field(default_factory=dict, repr=False)
    _attempts: int = field(default=0, repr=False)
    _closing: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def next_attempt(self) -> int:
        """Return how often this rank has asked, this time included."""
        self._attempts += 1
        return self._attempts

    def before_closing(self, call: Callable[[], None]) -> Callable[[], None]:
        """Have `call` called before the communicator is closed, while it can be used still; return what undoes that."""
        self._closing.append(call)

        def undo() -> None:
            if call in self._closing:
                self._closing.remove(call)

        return undo

    def closes(self) -> None:
        """Call what is to be called before the communicator is closed, once."""
        calls, self._closing = self._closing, []
        for call in calls:
            call()
