"""Packages that only some users need, and how to install them."""

from __future__ import annotations

import importlib.util
from typing import Final

from eplb_core.errors import InputError

EXTRAS: Final[dict[str, tuple[str, ...]]] = {
    "cli": ("click", "rich", "psutil", "safetensors"),
    "plot": ("matplotlib",),
    "watch": ("prometheus_client",),
}
"""Extra -> the top-level modules that it installs, as in `pyproject.toml`."""


def missing(extra: str) -> list[str]:
    """Return the modules of an extra that are not installed. Imports none of them."""
    return [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]


def install_command(extra: str) -> str:
    """Return the command that installs an extra."""
    return f'pip install "eplb[{extra}]"'


def require(extra: str, what: str) -> None:
    """Check that every module of an extra is installed.

    Args:
        extra: a key of `EXTRAS`.
        what: what needs it; the first words of the error.

    Raises:
        InputError: a module is missing; the remedy is the command that installs it.
    """
    absent = missing(extra)
    if absent:
        raise InputError(
            f"{what} needs {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not installed",
            remedy=install_command(extra),
        )
