"""The text of `eplb --version`: eplb, its dependencies, its plugins. Reads metadata and imports nothing."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from typing import Final

from eplb_core import __version__
from eplb_core.extras import install_command

_EXTRAS_SHOWN: Final = ("cli", "nixl", "nccl", "plot", "policies")
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)[^;]*(?:;.*extra *== *['\"](?P<extra>[\w-]+)['\"])?")


def version_text() -> str:
    """Return one line per relevant distribution: `name version`, and what it registers.

    The first line is always `eplb VERSION`.
    """
    lines = [f"eplb {__version__}", f"Python {platform.python_version()}"]
    for name, extra in _requirements():
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} is not installed" + (f": {install_command(extra)}" if extra else ""))
    return "\n".join([*lines, *_plugged_in()])


def _requirements() -> Iterator[tuple[str, str]]:
    """Yield (distribution, extra or "") from eplb's metadata, the core's first."""
    try:
        stated = requires("eplb") or []
    except PackageNotFoundError:  # on the path, but not installed
        return
    for text in stated:
        match = _REQUIREMENT.match(text)
        if match and (match["extra"] is None or match["extra"] in _EXTRAS_SHOWN):
            yield match["name"], match["extra"] or ""


def _plugged_in() -> list[str]:
    """Return a line for each other distribution that registers something with eplb."""
    found: dict[str, str] = {}
    for distribution in distributions():
        points = [point for point in distribution.entry_points if point.group.startswith("eplb.")]
        if points and distribution.name != "eplb":
            names = ", ".join(f"{point.group.removeprefix('eplb.')}: {point.name}" for point in points)
            found.setdefault(distribution.name, f"{distribution.name} {distribution.version} ({names})")
    return [found[name] for name in sorted(found)]
