"""One-sided READs over NIXL: the receiver fetches its experts from the senders' memory, on DRAM and VRAM."""

from __future__ import annotations

import importlib.util


def has_nixl() -> bool:
    """Whether NIXL, or its build for ROCm, is installed. Does not import it."""
    for module in ("nixl", "nixl_rocm", "rixl"):
        try:
            if importlib.util.find_spec(module) is not None:
                return True
        except ValueError:  # a module without a spec is registered under this name
            continue
    return False
