"""`eplb backends`: the installed backends, and whether they can be used here."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from eplb_core import __version__
from eplb_core.cli.output import STDOUT, human_console, write_json
from eplb_core.contract.backend import PLUGIN_API_VERSION, ProbeResult
from eplb_core.registry.known import KNOWN_BACKENDS
from eplb_core.registry.registry import BackendEntry, BackendState, default_registry

if TYPE_CHECKING:
    from rich.table import Table

_STYLES: Final = {
    BackendState.READY: "green",
    BackendState.NOT_INSTALLED: "yellow",
    BackendState.UNAVAILABLE: "yellow",
}
_PROBE_TIMEOUT_S: Final = 30.0


@click.command()
@click.option("--probe", is_flag=True, help="Try every backend for real, each in a child process.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="With --probe: the device of the tensors. [default: cpu]"
)
@click.option("--json", "json_path", metavar="FILE", help="Also write JSON to FILE; - prints only JSON.")
def backends(probe: bool, device: str | None, json_path: str | None) -> None:
    """List every installed backend, where it comes from, and whether it can be used."""
    if device is not None and not probe:
        raise click.UsageError("--device needs --probe.")
    # A plugin that prints during its import must not corrupt the JSON document.
    with contextlib.redirect_stdout(sys.stderr):
        entries = default_registry().entries()
    results: dict[str, ProbeResult] = {}
    if probe:
        entries, results = _probe(entries, device or "cpu", json_path)
    if json_path is not None:
        write_json(_document(entries, results), json_path)
    if json_path != STDOUT:
        console = human_console(json_path)
        if entries:
            console.print(_table(entries, results))
        else:
            console.print("No backend is installed.")
        absent = {name: command for name, command in KNOWN_BACKENDS.items() if name not in {e.name for e in entries}}
        for name, command in absent.items():
            console.print(f"not installed: {name} ({command})", markup=False)


def _probe(
    entries: Sequence[BackendEntry], device_type: str, json_path: str | None
) -> tuple[list[BackendEntry], dict[str, ProbeResult]]:
    """Probe the ready backends; return the updated entries, and the results by `name@distribution`."""
    from eplb_core.registry.probe import run_probe

    console = human_console(json_path)
    probed, results = [], {}
    for entry in entries:
        if entry.state is BackendState.READY:
            with console.status(f"probing {entry.name} on {device_type}"):
                result = run_probe(entry, device_type, timeout_s=_PROBE_TIMEOUT_S)
            results[entry.choice] = result
            if not result.available:
                entry = dataclasses.replace(entry, state=BackendState.UNAVAILABLE, why=result.reason)
        probed.append(entry)
    return probed, results


def _table(entries: Sequence[BackendEntry], results: Mapping[str, ProbeResult]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in ("backend", "distribution", "version", "devices", "state", "why"):
        table.add_column(column, overflow="fold", no_wrap=column in ("backend", "state"))
    for entry in entries:
        result = results.get(entry.choice)
        tried = (result.reason, result.warning) if result else ()
        why = [entry.why or "; ".join(filter(None, tried)), entry.file, entry.remedy, *entry.notes]
        table.add_row(
            Text(entry.name),
            Text(entry.distribution),
            Text(entry.version),
            Text(" ".join(entry.spec.capabilities.device_types) if entry.spec else ""),
            Text(entry.state, style=_STYLES.get(entry.state, "red")),
            Text("; ".join(part for part in why if part)),
        )
    return table


def _document(entries: Sequence[BackendEntry], results: Mapping[str, ProbeResult]) -> dict[str, Any]:
    return {
        "eplb": __version__,
        "plugin_api": list(PLUGIN_API_VERSION),
        "backends": [_entry_document(entry, results.get(entry.choice)) for entry in entries],
        "known_not_installed": {
            name: command for name, command in KNOWN_BACKENDS.items() if name not in {entry.name for entry in entries}
        },
    }


def _entry_document(entry: BackendEntry, result: ProbeResult | None) -> dict[str, Any]:
    spec = entry.spec
    return {
        "name": entry.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "location": entry.location,
        "entry_point": entry.value,
        "state": str(entry.state),
        "why": entry.why,
        "remedy": entry.remedy,
        "file": entry.file,
        "notes": list(entry.notes),
        "summary": spec.summary if spec else None,
        "api_version": list(spec.api_version) if spec else None,
        "priority": spec.priority if spec else None,
        "devices": list(spec.capabilities.device_types) if spec else [],
        "stateless_groups": spec.capabilities.stateless_groups if spec else None,
        "background": spec.capabilities.background if spec else None,
        "probe": None if result is None else dataclasses.asdict(result),
    }
