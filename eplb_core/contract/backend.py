"""What a backend registers: a `BackendSpec`, cheap to import, that says how to build a communicator.

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
"""The plugin API that this version of eplb speaks, `(major, minor)`.

A backend works if its major number is the same and its minor number is not larger.
"""

ENTRY_POINT_GROUP = "eplb.backends"
"""The entry-point group in which distributions register a `BackendSpec`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend can do, as it declares it.

    Attributes:
        device_types: torch device types whose tensors it moves, such as `("cpu", "cuda")`.
        stateless_groups: it needs no torch.distributed process group, only the control plane.
        background: it may run beside inference in the same process, on its own thread and stream.
        device_group: it moves device tensors over the group's own device process group, which has to be there.
        dtypes: names of the dtypes that it moves, such as `("bfloat16", "uint8")`; empty means every dtype of torch.
    """

    device_types: tuple[str, ...] = ("cpu",)
    stateless_groups: bool = False
    background: bool = False
    device_group: bool = False
    dtypes: tuple[str, ...] = ()

    def unfit(self, device_type: str, *, stateless: bool, has_device_group: bool) -> str:
        """Return why this does not do for such tensors in such a group, or an empty text if it does."""
        if device_type not in self.device_types:
            return f"it moves tensors on {', '.join(self.device_types)}, and these lie on {device_type}"
        if stateless and not self.stateless_groups:
            return "it needs a process group, and this group is stateless"
        if self.device_group and device_type != "cpu" and not has_device_group:
            return f"it needs a {device_type} process group, and this group has none"
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
        requires: top-level modules that have to be importable; `a|b` means that one of them is enough.
        install: the pip command that installs what `requires` names.
        probe: `module:callable`, a `BackendProbe`, or None if being importable is all it takes.
        priority: among the backends that work on every rank, `auto` takes the one with the highest.
        stateless_substitute: the backend that is taken in its place in a stateless group, with a warning, if it
            cannot do without a process group; empty for none. It should know the same options.
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
        reason: one line, of what was tried if it works and of what failed if it does not.
        warning: one line, of what should be otherwise although it works; empty where nothing should.
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
    """Tries the backend for real on this machine, alone. Runs in a child process where a crash does no harm."""

    def __call__(self, device_type: str) -> ProbeResult:
        """Return whether tensors of `device_type` can be moved here."""
        ...
