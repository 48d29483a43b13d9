"""Finds the policies that are installed, by entry point, like backends.

    [project.entry-points."eplb.policies"]
    deepseek = "eplb_core.policies.deepseek:POLICY"

The target is a `BalancePolicy`. Listing imports none of them.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import importlib_metadata

from eplb_core.errors import PolicyError
from eplb_core.policies.base import BalancePolicy

if TYPE_CHECKING:
    pass

ENTRY_POINT_GROUP = "eplb.policies"
"""The entry-point group in which distributions register a `BalancePolicy`."""


@dataclass(frozen=True, slots=True, order=True)
class PolicyEntry:
    """A registered policy, not imported.

    Attributes:
        name: the name to select it by.
        distribution: the distribution that registers it.
        version: that distribution's version.
        target: `module:attribute` of the policy.
    """

    name: str
    distribution: str
    version: str
    target: str


def available_policies() -> tuple[PolicyEntry, ...]:
    """Return all registered policies, sorted, without importing any of them."""
    return tuple(sorted({_entry(point) for point in importlib_metadata.entry_points(group=ENTRY_POINT_GROUP)}))


def load_policy(name: str) -> BalancePolicy:
    """Import and return the policy of this name; `name@distribution` says whose, where two register one name.

    Raises:
        PolicyError: no policy has the name (the message has the nearest names), several distributions register it, it
            cannot be imported, or it is not a policy.
    """
    wanted, _, distribution = name.partition("@")
    entries = available_policies()
    matches = [entry for entry in entries if entry.name == _fold(wanted)]
    if distribution:
        matches = [entry for entry in matches if _normal(entry.distribution) == _normal(distribution)]
    if not matches:
        raise _unknown(name, entries)
    if len(matches) > 1:
        owners = " and ".join(f"{entry.distribution} ({entry.target})" for entry in matches)
        raise PolicyError(
            f"policy {name!r} is registered more than once",
            name=name,
            why=f"by {owners}",
            remedy=f"write {matches[0].name}@{matches[0].distribution}, or uninstall one of them",
        )
    return _load(matches[0])


def _load(entry: PolicyEntry) -> BalancePolicy:
    where = f"{entry.target} of {entry.distribution} {entry.version}"
    point = importlib_metadata.EntryPoint(entry.name, entry.target, ENTRY_POINT_GROUP)
    try:
        policy = point.load()
    except Exception as error:
        raise PolicyError(
            f"policy {entry.name!r} is installed, but cannot be imported",
            name=entry.name,
            where=where,
            why=f"{type(error).__name__}: {error}",
            remedy=f"repair or upgrade {entry.distribution}",
        ) from error
    if isinstance(policy, type) or not isinstance(policy, BalancePolicy):
        raise PolicyError(
            f"policy {entry.name!r} is not a BalancePolicy",
            name=entry.name,
            where=where,
            why=f"{policy!r} is not an object with name, summary and rebalance()",
            remedy=f"report this to the authors of {entry.distribution}",
        )
    return policy


def _unknown(name: str, entries: tuple[PolicyEntry, ...]) -> PolicyError:
    names = sorted({entry.name for entry in entries})
    near = difflib.get_close_matches(_fold(name.partition("@")[0]), names, n=3)
    return PolicyError(
        f"no installed distribution registers a policy {name!r}",
        name=name,
        why=f"there are {', '.join(names)}" if names else f"no entry point in group {ENTRY_POINT_GROUP!r} was found",
        remedy=f"did you mean {' or '.join(near)}?" if near else "install the package that has it, or pick another",
    )


def _entry(point: importlib_metadata.EntryPoint) -> PolicyEntry:
    distribution = point.dist
    owner, version = (distribution.name, distribution.version) if distribution else ("unknown", "unknown")
    return PolicyEntry(_fold(point.name), owner or "unknown", version or "unknown", point.value)


def _fold(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()
