"""How every sub-command speaks: one console, one line for an error, the same exit codes, JSON for machines."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from eplb_core.errors import BackendError, ConfigError, EplbError, InputError, PlacementError, PolicyError

if TYPE_CHECKING:
    from rich.console import Console

EXIT_PROBLEM = 1
"""The exit code when the work was understood but did not succeed."""

EXIT_USAGE = 2
"""The exit code when what the user gave cannot be used; the same as click's own usage errors."""

STDOUT = "-"
"""The path that stands for standard output."""

_PLAIN_WIDTH = 10_000  # in a pipe or a log no line is wrapped, so that it can be searched
_USAGE_ERRORS = (BackendError, ConfigError, InputError, PlacementError, PolicyError)


def human_console(json_path: str | None = None) -> Console:
    """Return the console for tables and progress bars.

    It writes to standard error when the JSON document goes to standard output. Rich leaves out colour where
    `NO_COLOR` is set or nobody looks at a terminal; there, lines are as long as they need to be.

    Args:
        json_path: the value of the sub-command's `--json` option.
    """
    from rich.console import Console

    stream = sys.stderr if json_path == STDOUT else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PLAIN_WIDTH
    return Console(file=stream, width=width, highlight=False)


def write_json(document: object, path: str) -> None:
    """Write `document` as indented JSON to the file `path`, or to standard output if it is `-`.

    Raises:
        InputError: the file cannot be written.
        ValueError: the document holds NaN or an infinity, which JSON has no words for.
    """
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"cannot write {path}", why=error.strerror or str(error)) from error


def exit_code_of(error: EplbError) -> int:
    """Return 2 if the user has to give something else, 1 if the work itself failed."""
    return EXIT_USAGE if isinstance(error, _USAGE_ERRORS) else EXIT_PROBLEM


def one_line(error: EplbError) -> str:
    """Return the error's text as one line, with its remedy at the end."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


def report_error(error: EplbError) -> None:
    """Print one line about `error` to standard error."""
    print(f"error: {one_line(error)}", file=sys.stderr)
