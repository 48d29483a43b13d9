"""Parsers of command-line values shared by several commands: ranges of layers."""

from __future__ import annotations

import re

from eplb_core.errors import InputError

_LAYERS = re.compile(r"(?:(?P<start>\d+):)?(?P<stop>\d+)")


def parse_layers(text: str | None, num_layers: int) -> tuple[int, ...]:
    """Return the layers that `COUNT` or `START:STOP` selects; all of them for None.

    Raises:
        InputError: it is neither, or selects none.
    """
    if text is None:
        return tuple(range(num_layers))
    match = _LAYERS.fullmatch(text.strip())
    if match is None:
        raise InputError(
            f"--layers {text!r} is neither a number nor a range", remedy="give 4, or 2:6 for 2, 3, 4 and 5"
        )
    start, stop = int(match["start"] or 0), int(match["stop"])
    if start >= stop or stop > num_layers:
        raise InputError(f"--layers {text} selects no layers that exist", why=f"there are {num_layers}, from 0")
    return tuple(range(start, stop))
