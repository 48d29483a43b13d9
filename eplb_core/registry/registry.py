"""The installed backends: which can be used, and what to do about the others.

Listing imports the module of each spec and nothing else. A backend's requirements are located, not imported.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from eplb_core.contract.backend import ENTRY_POINT_GROUP, PLUGIN_API_VERSION, BackendFactory, BackendProbe, BackendSpec
from eplb_core.contract.option_types import CommonOptions
from eplb_core.contract.options import option_types
from eplb_core.errors import (
    BackendBrokenError,
    BackendConflictError,
    BackendError,
    BackendNotInstalledError,
    ConfigError,
    UnknownBackendError,
)
from eplb_core.registry.config import AUTO, BackendConfig, ResolvedOptions, parse_config, resolve_options
from eplb_core.registry.discovery import Registration, discover
from eplb_core.registry.entry import (
    BackendEntry,
    BackendState,
    fault_place,
    read_entry,
    repair_command,
    selection_error,
)
from eplb_core.registry.known import KNOWN_BACKENDS
from eplb_core.registry.names import fold_name
from eplb_core.words import did_you_mean, word_list

__all__ = [
    "BackendEntry",
    "BackendState",
    "Registry",
    "ResolvedBackend",
    "default_registry",
    "import_dotted",
    "load_factory",
    "load_options_class",
    "load_probe",
]


@dataclasses.dataclass(frozen=True, slots=True)
class ResolvedBackend:
    """The backend that a config string selects.

    Attributes:
        entry: the installed backend; None for `auto`.
        options: every option with its value; for `auto` only the options common to all backends.
    """

    entry: BackendEntry | None
    options: ResolvedOptions

    @property
    def config(self) -> BackendConfig:
        """The config that it was resolved from."""
        return self.options.config

    @property
    def timeout_s(self) -> float:
        """The `timeout` option, in seconds: the longest that any wait for a peer may take."""
        return float(getattr(self.options.values, "timeout", CommonOptions().timeout))

    @property
    def start_timeout_s(self) -> float:
        """The `start_timeout` option, in seconds: the longest wait for all ranks at the start."""
        seconds = getattr(self.options.values, "start_timeout", None)
        return self.timeout_s if seconds is None else float(seconds)


class Registry:
    """The backends of one entry-point group. Searched on first use and then cached.

    Args:
        group: the entry-point group.
        api_version: the plugin API that backends must be written for; by default that of this eplb.
    """

    def __init__(self, group: str = ENTRY_POINT_GROUP, *, api_version: tuple[int, int] = PLUGIN_API_VERSION) -> None:
        self._group = group
        self._api_version = api_version
        self._found: dict[str, list[Registration]] | None = None
        self._entries: dict[Registration, BackendEntry] = {}

    def entries(self) -> list[BackendEntry]:
        """Return every installed backend, sorted by name and distribution, the same on every rank."""
        entries = []
        for name, registrations in sorted(self._registrations().items()):
            distinct = _without_same_value(registrations)
            for registration in distinct:
                entry = self._entry(name, registration)
                if len(distinct) > 1 and entry.state is BackendState.READY:
                    entry = dataclasses.replace(
                        entry,
                        state=BackendState.CONFLICT,
                        why=f"{word_list([each.distribution for each in distinct], 'and')} register this name",
                        remedy=f"write {entry.choice}",
                    )
                entries.append(entry)
        return entries

    def names(self) -> list[str]:
        """Return the names of all installed backends, usable or not, sorted. Imports nothing."""
        return sorted(self._registrations())

    def select(self, config: BackendConfig) -> BackendEntry:
        """Return the entry that a config string names. Only the specs of that name are imported.

        Raises:
            UnknownBackendError: no distribution registers the name, or the named distribution does not.
            BackendNotInstalledError: the backend, or a package that it needs, is not installed.
            BackendConflictError: several distributions register the name, and the string selects none of them.
            BackendBrokenError: its spec cannot be imported, or is not one.
            BackendVersionError: it was written for a plugin API that this eplb does not support.
        """
        registrations = self._registrations().get(config.name, [])
        if not registrations:
            raise self._not_found(config.name)
        distinct = _without_same_value(registrations)
        if config.distribution is not None:
            chosen = [each for each in registrations if each.distribution == config.distribution]
            if not chosen:
                raise UnknownBackendError(
                    f"distribution {config.distribution!r} registers no backend {config.name!r}",
                    name=config.name,
                    remedy="write " + _choices(config.name, registrations),
                )
        elif len(distinct) > 1:
            raise BackendConflictError(
                f"{len(distinct)} distributions register a backend {config.name!r}",
                name=config.name,
                where=", ".join(f"{each.distribution} {each.version}" for each in distinct),
                remedy="write " + _choices(config.name, distinct),
            )
        else:
            chosen = distinct
        entry = self._entry(config.name, chosen[0])
        if entry.state is not BackendState.READY:
            raise selection_error(entry) from entry.cause
        return entry

    def resolve(
        self,
        config: BackendConfig | str,
        *,
        arguments: Mapping[str, object] | None = None,
    ) -> ResolvedBackend:
        """Return the backend that a config string names, with all of its options.

        Args:
            config: the config string, or the parsed one.
            arguments: option values by name; they win over the config string.

        Raises:
            ConfigError: the config string, or an option, is wrong.
            BackendError: the backend cannot be selected, as in `select`, or its options class is broken.
        """
        parsed = parse_config(config) if isinstance(config, str) else config
        if parsed.name == AUTO:
            # The backend is unknown until all ranks have probed theirs. Other options belong to that backend.
            types = option_types(CommonOptions)
            parsed = dataclasses.replace(parsed, options=tuple(each for each in parsed.options if each.key in types))
            arguments = {key: value for key, value in (arguments or {}).items() if key in types}
            return ResolvedBackend(None, resolve_options(parsed, CommonOptions, arguments=arguments))
        entry = self.select(parsed)
        return ResolvedBackend(entry, resolve_options(parsed, load_options_class(entry), arguments=arguments))

    def _not_found(self, name: str) -> BackendError:
        if name in KNOWN_BACKENDS:
            return BackendNotInstalledError(
                f"backend {name!r} is not installed", name=name, remedy=KNOWN_BACKENDS[name]
            )
        installed = self.names()
        near = did_you_mean(name, sorted({*installed, *KNOWN_BACKENDS, AUTO}))
        return UnknownBackendError(
            f"there is no backend {name!r}{near}",
            name=name,
            remedy=f"choose one that is installed: {', '.join(installed) or 'none is'}; see `eplb backends`",
        )

    def _registrations(self) -> dict[str, list[Registration]]:
        if self._found is None:
            found: dict[str, list[Registration]] = {}
            for registration in discover(self._group):
                found.setdefault(_folded(registration.name), []).append(registration)
            self._found = {name: _one_each(name, registrations) for name, registrations in found.items()}
        return self._found

    def _entry(self, name: str, registration: Registration) -> BackendEntry:
        if registration not in self._entries:
            self._entries[registration] = read_entry(name, registration, self._api_version)
        return self._entries[registration]


@functools.cache
def default_registry() -> Registry:
    """Return the registry of this process."""
    return Registry()


def load_factory(entry: BackendEntry) -> BackendFactory:
    """Import the function that builds the backend's communicators.

    Raises:
        BackendBrokenError: the import fails, or its target is not callable.
    """
    factory: BackendFactory = _load_callable(entry, "factory", _spec(entry).factory)
    return factory


def load_options_class(entry: BackendEntry) -> type:
    """Import the backend's options dataclass.

    Raises:
        BackendBrokenError: the import fails, or it is not a dataclass whose fields have a text form.
    """
    dotted = _spec(entry).options
    options_class = _load(entry, "options class", dotted)
    try:
        option_types(options_class)
    except (TypeError, NameError, AttributeError) as error:
        raise _broken_part(entry, "options class", dotted, error) from error
    return options_class  # type: ignore[no-any-return]


def load_probe(entry: BackendEntry) -> BackendProbe | None:
    """Import the backend's probe, or return None if it has none. Called in the child process of the probe.

    Raises:
        BackendBrokenError: the import fails, or its target is not callable.
    """
    dotted = _spec(entry).probe
    if dotted is None:
        return None
    probe: BackendProbe = _load_callable(entry, "probe", dotted)
    return probe


def import_dotted(dotted: str) -> Any:
    """Return what `module:attribute` names. Errors of the import propagate."""
    module, _, attribute = dotted.partition(":")
    return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))


def _folded(name: str) -> str:
    try:
        return fold_name(name)
    except ConfigError:
        return name  # listed as broken under the name that it gave itself


def _one_each(name: str, registrations: Sequence[Registration]) -> list[Registration]:
    """Keep one registration per distribution; two under the same name are a fault of that distribution."""
    kept: dict[str, Registration] = {}
    for registration in registrations:
        first = kept.get(registration.distribution)
        if first is None:
            kept[registration.distribution] = registration
        elif first.value != registration.value:
            problem = f"it registers {name} twice, as {first.value} and as {registration.value}"
            kept[registration.distribution] = dataclasses.replace(first, problem=problem)
    return list(kept.values())


def _without_same_value(registrations: Sequence[Registration]) -> list[Registration]:
    """Keep the first of several distributions that register the same object: this is not a conflict."""
    distinct: dict[str, Registration] = {}
    for registration in registrations:
        distinct.setdefault(registration.value, registration)
    return list(distinct.values())


def _choices(name: str, registrations: Sequence[Registration]) -> str:
    return word_list([f"{name}@{each.distribution}" for each in registrations], "or")


def _load(entry: BackendEntry, part: str, dotted: str) -> Any:
    try:
        return import_dotted(dotted)
    except (Exception, SystemExit) as error:
        raise _broken_part(entry, part, dotted, error) from error


def _load_callable(entry: BackendEntry, part: str, dotted: str) -> Any:
    loaded = _load(entry, part, dotted)
    if not callable(loaded):
        error = TypeError(f"{type(loaded).__name__} is not callable")
        raise _broken_part(entry, part, dotted, error) from error
    return loaded


def _spec(entry: BackendEntry) -> BackendSpec:
    if entry.spec is None:
        raise selection_error(entry) from entry.cause
    return entry.spec


def _broken_part(entry: BackendEntry, part: str, dotted: str, cause: BaseException) -> BackendBrokenError:
    return BackendBrokenError(
        f"the {part} {dotted} of backend {entry.name!r} is broken",
        name=entry.name,
        where=f"{entry.distribution} {entry.version}, {fault_place(cause) or entry.location}",
        why=f"{type(cause).__name__}: {cause}",
        remedy=repair_command(entry),
    )
