"""eplb moves mixture-of-experts weights between the ranks of an expert-parallel group.

What this package exports here is promised, and so are `eplb_core.transport` (to write a backend with),
`eplb_core.errors`, `eplb_core.hooks` and `eplb_core.testing`.
Every name loads on first use, so that importing the package is cheap and imports neither torch nor any backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eplb_core.contract.backend import PLUGIN_API_VERSION as PLUGIN_API_VERSION
    from eplb_core.contract.backend import BackendSpec as BackendSpec
    from eplb_core.contract.backend import Capabilities as Capabilities
    from eplb_core.contract.backend import ProbeResult as ProbeResult
    from eplb_core.contract.communicator import EplbCommunicator as EplbCommunicator
    from eplb_core.contract.communicator import PendingTransfer as PendingTransfer
    from eplb_core.contract.context import BackendContext as BackendContext
    from eplb_core.contract.option_types import ByteSize as ByteSize
    from eplb_core.contract.option_types import CommonOptions as CommonOptions
    from eplb_core.contract.option_types import Duration as Duration
    from eplb_core.contract.stats import TransferStats as TransferStats
    from eplb_core.control.groups import StatelessGroup as StatelessGroup
    from eplb_core.control.groups import TorchGroups as TorchGroups
    from eplb_core.errors import EplbError as EplbError
    from eplb_core.errors import HandshakeError as HandshakeError
    from eplb_core.errors import TransferError as TransferError
    from eplb_core.factory.create import create_eplb_communicator as create_eplb_communicator
    from eplb_core.planning.plan import plan_rearrangement as plan_rearrangement
    from eplb_core.policies.movement import minimize_movement as minimize_movement
    from eplb_core.policies.worth import should_rebalance as should_rebalance
    from eplb_core.rearrange.host_backup import HostBackup as HostBackup
    from eplb_core.rearrange.job import RearrangeJob as RearrangeJob
    from eplb_core.rearrange.rearranger import Rearranger as Rearranger
    from eplb_core.rearrange.result import RearrangeResult as RearrangeResult

__version__ = "0.1.0"

_HOME = {
    "BackendContext": "contract.context",
    "BackendSpec": "contract.backend",
    "ByteSize": "contract.option_types",
    "Capabilities": "contract.backend",
    "CommonOptions": "contract.option_types",
    "Duration": "contract.option_types",
    "EplbCommunicator": "contract.communicator",
    "EplbError": "errors",
    "HandshakeError": "errors",
    "HostBackup": "rearrange.host_backup",
    "PLUGIN_API_VERSION": "contract.backend",
    "PendingTransfer": "contract.communicator",
    "ProbeResult": "contract.backend",
    "RearrangeJob": "rearrange.job",
    "RearrangeResult": "rearrange.result",
    "Rearranger": "rearrange.rearranger",
    "StatelessGroup": "control.groups",
    "TorchGroups": "control.groups",
    "TransferError": "errors",
    "TransferStats": "contract.stats",
    "create_eplb_communicator": "factory.create",
    "minimize_movement": "policies.movement",
    "plan_rearrangement": "planning.plan",
    "should_rebalance": "policies.worth",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    try:
        home = _HOME[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
