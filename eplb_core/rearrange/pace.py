"""A limit on bytes a second."""

from __future__ import annotations

import numbers
import re
import time
from collections.abc import Callable

from eplb_core.contract.quantities import ValueTextError, parse_bytes
from eplb_core.errors import InputError

_LOOK_S = 0.1  # how often a long wait asks whether it is still wanted
_BURST_S = 0.02
_SMALLEST_BURST = 64 << 10
_SPACE_BEFORE_UNIT = re.compile(r"(?<=[0-9])\s+(?=[A-Za-z])")


def parse_pace(pace: str | float) -> float:
    """Return bytes a second.

    Args:
        pace: bytes a second, or text with a unit such as `20GB/s` or `512MiB/s`.

    Raises:
        InputError: it is no such text, or not above 0.
    """
    if isinstance(pace, str):
        size, slash, per = pace.partition("/")
        try:
            if not slash or per.strip() != "s":
                raise ValueTextError("it does not end in /s")
            pace = parse_bytes(_SPACE_BEFORE_UNIT.sub("", size.strip()))
        except ValueTextError as error:
            raise InputError(
                f"{pace!r} is not a pace", why=str(error), remedy="write a size a second, such as 20GB/s"
            ) from None
    given: object = pace
    if isinstance(given, bool) or not isinstance(given, numbers.Real) or not 0 < float(given) < float("inf"):
        raise InputError(f"a pace must be above 0 bytes a second, not {given!r}")
    return float(given)


class Pace:
    """Spreads bursts of bytes over time, so that over a second no more go than the rate allows.

    Args:
        bytes_per_s: the rate.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_at = time.monotonic()

    @property
    def burst_bytes(self) -> int:
        """How much to move at once: what the rate allows in 20 ms, and 64 KiB at least."""
        return max(_SMALLEST_BURST, int(self.bytes_per_s * _BURST_S))

    @property
    def burst_s(self) -> float:
        """How long such a burst takes at this rate, in seconds."""
        return self.burst_bytes / self.bytes_per_s

    def wait(self, nbytes: int, ended: Callable[[], object] = lambda: None) -> None:
        """Wait until the next `nbytes` may go, or `ended` returns something.

        What was not used while nothing moved is lost, all but one burst.
        """
        self._free_at = max(self._free_at, time.monotonic() - _BURST_S)
        while (pause := self._free_at - time.monotonic()) > 0 and not ended():
            time.sleep(min(pause, _LOOK_S))
        self._free_at += nbytes / self.bytes_per_s
