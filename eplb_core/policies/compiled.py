"""Compiles the loops of policies with numba where it is installed; without it the same functions run as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])

try:
    import numba
except ImportError:
    COMPILES = False
else:
    COMPILES = True
"""Whether numba is installed (extra `policies`). Results do not depend on it, only the time that they take."""


def compiled(function: _F) -> _F:
    """Return the function, compiled if numba is there.

    Compiled code is kept beside the module, or in the user's cache folder, so that one process compiles it for all.
    Neither `fastmath` nor parallel loops: every rank must compute the same bits, compiled or not.
    """
    if not COMPILES:
        return function
    made: Any = numba.njit(cache=True, nogil=True)(function)
    return made  # type: ignore[no-any-return]
