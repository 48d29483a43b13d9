"""The boundary to foreign files: any failure of a parser becomes an error of eplb."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from eplb_core.errors import EplbError, InputError

MOST_NUMBERS: Final = 1 << 22
"""The most numbers of one table of layers and experts or slots: 1,024 layers of 4,096. A file that claims more is not a
valid input, and nothing is allocated for it."""

MOST_WHOLE_BYTES: Final = 1 << 30
"""The most bytes that are read at once of an array that cannot be read block by block."""

_LONGEST_REASON = 300


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn any other exception inside the block into an `InputError` that names the file.

    Args:
        path: the file.
        what: what the file should hold, for messages: "loads", "placement", "checkpoint".
    """
    try:
        yield
    except EplbError:
        raise
    except MemoryError as error:
        raise InputError(f"there is not enough memory for the {what} file", where=str(path), why=str(error)) from error
    except OSError as error:
        raise InputError(f"the {what} cannot be read", where=str(path), why=error.strerror or str(error)) from error
    except Exception as error:
        raise InputError(f"the {what} file cannot be read", where=str(path), why=reason_of(error)) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise an `InputError` that names the file for whatever writing it raises: a disk that is full."""
    try:
        yield
    except EplbError:
        raise
    except Exception as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else reason_of(error)
        raise InputError("cannot write", where=str(path), why=why) from error


def reason_of(error: Exception) -> str:
    """Return the first line of a foreign error, or its name if it has none."""
    return (str(error) or type(error).__name__).splitlines()[0][:_LONGEST_REASON]


def count_numbers(value: object, most: int) -> int:
    """Return how many entries nested lists hold, or a number above `most`; visits each list once.

    Lists may be shared, like aliases in YAML: nine lines of it can hold 10^9 entries.
    """
    counted: dict[int, int] = {}

    def count(value: object) -> int:
        if not isinstance(value, list | tuple):
            return 1
        if id(value) not in counted:
            counted[id(value)] = most + 1  # for a list that contains itself
            total = 0
            for entry in value:
                total += count(entry)
                if total > most:
                    break
            counted[id(value)] = total
        return counted[id(value)]

    try:
        return count(value)
    except RecursionError:
        return most + 1
