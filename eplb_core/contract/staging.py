"""How much staging memory a rank may use where the configuration does not say it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DEFAULT_STAGING_BYTES = 256 << 20
"""Staging memory of a rank on a CPU, and the least on a GPU."""

MOST_STAGING_BYTES = 1 << 30
"""What the default never exceeds: between GPUs more made no difference that was worth it."""

_SHARE = 32  # one part in so many of a GPU's memory
_STEP = 64 << 20  # GPUs of one kind report slightly different sizes


def default_staging_bytes(device: torch.device) -> int:
    """Return the staging memory of a rank whose weights lie on `device`, in bytes; ranks take the least of all.

    On a GPU it is a thirty-second part of its memory, between 256 MiB and 1 GiB. A larger window means fewer steps, and
    each step costs a round of messages and a wait for the slowest rank.
    """
    if device.type != "cuda":
        return DEFAULT_STAGING_BYTES
    import torch  # importing this module loads no torch

    share = torch.cuda.get_device_properties(device).total_memory // _SHARE // _STEP * _STEP
    return max(DEFAULT_STAGING_BYTES, min(MOST_STAGING_BYTES, share))
