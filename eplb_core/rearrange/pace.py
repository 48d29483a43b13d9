"""A limit on bytes a second."""

from __future__ import annotations

import re
import time

from eplb_core.errors import InputError

_BURST_S = 0.02
_SMALLEST_BURST = 64 << 10
_UNITS = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}
_WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)/s\s*")


def parse_pace(pace: str | float) -> float:
    """Return bytes a second.

    Args:
        pace: bytes a second, or text with a unit such as `20GB/s` or `512MiB/s`.

    Raises:
        InputError: it is no such text, or not above 0.
    """
    if isinstance(pace, str):
        written = _WRITTEN.fullmatch(pace)
        if written is None or written[2] not in _UNITS:
            raise InputError(
                f"{pace!r} is no pace", remedy=f"write a number and one of {', '.join(_UNITS)} a second, such as 20GB/s"
            )
        pace = float(written[1]) * _UNITS[written[2]]
    if not 0 < pace < float("inf"):
        raise InputError(f"a pace has to be above 0 bytes a second, not {pace:g}")
    return float(pace)


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

    def wait(self, nbytes: int) -> None:
        """Wait until the next `nbytes` may go. What was not used while nothing moved is lost, all but one burst."""
        self._free_at = max(self._free_at, time.monotonic() - _BURST_S)
        pause = self._free_at - time.monotonic()
        if pause > 0:
            time.sleep(pause)
        self._free_at += nbytes / self.bytes_per_s
