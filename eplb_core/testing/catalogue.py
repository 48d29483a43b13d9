"""The whole contract, in the order in which it is checked."""

from __future__ import annotations

from eplb_core.errors import InputError
from eplb_core.testing.check import Check
from eplb_core.testing.checks import delivery, failure, installed, lifetime, refusal, sharing, streams
from eplb_core.words import did_you_mean


def all_checks(*, thorough: bool = True) -> tuple[Check, ...]:
    """Return every check. Closing comes early: if it hangs, the others can do without it."""
    modules = (installed, lifetime, delivery, refusal, sharing, streams, failure)
    return tuple(check for module in modules for check in module.CHECKS if thorough or not check.thorough)


def checks_named(*names: str) -> tuple[Check, ...]:
    """Return the checks of these names, in the order of the contract.

    Raises:
        InputError: there is none of a name.
    """
    known = {check.name: check for check in all_checks()}
    for name in names:
        if name not in known:
            raise InputError(f"there is no check {name!r}{did_you_mean(name, known)}", remedy="list them with --list")
    return tuple(check for name, check in known.items() if name in names)
