"""One promise of the contract as a function, and the words that such a function uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn

CONTRACT_PAGE = "https://eplb.readthedocs.io/en/stable/contract.html"
"""Where the contract is explained, check by check."""


class BrokenPromiseError(AssertionError):
    """A backend did not do what the contract says. The message tells what was seen instead."""


class SkippedError(Exception):
    """A check does not apply here; the message is the reason."""


class Place(StrEnum):
    """Where a check runs."""

    RANKS = "ranks"
    """In every rank, as `function(context)`; all of them are ranks of one set of processes."""
    INSTALLED = "installed"
    """In the process that starts the ranks, as `function(subject)`: it looks at what is installed."""
    EXIT = "exit"
    """In every rank, but its promise is kept only if every rank's process then ends with 0."""


@dataclass(frozen=True, slots=True)
class Check:
    """One promise.

    Attributes:
        function: does it; its name is the check's, and the first line of its docstring is the promise.
        least_ranks: with fewer ranks there is nothing to see.
        needs: names of the `Subject`'s abilities without which it does not apply; `cuda` means that device.
        deadline_s: it is cut, with a stack dump of every rank, after this many seconds.
        kills: the last rank does not survive it, so that it gets processes of its own.
        thorough: too long for every day.
        place: where it runs.
    """

    function: Callable[[Any], object]
    least_ranks: int = 2
    needs: tuple[str, ...] = ()
    deadline_s: float = 40.0
    kills: bool = False
    thorough: bool = False
    place: Place = Place.RANKS

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    @property
    def promise(self) -> str:
        """What is promised, in one line."""
        return (inspect.getdoc(self.function) or self.name.replace("_", " ")).partition("\n")[0]

    @property
    def page(self) -> str:
        """Where the contract says so; empty for a check that is not the kit's own."""
        own = self.function.__module__.startswith("eplb_core.testing.checks.")
        return f"{CONTRACT_PAGE}#{self.name.replace('_', '-')}" if own else ""


def expect(condition: object, seen: str) -> None:
    """Raise `BrokenPromiseError` with what was seen instead, unless the condition holds. `assert` can be turned off."""
    if not condition:
        raise BrokenPromiseError(seen)


def skip(reason: str) -> NoReturn:
    """Say that this check does not apply here. Every rank has to come to the same conclusion."""
    raise SkippedError(reason)


def raised_by(call: Callable[[], object], *kinds: type[BaseException]) -> Any:
    """Return the exception of one of these kinds that `call` raises; anything else breaks the promise."""
    names = " or ".join(kind.__name__ for kind in kinds)
    try:
        call()
    except kinds as error:
        return error
    except Exception as error:
        raise BrokenPromiseError(f"{type(error).__name__} was raised instead of {names}: {error}") from error
    raise BrokenPromiseError(f"nothing was raised, {names} was due")
