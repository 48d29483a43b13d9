"""Names of backends and distributions: which are valid, and which spellings are equal."""

from __future__ import annotations

import re
import string

from eplb_core.errors import ConfigError

_LETTERS = string.ascii_lowercase
_DIGITS = string.digits
_DISTRIBUTION = re.compile(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?", re.ASCII | re.IGNORECASE)


def fold_name(name: str) -> str:
    """Return the name of a backend with `-` folded to `_`, as config strings do.

    Raises:
        ConfigError: it is not a valid name.
    """
    return read_name(name, name, 1, "the name of a backend")


def fold_distribution(name: str) -> str:
    """Return a distribution's name as pip folds it: lower case, runs of `-`, `_` and `.` become `-`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_name(written: str, text: str, column: int, what: str) -> str:
    """Return a name or a key with `-` folded to `_`.

    Args:
        written: the name.
        text: the config string that contains it, for errors.
        column: where it starts in `text`, from 1.
        what: what the name is, for errors.

    Raises:
        ConfigError: it is malformed.
    """
    if not written:
        raise ConfigError(f"{what} is missing", text=text, column=column)
    previous = ""
    for offset, sign in enumerate(written):
        why = None
        if sign not in _LETTERS + _DIGITS + "-_":
            why = f"{sign!r} is not a lower-case letter, a digit, '_' or '-'"
        elif not previous and sign not in _LETTERS:
            why = "it must start with a lower-case letter"
        elif sign in "-_" and previous in "-_":
            why = "two of '-' and '_' in a row"
        elif sign in "-_" and offset == len(written) - 1:
            why = f"it ends with {sign!r}"
        if why is not None:
            remedy = f"write {written.lower()}" if sign.lower() in _LETTERS else None
            raise ConfigError(f"{what} is not well formed", text=text, column=column + offset, why=why, remedy=remedy)
        previous = sign
    return written.replace("-", "_")


def read_distribution(written: str, text: str, column: int) -> str:
    """Return the name of a distribution as pip folds it.

    Args:
        written: the name.
        text: the config string that contains it, for errors.
        column: where it starts in `text`, from 1.

    Raises:
        ConfigError: it is malformed.
    """
    if not written:
        raise ConfigError("the name of the distribution is missing", text=text, column=column)
    if not _DISTRIBUTION.fullmatch(written):
        legal = re.compile(r"[A-Za-z0-9._-]", re.ASCII)
        offset = next((index for index, sign in enumerate(written) if not legal.match(sign)), None)
        if offset is not None:
            why = f"{written[offset]!r} is not a letter, a digit, '.', '_' or '-'"
        else:
            offset = 0 if not written[0].isalnum() else len(written) - 1
            why = "it must start and end with a letter or a digit"
        what = "the name of the distribution is not well formed"
        raise ConfigError(what, text=text, column=column + offset, why=why)
    return fold_distribution(written)
