"""Output shared by all sub-commands: one console, one line per error, common exit codes, JSON for machines."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from eplb_core.contract.option_types import ByteSize
from eplb_core.contract.options import OptionType
from eplb_core.contract.quantities import LONGEST_S, ValueTextError
from eplb_core.errors import BackendError, ConfigError, EplbError, InputError, PlacementError, PolicyError

if TYPE_CHECKING:
    from rich.console import Console

_Command = TypeVar("_Command", bound=Callable[..., Any])

EXIT_PROBLEM = 1
"""The exit code when the input was valid but the work failed."""

EXIT_USAGE = 2
"""The exit code when the input cannot be used; the same as click's usage errors."""

EXIT_INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 plus the number of SIGINT, as in shells."""

STDOUT = "-"
"""The path that stands for standard output."""

_LONGEST_TEXT = 500  # characters of a foreign error
_PLAIN_WIDTH = 10_000  # lines in a pipe or a log are not wrapped, so that they can be searched
_USAGE_ERRORS = (BackendError, ConfigError, InputError, PlacementError, PolicyError)


def seconds_option(default: float, what: str) -> Callable[[_Command], _Command]:
    """Return the option `--timeout`, in seconds.

    Args:
        default: its value if it is not given.
        what: the help text, one sentence.
    """
    import click

    def check(context: click.Context, param: click.Parameter, value: float) -> float:
        if not 0 < value <= LONGEST_S:  # also refuses NaN
            raise InputError(f"--timeout is {value:g}", why=f"it must be above 0 and at most {LONGEST_S} seconds")
        return value

    return click.option("--timeout", "timeout_s", default=default, show_default=True, callback=check, help=what)


def parse_size(option: str, text: str, least: int = 1) -> int:
    """Return the bytes that the text of a command's option spells.

    Raises:
        InputError: it spells none, or fewer than `least`.
    """
    size = OptionType(option, ByteSize, least=least)
    try:
        return int(cast("int", size.parse(text)))
    except ValueTextError as error:
        raise InputError(f"{option} cannot be {text!r}", why=str(error), remedy=f"give {size.accepts()}") from None


def prepare_streams() -> None:
    """Make standard output and error accept any text, even if they are closed or not UTF-8.

    The work is done when its report is printed: an unprintable character must not lose the result.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open as long as the process is
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def flush_streams() -> str:
    """Flush standard output; return why that fails, or an empty text."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        _discard_output()
        return f"cannot write to standard output: {error.strerror or error}"
    return ""


def _discard_output() -> None:
    """Discard the rest of standard output, so that Python does not fail on it at exit."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


def human_console(json_path: str | None = None) -> Console:
    """Return the console for tables and progress bars.

    It writes to standard error when the JSON document goes to standard output. Rich omits colour if `NO_COLOR` is set
    or the output is not a terminal; in the latter case lines are not wrapped.

    Args:
        json_path: the value of the sub-command's `--json` option.
    """
    from rich.console import Console

    stream = sys.stderr if json_path == STDOUT else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PLAIN_WIDTH
    return Console(file=stream, width=width, highlight=False)


def write_json(document: Mapping[str, Any], path: str, name: str) -> None:
    """Write `document` as indented JSON to the file `path`, or to standard output if it is `-`.

    Its first field is `format`: the name of the document, and the version of its fields. A field that is added leaves
    the version as it is; one that is removed, or means something else, raises it. `docs/schemas` has a schema for each.

    Args:
        document: what to write.
        path: where to.
        name: the name and version, such as `backends/1`.

    Raises:
        InputError: the file cannot be written.
        ValueError: the document holds NaN or an infinity, which JSON cannot express.
    """
    text = json.dumps({"format": f"eplb-{name}", **document}, indent=2, allow_nan=False) + "\n"
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
    """Return 2 if the input is at fault, 1 if the work failed."""
    return EXIT_USAGE if isinstance(error, _USAGE_ERRORS) else EXIT_PROBLEM


def one_line(error: EplbError) -> str:
    """Return the error's text as one line, with its remedy at the end."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


def report_error(error: EplbError) -> None:
    """Print one line about `error` to standard error."""
    _report(one_line(error))


def report_stranger(error: BaseException) -> None:
    """Print one line about a foreign error to standard error."""
    if isinstance(error, MemoryError):
        _report(f"out of memory{f': {error}' if str(error) else ''}")
    elif isinstance(error, OSError) and error.strerror:
        _report(f"{error.strerror}{f': {error.filename}' if error.filename else ''}")
    else:
        text = " ".join(str(error).split())[:_LONGEST_TEXT]
        _report(f"{type(error).__name__}: {text}; run eplb --traceback COMMAND for the traceback")


def _report(text: str) -> None:
    from eplb_core.cli.checkout import with_local_commands

    text = with_local_commands(text)
    with contextlib.suppress(OSError, ValueError):  # the exit code still reports it
        print(f"error: {text}", file=sys.stderr, flush=True)
