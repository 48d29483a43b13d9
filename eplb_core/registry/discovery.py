"""Finds what installed distributions register in an entry-point group, without importing any of it.

Every rank finds the same entries in the same order, regardless of the file system's order.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import importlib_metadata

from eplb_core.registry.names import fold_distribution

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Registration:
    """One entry point of one installed distribution.

    Attributes:
        name: as the distribution wrote it.
        value: `module:attribute`.
        distribution: its name, folded as pip folds it.
        version: the distribution's version.
        location: the directory of the distribution's metadata.
        problem: why it cannot be loaded although it is installed, or None.
        notes: remarks, such as copies that are ignored.
    """

    name: str
    value: str
    distribution: str
    version: str
    location: str
    problem: str | None = None
    notes: tuple[str, ...] = ()
    _entry_point: importlib_metadata.EntryPoint | None = field(default=None, compare=False, repr=False)

    def load(self) -> Any:
        """Import the module and return the attribute. Errors of the import propagate."""
        if self._entry_point is None:
            raise ImportError(f"{self.value} was not found by discovery")
        return self._entry_point.load()


def discover(group: str) -> list[Registration]:
    """Return what is registered in `group`, without duplicates, sorted by name, distribution and value.

    If several copies of a distribution are on the path, the first one counts, as for `import`. Unreadable metadata is
    logged and skipped.
    """
    path = metadata_search_path()
    holders: dict[str, list[importlib_metadata.Distribution]] = {}
    for distribution in _distributions(path=path):
        points = _entry_points(distribution, group)
        name = _name(distribution) if points else None
        if name is not None:
            holders.setdefault(fold_distribution(name), []).append(distribution)
    found = {
        registration
        for name, distributions in holders.items()
        for registration in _registrations(name, distributions, group, path)
    }
    return sorted(found, key=lambda each: (each.name, each.distribution, each.value))


def metadata_search_path() -> list[str]:
    """Return the directories of `sys.path` that are searched for installed distributions.

    The current directory is included only if `PYTHONPATH` names it, or if it comes after the standard library, where
    `.pth` files put it. If it comes before the standard library, Python was merely started there: an `*.egg-info` in
    the current source tree is not an installed distribution.
    """
    here = _real(os.curdir)
    named = {_real(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    if sys.flags.ignore_environment:
        named = set()
    library = _real(os.path.dirname(os.__file__))
    behind_library = False
    path: dict[str, str] = {}
    for entry in sys.path:
        real = _real(entry) if entry else here
        behind_library = behind_library or real == library
        if real == here and not behind_library and here not in named:
            continue
        if entry:
            path.setdefault(real, entry)
    return list(path.values())


def _registrations(
    name: str, holders: Sequence[importlib_metadata.Distribution], group: str, path: Sequence[str]
) -> Iterator[Registration]:
    """Yield the registrations of the first copy; `holders` are the copies that register something."""
    found = _in_order(_distributions(name=name, path=list(path)), path) or list(holders)
    copies = [copy for copy in found if not _is_left_over(copy)] or found
    first = copies[0]
    notes = [f"another copy, {_place(copy)}, is ignored" for copy in copies[1:]]
    notes += [
        f"left-over metadata in {_location(copy)} is ignored: it has no METADATA file"
        for copy in found
        if copy not in copies
    ]
    problem = None
    points = _entry_points(first, group)
    if not points:
        problem = f"{_place(first)} comes earlier on the path and does not register it"
        holder = _in_order(holders, path)[0]
        points = _entry_points(holder, group)
        notes = []
        first = holder
    for point in points:
        yield Registration(
            name=point.name,
            value=point.value or "",
            distribution=name,
            version=_version(first),
            location=_location(first),
            problem=problem,
            notes=tuple(notes),
            _entry_point=point,
        )


def _distributions(**context: Any) -> list[importlib_metadata.Distribution]:
    # Third-party finders may yield objects that only resemble a Distribution; that is enough here.
    return list(importlib_metadata.distributions(**context))  # type: ignore[arg-type]


def _is_left_over(distribution: importlib_metadata.Distribution) -> bool:
    """Whether an interrupted uninstall has left only the directory: there is nothing in it that says what it is."""
    try:
        return not any(distribution.read_text(file) for file in ("METADATA", "PKG-INFO", ""))
    except Exception:  # noqa: BLE001 - as below; whatever cannot be read is not known to be empty
        return False


def _in_order(
    copies: Iterable[importlib_metadata.Distribution], path: Sequence[str]
) -> list[importlib_metadata.Distribution]:
    """Sort copies of one distribution by their position on the path, the newest first within one directory."""
    place = {_real(entry): index for index, entry in enumerate(path)}
    by_version = sorted(copies, key=lambda copy: _version_key(_version(copy)), reverse=True)
    return sorted(by_version, key=lambda copy: place.get(_real(_location(copy)), len(place)))


def _entry_points(distribution: importlib_metadata.Distribution, group: str) -> list[importlib_metadata.EntryPoint]:
    try:
        return [point for point in distribution.entry_points if point.group == group]
    except Exception as error:  # noqa: BLE001 - third-party metadata may be broken in any way
        _log.warning("skipped the metadata of a distribution in %s: %s", _location(distribution), error)
        return []


def _name(distribution: importlib_metadata.Distribution) -> str | None:
    try:
        name = distribution.name
    except Exception as error:  # noqa: BLE001 - as above
        _log.warning("skipped a distribution without a name in %s: %s", _location(distribution), error)
        return None
    return name or None


def _version(distribution: importlib_metadata.Distribution) -> str:
    try:
        return distribution.version or "?"
    except Exception:  # noqa: BLE001 - as above; a distribution without a version can still be loaded
        return "?"


def _version_key(version: str) -> list[tuple[int, int | str]]:
    """Return a key that sorts 1.10 after 1.9; good enough to choose between two copies in one directory."""
    return [(1, int(part)) if part.isdigit() else (0, part) for part in re.findall(r"\d+|[a-z]+", version)]


def _location(distribution: importlib_metadata.Distribution) -> str:
    return str(distribution.locate_file(""))


def _place(distribution: importlib_metadata.Distribution) -> str:
    return f"{_version(distribution)} in {_location(distribution)}"


def _real(entry: str) -> str:
    try:
        return os.path.realpath(entry)
    except OSError:
        return entry  # the current directory was deleted
