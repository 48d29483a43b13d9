"""Finds installed policies like backends, and selects one with its options from a config string.

    [project.entry-points."eplb.policies"]
    deepseek = "eplb_core.policies.deepseek:POLICY"

The target is a `BalancePolicy`. Listing imports none of them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eplb_core.contract.options import option_types
from eplb_core.errors import ConfigError, PolicyError
from eplb_core.registry.config import BackendConfig, parse_config, resolve_options
from eplb_core.registry.discovery import Registration, discover
from eplb_core.registry.entry import fault_place
from eplb_core.registry.names import fold_name
from eplb_core.words import did_you_mean, word_list

if TYPE_CHECKING:
    from eplb_core.policies.base import BalancePolicy

ENTRY_POINT_GROUP = "eplb.policies"
"""The entry-point group in which distributions register a `BalancePolicy`."""


@dataclass(frozen=True, slots=True, order=True)
class PolicyEntry:
    """A registered policy, not imported.

    Attributes:
        name: the name to select it by, folded as in config strings.
        distribution: the distribution that registers it, its name folded as pip folds it.
        version: that distribution's version.
        target: `module:attribute` of the policy.
        location: the directory of the distribution's metadata.
        problem: why it cannot be loaded although it is installed, or "".
        notes: remarks, such as copies that are ignored.
    """

    name: str
    distribution: str
    version: str
    target: str
    location: str = ""
    problem: str = ""
    notes: tuple[str, ...] = ()
    _registration: Any = field(default=None, compare=False, repr=False)

    @property
    def choice(self) -> str:
        """The config string that selects exactly this entry."""
        return f"{self.name}@{self.distribution}"


@dataclass(frozen=True, slots=True)
class SelectedPolicy:
    """A policy selected by a config string.

    Attributes:
        policy: the policy, with its options.
        entry: where it comes from.
        text: the shortest equivalent config string.
    """

    policy: BalancePolicy
    entry: PolicyEntry
    text: str


def available_policies() -> tuple[PolicyEntry, ...]:
    """Return all registered policies, sorted, the same on every rank, without importing any of them."""
    found: dict[tuple[str, str], PolicyEntry] = {}
    for registration in discover(ENTRY_POINT_GROUP):
        entry = _entry(registration)
        first = found.setdefault((entry.name, entry.distribution), entry)
        if first.target != entry.target:
            problem = f"it registers {entry.name} twice, as {first.target} and as {entry.target}"
            found[entry.name, entry.distribution] = dataclasses.replace(first, problem=problem)
    return tuple(sorted(found.values()))


def load_policy(name: str) -> BalancePolicy:
    """Return the policy of a config string: `incremental`, `incremental?within=0.01`, `name@distribution`.

    Raises:
        ConfigError: the string is malformed, or an option or its value is wrong.
        PolicyError: no policy has the name (the message has the nearest names), several distributions register it, it
            cannot be imported, or it is not a policy.
    """
    return select_policy(name).policy


def select_policy(text: str, *, environment: Mapping[str, str] = os.environ) -> SelectedPolicy:
    """Load a policy like `load_policy`, and also return where it comes from.

    Options that the string does not give come from the environment (`EPLB_POLICY__INCREMENTAL__WITHIN`), then from the
    policy's defaults.
    """
    config = parse_config(text, kind="policy")
    entry = _select(config)
    policy = _load(entry)
    options: Any = getattr(policy, "options", None)
    if options is None:
        if config.options:
            raise ConfigError(
                f"policy {entry.name!r} has no options",
                text=text,
                column=config.options[0].column,
                remedy=f"write {dataclasses.replace(config, options=())}",
            )
        return SelectedPolicy(policy, entry, str(config))
    try:
        option_types(options)
        with_options: Any = policy.with_options  # type: ignore[attr-defined]
    except (TypeError, NameError, AttributeError) as error:
        raise _broken(entry, f"its options cannot be read: {type(error).__name__}: {error}") from error
    resolved = resolve_options(config, options, environment=environment, kind="policy")
    if set(resolved.origins.values()) > {"default"}:
        policy = with_options(resolved.values)
    return SelectedPolicy(policy, entry, resolved.canonical())


def _select(config: BackendConfig) -> PolicyEntry:
    entries = available_policies()
    named = [entry for entry in entries if entry.name == config.name]
    if not named:
        names = sorted({entry.name for entry in entries})
        raise PolicyError(
            f"no installed distribution registers a policy {config.name!r}",
            name=config.name,
            why=f"there are {', '.join(names)}"
            if names
            else f"no entry point in group {ENTRY_POINT_GROUP!r} was found",
            remedy=_near(config.name, names) or "install the package that has it, or choose another",
        )
    choices = word_list([entry.choice for entry in named], "or")
    if config.distribution is not None:
        chosen = [entry for entry in named if entry.distribution == config.distribution]
        if not chosen:
            raise PolicyError(
                f"distribution {config.distribution!r} registers no policy {config.name!r}",
                name=config.name,
                remedy=f"write {choices}",
            )
        return chosen[0]
    if len({entry.target for entry in named}) > 1:
        owners = word_list([f"{entry.distribution} ({entry.target})" for entry in named], "and")
        raise PolicyError(
            f"policy {config.name!r} is registered more than once",
            name=config.name,
            why=f"by {owners}",
            remedy=f"write {choices}, or uninstall one of them",
        )
    return named[0]


def _load(entry: PolicyEntry) -> BalancePolicy:
    from eplb_core.policies.base import BalancePolicy

    if entry.problem or entry._registration is None:
        raise _broken(entry, entry.problem or "it was not found by discovery")
    try:
        policy = entry._registration.load()
    except (Exception, SystemExit) as error:
        raise _broken(entry, f"{type(error).__name__}: {error}", fault_place(error)) from error
    if isinstance(policy, type) or not isinstance(policy, BalancePolicy):
        raise PolicyError(
            f"policy {entry.name!r} is not a BalancePolicy",
            name=entry.name,
            where=_where(entry),
            why=f"{policy!r} is not an object with name, summary and rebalance()",
            remedy=f"report this to the authors of {entry.distribution}",
        )
    return policy


def _broken(entry: PolicyEntry, why: str, place: str | None = None) -> PolicyError:
    return PolicyError(
        f"policy {entry.name!r} is installed, but cannot be imported",
        name=entry.name,
        where=_where(entry) + (f", {place}" if place else ""),
        why=" ".join(why.split()),
        remedy=f"pip install --upgrade {entry.distribution}, or pip uninstall {entry.distribution}",
    )


def _where(entry: PolicyEntry) -> str:
    return f"{entry.target} of {entry.distribution} {entry.version}"


def _entry(registration: Registration) -> PolicyEntry:
    name, problem = registration.name, registration.problem or ""
    try:
        name = fold_name(name)
    except ConfigError as error:
        problem = problem or f"its name {name!r} is invalid: {error.why}"
    return PolicyEntry(
        name=name,
        distribution=registration.distribution,
        version=registration.version,
        target=registration.value,
        location=registration.location,
        problem=problem,
        notes=registration.notes,
        _registration=registration,
    )


def _near(name: str, names: Sequence[str]) -> str | None:
    near = did_you_mean(name, names)
    return near.removeprefix(", ").replace("'", "") or None
