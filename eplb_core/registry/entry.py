"""One installed backend: its registration, read and checked without importing the backend itself."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import importlib_metadata

from eplb_core.contract.backend import PLUGIN_API_VERSION, BackendSpec, Capabilities
from eplb_core.errors import (
    BackendBrokenError,
    BackendError,
    BackendNotInstalledError,
    BackendVersionError,
    ConfigError,
)
from eplb_core.registry.config import AUTO
from eplb_core.registry.discovery import Registration
from eplb_core.registry.names import fold_name
from eplb_core.words import word_list

_REFERENCE: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", re.ASCII)
_CORE: Final = os.path.dirname(__file__)
_IMPORT_MACHINERY: Final = (
    "<frozen ",
    *(os.path.dirname(file) + os.sep for file in (importlib.__file__, importlib_metadata.__file__, _CORE) if file),
)


class BackendState(StrEnum):
    """Whether an installed backend can be used."""

    READY = "ready"
    NOT_INSTALLED = "not installed"
    BROKEN = "broken"
    CONFLICT = "conflict"
    INCOMPATIBLE = "incompatible"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendEntry:
    """One backend that an installed distribution registers.

    Attributes:
        name: its name, folded as in config strings.
        distribution: the distribution's name, folded as pip folds it.
        version: the distribution's version.
        value: the entry point's `module:attribute`.
        location: the directory of the distribution's metadata.
        spec: the registered spec, or None if it could not be read.
        state: whether it can be used. `UNAVAILABLE` is only known after a probe.
        why: the reason for any state except ready, one clause.
        remedy: the command or setting that fixes it.
        file: `file:line` at which its import failed, if it did.
        notes: remarks, such as copies that are ignored.
        cause: the exception behind `BROKEN`, if there was one.
    """

    name: str
    distribution: str
    version: str
    value: str
    location: str
    spec: BackendSpec | None = None
    state: BackendState = BackendState.READY
    why: str = ""
    remedy: str = ""
    file: str = ""
    notes: tuple[str, ...] = ()
    cause: BaseException | None = field(default=None, compare=False, repr=False)

    @property
    def choice(self) -> str:
        """The config string that selects exactly this entry."""
        return f"{self.name}@{self.distribution}"


def read_entry(
    name: str, registration: Registration, api_version: tuple[int, int] = PLUGIN_API_VERSION
) -> BackendEntry:
    """Import the spec and judge whether an eplb with plugin API `api_version` can use it."""
    entry = BackendEntry(
        name=name,
        distribution=registration.distribution,
        version=registration.version,
        value=registration.value,
        location=registration.location,
        notes=registration.notes,
    )
    fault = registration.problem or _fault_of_name(name) or _fault_of_reference("entry point", registration.value)
    if fault is not None:
        return _broken(entry, fault)
    try:
        spec = registration.load()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin may fail in any way; the others continue
        return _broken(entry, f"{type(error).__name__}: {error}", error)
    fault = _fault_of_spec(spec, name)
    if fault is not None:
        return _broken(entry, fault)
    entry = dataclasses.replace(entry, spec=spec)
    if not speaks(api_version, spec.api_version):
        older, package = ("the backend", entry.distribution) if spec.api_version < api_version else ("eplb", "eplb")
        return dataclasses.replace(
            entry,
            state=BackendState.INCOMPATIBLE,
            why=f"it uses plugin API {_dotted(spec.api_version)}, but this eplb has {_dotted(api_version)}; "
            f"{older} must be upgraded",
            remedy=f"pip install --upgrade {package}",
        )
    missing = [modules for modules in spec.requires if not any(map(_is_importable, modules.split("|")))]
    if missing:
        return dataclasses.replace(
            entry,
            state=BackendState.NOT_INSTALLED,
            why=f"it needs the module {word_list([word_list(modules.split('|'), 'or') for modules in missing], 'and')}",
            remedy=spec.install or f"install what {entry.distribution} needs",
        )
    return entry


def _broken(entry: BackendEntry, why: str, cause: BaseException | None = None) -> BackendEntry:
    return dataclasses.replace(
        entry,
        state=BackendState.BROKEN,
        why=" ".join(why.split()),
        remedy=repair_command(entry),
        file=fault_place(cause) or entry.location,
        cause=cause,
    )


def _fault_of_name(name: str) -> str | None:
    if name == AUTO:
        return f"the name {AUTO!r} is reserved"
    try:
        fold_name(name)
    except ConfigError as error:
        return f"its name {name!r} is invalid: {error.why}"
    return None


def _fault_of_spec(registered: Any, name: str) -> str | None:
    """Return what is wrong with a spec. Not every plugin is type-checked, so every field is examined."""
    if not isinstance(registered, BackendSpec):
        return f"it registers {type(registered).__name__} where a BackendSpec is expected"
    spec: Any = registered
    if spec.name != name:
        return f"its spec is named {spec.name!r}, but its entry point is named {name!r}"
    version = spec.api_version
    if not (isinstance(version, tuple) and len(version) == 2 and all(type(part) is int for part in version)):
        return f"its api_version is {version!r} where two whole numbers are expected"
    if not isinstance(spec.requires, tuple) or not all(isinstance(module, str) for module in spec.requires):
        return f"its requires is {spec.requires!r} where a tuple of module names is expected"
    if not isinstance(spec.capabilities, Capabilities):
        return f"its capabilities are {type(spec.capabilities).__name__} where Capabilities are expected"
    if type(spec.priority) is not int:
        return f"its priority is {spec.priority!r} where a whole number is expected"
    if not isinstance(spec.stateless_substitute, str):
        return f"its stateless_substitute is {spec.stateless_substitute!r} where a backend's name is expected"
    return (
        _fault_of_reference("factory", spec.factory)
        or _fault_of_reference("options", spec.options)
        or (None if spec.probe is None else _fault_of_reference("probe", spec.probe))
    )


def _fault_of_reference(part: str, reference: Any) -> str | None:
    if isinstance(reference, str) and _REFERENCE.fullmatch(reference):
        return None
    return f"its {part} is {reference!r} where 'module:attribute' is expected"


def speaks(ours: tuple[int, int], theirs: tuple[int, int]) -> bool:
    """Return whether an eplb with plugin API `ours` accepts a backend written for `theirs`.

    Minor versions only add, and every addition has a default, so any earlier minor version is compatible.
    """
    return theirs[0] == ours[0] and theirs[1] <= ours[1]


def _is_importable(module: str) -> bool:
    """Whether the top-level module exists. Does not import it: importing a parent package would run its code."""
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


# --- errors ----------------------------------------------------------------------------------------------------------


def selection_error(entry: BackendEntry) -> BackendError:
    """Return the error for selecting an entry that is not ready."""
    where = f"{entry.distribution} {entry.version}"
    if entry.state is BackendState.NOT_INSTALLED:
        what = f"backend {entry.name!r} is not fully installed"
        return BackendNotInstalledError(what, name=entry.name, where=where, why=entry.why, remedy=entry.remedy)
    if entry.state is BackendState.INCOMPATIBLE:
        what = f"backend {entry.name!r} is not compatible with this version of eplb"
        return BackendVersionError(what, name=entry.name, where=where, why=entry.why, remedy=entry.remedy)
    what = f"backend {entry.name!r} is broken"
    where = f"{where}, {entry.file}"
    return BackendBrokenError(what, name=entry.name, where=where, why=entry.why, remedy=entry.remedy)


def repair_command(entry: BackendEntry) -> str:
    return f"pip install --upgrade {entry.distribution}, or pip uninstall {entry.distribution}"


def fault_place(error: BaseException | None) -> str | None:
    """Return `file:line` of the innermost frame that is not Python's own import machinery."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    place = None
    trace = error.__traceback__ if error is not None else None
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(_IMPORT_MACHINERY):
            place = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
