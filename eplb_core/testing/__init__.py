"""The conformance kit: the communicator contract as checks that any backend can be run against.

A backend's author writes one class, and pytest runs the whole contract in real processes:

    from eplb_core.testing import BackendConformance

    class TestMyBackend(BackendConformance):
        config = "mine?window=16MiB"

`eplb conformance mine` runs the same without writing anything. Nothing here is loaded unless it is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eplb_core.testing.catalogue import all_checks as all_checks
    from eplb_core.testing.check import Check as Check
    from eplb_core.testing.check import expect as expect
    from eplb_core.testing.check import skip as skip
    from eplb_core.testing.context import RankContext as RankContext
    from eplb_core.testing.report import Report as Report
    from eplb_core.testing.report import Result as Result
    from eplb_core.testing.report import Status as Status
    from eplb_core.testing.runner import run_conformance as run_conformance
    from eplb_core.testing.state_machine import run_state_machine as run_state_machine
    from eplb_core.testing.subject import Subject as Subject
    from eplb_core.testing.suite import BackendConformance as BackendConformance

_HOME = {
    "BackendConformance": "suite",
    "Check": "check",
    "RankContext": "context",
    "Report": "report",
    "Result": "report",
    "Status": "report",
    "Subject": "subject",
    "all_checks": "catalogue",
    "expect": "check",
    "run_conformance": "runner",
    "run_state_machine": "state_machine",
    "skip": "check",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
