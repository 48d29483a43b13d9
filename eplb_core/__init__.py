"""eplb moves mixture-of-experts weights between the ranks of an expert-parallel group.

What this package exports here is promised, and so are `eplb_core.errors`, `eplb_core.hooks` and `eplb_core.testing`.
Every name loads on first use, so that importing the package is cheap and imports neither torch nor any backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eplb_core.backend import PLUGIN_API_VERSION as PLUGIN_API_VERSION
    from eplb_core.backend import BackendContext as BackendContext
    from eplb_core.backend import BackendSpec as BackendSpec
    from eplb_core.backend import ByteSize as ByteSize
    from eplb_core.backend import Capabilities as Capabilities
    from eplb_core.backend import CommonOptions as CommonOptions
    from eplb_core.backend import Duration as Duration
    from eplb_core.backend import ProbeResult as ProbeResult
    from eplb_core.coalesce import as_bytes as as_bytes
    from eplb_core.communicator import EplbCommunicator as EplbCommunicator
    from eplb_core.communicator import PendingTransfer as PendingTransfer
    from eplb_core.communicator import TransferStats as TransferStats
    from eplb_core.errors import EplbError as EplbError
    from eplb_core.errors import HandshakeError as HandshakeError
    from eplb_core.errors import TransferError as TransferError
    from eplb_core.factory import create_eplb_communicator as create_eplb_communicator
    from eplb_core.groups import StatelessGroup as StatelessGroup
    from eplb_core.groups import TorchGroups as TorchGroups
    from eplb_core.job import RearrangeJob as RearrangeJob
    from eplb_core.plan import plan_rearrangement as plan_rearrangement
    from eplb_core.queues import Payload as Payload
    from eplb_core.queues import PayloadQueue as PayloadQueue
    from eplb_core.queues import Transfer as Transfer
    from eplb_core.queues import TransferQueue as TransferQueue
    from eplb_core.queues import check_match as check_match
    from eplb_core.rearrange import Rearranger as Rearranger
    from eplb_core.rearrange_result import RearrangeResult as RearrangeResult

__version__ = "0.1.0"

_HOME = {
    "BackendContext": "backend",
    "BackendSpec": "backend",
    "ByteSize": "backend",
    "Capabilities": "backend",
    "CommonOptions": "backend",
    "Duration": "backend",
    "EplbCommunicator": "communicator",
    "EplbError": "errors",
    "HandshakeError": "errors",
    "PLUGIN_API_VERSION": "backend",
    "Payload": "queues",
    "PayloadQueue": "queues",
    "PendingTransfer": "communicator",
    "ProbeResult": "backend",
    "RearrangeJob": "job",
    "RearrangeResult": "rearrange_result",
    "Rearranger": "rearrange",
    "StatelessGroup": "groups",
    "TorchGroups": "groups",
    "Transfer": "queues",
    "TransferError": "errors",
    "TransferQueue": "queues",
    "TransferStats": "communicator",
    "as_bytes": "coalesce",
    "check_match": "queues",
    "create_eplb_communicator": "factory",
    "plan_rearrangement": "plan",
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
