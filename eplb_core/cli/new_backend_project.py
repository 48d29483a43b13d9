"""The project that `eplb new-backend` writes: its names, and its files from the templates next to this module.

The templates have six values to fill in and no conditions or loops, so `string.Template` is enough: it is in the
standard library, and a missing name is an error.
"""

from __future__ import annotations

import shutil
import string
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

from eplb_core import __version__
from eplb_core.contract.backend import ENTRY_POINT_GROUP, PLUGIN_API_VERSION
from eplb_core.errors import ConfigError, InputError
from eplb_core.registry.config import AUTO
from eplb_core.registry.discovery import discover
from eplb_core.registry.known import KNOWN_BACKENDS
from eplb_core.registry.names import fold_name

_SUFFIX: Final = ".tmpl"  # so that linters and build tools ignore the templates
_PACKAGE_FOLDER: Final = "__package__"
_LONGEST_NAME: Final = 30
_OUR_PACKAGES: Final = ("eplb_core", "eplb_backends")


@dataclass(frozen=True, slots=True)
class ProjectNames:
    """The names of a project and its contents.

    Attributes:
        name: of the backend, as in config strings: `acme_rail`.
        distribution: what pip installs: `eplb-acme-rail`.
        package: what Python imports: `eplb_acme_rail`.
        class_name: prefix of the class names: `AcmeRail`.
    """

    name: str
    distribution: str
    package: str
    class_name: str

    @classmethod
    def of(cls, name: str) -> ProjectNames:
        """Return the names that follow from the backend's.

        Raises:
            InputError: the name is invalid or already taken.
        """
        try:
            folded = fold_name(name)
        except ConfigError as error:
            raise InputError(
                f"{name!r} cannot be the name of a backend",
                why=error.why or "it is empty",
                remedy="use lower-case letters, digits and '_', and start with a letter",
            ) from error
        names = cls(
            name=folded,
            distribution="eplb-" + folded.replace("_", "-"),
            package="eplb_" + folded,
            class_name="".join(part.capitalize() for part in folded.split("_")),
        )
        fault = names._fault()
        if fault:
            raise InputError(f"{name!r} cannot be the name of a new backend", why=fault, remedy="choose another name")
        return names

    def _fault(self) -> str:
        if len(self.name) > _LONGEST_NAME:
            return f"it has {len(self.name)} letters, but at most {_LONGEST_NAME} are allowed"
        if self.name == AUTO:
            return "it makes eplb choose a backend"
        if self.package in _OUR_PACKAGES:
            return f"its package would be {self.package}, which is eplb's own"
        holders = {each.distribution for each in discover(ENTRY_POINT_GROUP) if each.name == self.name}
        others = sorted(holders - {self.distribution})
        if others:
            return f"the installed distribution {others[0]} registers it"
        if self.name in KNOWN_BACKENDS:
            return f"such a backend already exists: {KNOWN_BACKENDS[self.name]}"
        return ""


def write_project(names: ProjectNames, folder: Path) -> list[Path]:
    """Write the project into the new directory `folder`, and return its files, sorted. All of it or nothing.

    Raises:
        InputError: the directory already exists, or cannot be written.
    """
    contents = render_project(names)
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise InputError(
            f"{folder} already exists",
            why="nothing is overwritten",
            remedy="move it away, or choose another directory with --into",
        ) from error
    except OSError as error:
        raise InputError(f"cannot create {folder}", why=error.strerror or str(error)) from error
    try:
        for path, text in contents.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(f"cannot write {folder}", why=error.strerror or str(error)) from error
    return [folder / path for path in sorted(contents)]


def render_project(names: ProjectNames) -> dict[str, str]:
    """Return the files of the project: path in it -> text."""
    major, minor, *_ = __version__.split(".")
    values = {
        "name": names.name,
        "distribution": names.distribution,
        "package": names.package,
        "class_name": names.class_name,
        "api_version": repr(PLUGIN_API_VERSION),
        "requirement": f"eplb>={major}.{minor},<{int(major) + 1}",
    }
    return {
        path.replace(_PACKAGE_FOLDER, names.package): string.Template(text).substitute(values)
        for path, text in _templates(files("eplb_core.cli") / "templates" / "backend", "")
    }


def _templates(folder: Traversable, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _templates(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(_SUFFIX):
            yield prefix + entry.name.removesuffix(_SUFFIX), entry.read_text(encoding="utf-8")
