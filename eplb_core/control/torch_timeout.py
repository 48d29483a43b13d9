"""Timeouts as torch.distributed takes them."""

from __future__ import annotations

import datetime
import math


def torch_timeout(seconds: float) -> datetime.timedelta:
    """Return at least `seconds`, in whole milliseconds, and a millisecond at least.

    Stores and process groups cut a timeout down to milliseconds: a wait for 99.9 ms ends after 99 ms, so that an error
    that names 100 ms came too early. None and 0 mean "forever" to some of them.
    """
    return datetime.timedelta(milliseconds=max(1, math.ceil(seconds * 1000)))
