"""Sizes and times written with a unit, such as `64MiB` or `30s`: parse and format them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

from eplb_core.contract.option_types import ByteSize, Duration
from eplb_core.words import did_you_mean

LONGEST_S = 14 * 24 * 3600
"""The longest time that an option accepts, in seconds: system calls that wait are limited to 24 days."""

_WRITTEN_UNITS = {"B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_BYTE_UNITS = {**_WRITTEN_UNITS, "KB": 1000, "TB": 1000**4, "TiB": 1024**4}  # some are read only
_TIME_UNITS = {"ms": Decimal("0.001"), "s": Decimal(1), "min": Decimal(60), "h": Decimal(3600)}
_NUMBER_AND_UNIT = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)([A-Za-z]*)", re.ASCII)


class ValueTextError(ValueError):
    """A text is not a valid value of the option's type. The message completes "because ..."."""


def parse_bytes(text: str) -> ByteSize:
    """Return the bytes written as a text such as `64MiB`.

    Raises:
        ValueTextError: it is not a whole number of bytes.
    """
    size = _parse(text, _BYTE_UNITS)
    if size != int(size):
        raise ValueTextError("it is not a whole number of bytes")
    return ByteSize(int(size))


def parse_seconds(text: str) -> Duration:
    """Return the seconds written as a text such as `30s`.

    Raises:
        ValueTextError: it is not a time.
    """
    return Duration(_parse(text, _TIME_UNITS))


def format_bytes(size: int) -> str:
    """Use the unit that leaves the smallest whole number, a binary one where two are equal."""
    exact = [(size // scale, unit) for unit, scale in _WRITTEN_UNITS.items() if size % scale == 0]
    number, unit = min(exact, key=lambda pair: (pair[0], "i" not in pair[1])) if size else (0, "B")
    return f"{number}{unit}"


def format_seconds(seconds: float) -> str:
    """Use the largest unit that leaves a whole number, else milliseconds with a fraction."""
    exact = Decimal(repr(seconds))
    for unit in ("h", "min", "s"):
        number = exact / _TIME_UNITS[unit]
        if seconds and exact % _TIME_UNITS[unit] == 0:
            return f"{number:f}".partition(".")[0] + unit
    text = f"{exact * 1000:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{text}ms" if seconds else "0s"


def _parse(text: str, units: Mapping[str, int | Decimal]) -> Decimal:
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None:
        raise ValueTextError("it is not a number and a unit")
    number, unit = match.groups()
    if not unit:
        raise ValueTextError("the unit is missing")
    if unit not in units:
        raise ValueTextError(f"there is no unit {unit!r}{did_you_mean(unit, units)}")
    return Decimal(number) * units[unit]
