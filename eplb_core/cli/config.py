"""`eplb config explain`: the meaning of a config string, and the origin of each value."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import click

from eplb_core.cli.completion import complete_backends
from eplb_core.cli.output import STDOUT, human_console, write_json
from eplb_core.errors import InputError
from eplb_core.registry.config import (
    BACKEND_VARIABLE,
    ResolvedOptions,
    backend_from_environment,
)
from eplb_core.registry.registry import default_registry


@click.group()
def config() -> None:
    """Work with config strings, such as `nixl?window=64MiB`."""


@config.command()
@click.argument("text", metavar="CONFIG", required=False, shell_complete=complete_backends)
@click.option("--json", "json_path", metavar="FILE", help="Also write JSON to FILE; - prints only JSON.")
def explain(text: str | None, json_path: str | None) -> None:
    """Show every option of a backend, its value and its origin.

    Without CONFIG it explains the environment variable EPLB_BACKEND.
    """
    chosen = backend_from_environment(text, os.environ)
    if chosen is None:
        raise InputError("no config string to explain", remedy=f"give one, or set {BACKEND_VARIABLE}")
    with contextlib.redirect_stdout(sys.stderr):
        backend = default_registry().resolve(chosen)
    source, resolved = "the best backend that works on every rank", backend.options
    if backend.entry is not None:
        source = f"{backend.entry.distribution} {backend.entry.version}"
    if json_path is not None:
        write_json(_document(resolved, chosen, source), json_path, "config-explain/1")
    if json_path != STDOUT:
        _print(resolved, source)


def _print(resolved: ResolvedOptions, source: str) -> None:
    from rich.table import Table
    from rich.text import Text

    console = human_console()
    console.print(f"{resolved.config.name}: {source}", markup=False, soft_wrap=True)
    table = Table()
    for column in ("option", "value", "origin", "meaning"):
        table.add_column(column, overflow="fold")
    for key, kind in resolved.types.items():
        meaning = "; ".join(part for part in (kind.help, kind.accepts()) if part)
        table.add_row(Text(key), Text(resolved.text(key)), Text(resolved.origins[key]), Text(meaning))
    console.print(table)
    console.print(f"canonical: {resolved.canonical()}", markup=False, soft_wrap=True)


def _document(resolved: ResolvedOptions, text: str, source: str) -> dict[str, Any]:
    return {
        "config": text,
        "backend": resolved.config.name,
        "source": source,
        "canonical": resolved.canonical(),
        "digest": resolved.digest(),
        "options": [
            {
                "key": key,
                "value": resolved.text(key),
                "origin": resolved.origins[key],
                "help": kind.help,
                "accepts": kind.accepts(),
            }
            for key, kind in resolved.types.items()
        ],
    }
