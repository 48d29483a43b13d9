"""`BackendSpec`, which a backend registers: cheap to import, it says how to build a communicator.

The spec names its factory, options class and probe as dotted strings, `package.module:attribute`, so that listing
the installed backends imports none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from eplb_core.contract.context import BackendContext
from eplb_core.contract.option_types import CommonOptions

if TYPE_CHECKING:
    import torch

    from eplb_core.contract.communicator import EplbCommunicator

PLUGIN_API_VERSION = (1, 0)
"""The plugin API that this version of eplb supports, `(major, minor)`.

A backend is compatible if its major number is equal and its minor number is not larger.
"""

ENTRY_POINT_GROUP = "eplb.backends"
"""The entry-point group in which distributions register a `BackendSpec`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The capabilities that a backend declares.

    Attributes:
        device_types: torch device types of the tensors it moves, such as `("cpu", "cuda")`.
        stateless_groups: it needs no torch.distributed process group, only the control plane.
        background: it may run beside inference in the same process, on its own thread and stream.
        device_group: it moves device tensors over the group's device process group, which must exist.
        dtypes: names of the dtypes it moves, such as `("bfloat16", "uint8")`; empty means every torch dtype.
    """

    device_types: tuple[str, ...] = ("cpu",)
    stateless_groups: bool = False
    background: bool = False
    device_group: bool = False
    dtypes: tuple[str, ...] = ()

    def unfit(self, device_type: str, *, stateless: bool, has_device_group: bool) -> str:
        """Return why the backend cannot move such tensors in such a group, or an empty text if it can."""
        if device_type not in self.device_types:
            return f"it moves tensors on {', '.join(self.device_types)}, but these are on {device_type}"
        if stateless and not self.stateless_groups:
            return "it needs a process group, but this group is stateless"
        if self.device_group and device_type != "cpu" and not has_device_group:
            return f"it needs a {device_type} process group, but this group has none"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSpec:
    """The small description that a distribution registers in the entry-point group `eplb.backends`.

    Attributes:
        name: the name in config strings: lower-case letters, digits and `_`, starting with a letter.
        summary: one line for people.
        api_version: the `PLUGIN_API_VERSION` that the backend was written for.
        factory: `module:callable`; a `BackendFactory`.
        options: `module:Class`, a frozen dataclass of the backend's options.
        capabilities: what it can do.
        requires: top-level modules that must be importable; `a|b` means that either is enough.
        install: the pip command that installs what `requires` names.
        probe: `module:callable`, a `BackendProbe`, or None if being importable is enough.
        priority: `auto` takes the backend with the highest priority among those that work on every rank.
        stateless_substitute: the backend used instead, with a warning, in a stateless group, if this one needs a
            process group; empty for none. It should accept the same options.
    """

    name: str
    summary: str
    api_version: tuple[int, int]
    factory: str
    options: str = "eplb_core.contract.option_types:CommonOptions"
    capabilities: Capabilities = Capabilities()
    requires: tuple[str, ...] = ()
    install: str = ""
    probe: str | None = None
    priority: int = 0
    stateless_substitute: str = ""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Whether a backend works on this machine, and how that is known.

    Attributes:
        available: whether it does.
        reason: one line: what was tried if it works, what failed if it does not.
        warning: one line: what should be improved although it works; empty if nothing.
    """

    available: bool
    reason: str
    warning: str = ""


class BackendFactory(Protocol):
    """Builds one communicator. Called on every rank of a group at the same time, after they have agreed."""

    def __call__(
        self, context: BackendContext, options: CommonOptions, expert_weights: Sequence[torch.Tensor]
    ) -> EplbCommunicator:
        """Return the communicator; `expert_weights` are the tensors of one layer, first dimension = local slots."""
        ...


class BackendProbe(Protocol):
    """Tries the backend for real on this machine, alone. Runs in a child process, where a crash is harmless."""

    def __call__(self, device_type: str) -> ProbeResult:
        """Return whether tensors of `device_type` can be moved here."""
        ...
