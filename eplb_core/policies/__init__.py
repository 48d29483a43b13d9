"""Policies decide on a new placement from the loads: arrays in, arrays out, no torch.

`eplb_core.registry.policies` finds them by entry point, like backends. Every name loads on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eplb_core.policies.base import BalancePolicy as BalancePolicy
    from eplb_core.policies.base import PlacementDecision as PlacementDecision
    from eplb_core.policies.base import PlacementRequest as PlacementRequest
    from eplb_core.policies.base import decide as decide
    from eplb_core.policies.movement import minimize_movement as minimize_movement
    from eplb_core.policies.movement import slots_anew as slots_anew
    from eplb_core.policies.worth import CostModel as CostModel
    from eplb_core.policies.worth import WorthDecision as WorthDecision
    from eplb_core.policies.worth import should_rebalance as should_rebalance

_HOME = {
    "BalancePolicy": "base",
    "CostModel": "worth",
    "PlacementDecision": "base",
    "PlacementRequest": "base",
    "WorthDecision": "worth",
    "decide": "base",
    "minimize_movement": "movement",
    "should_rebalance": "worth",
    "slots_anew": "movement",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
