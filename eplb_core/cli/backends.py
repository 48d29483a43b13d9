"""`eplb backends`: the installed backends, and whether they can be used here."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from eplb_core import __version__
from eplb_core.cli.checkout import with_local_commands
from eplb_core.cli.output import STDOUT, human_console, write_json
from eplb_core.contract.backend import PLUGIN_API_VERSION, ProbeResult
from eplb_core.registry.known import KNOWN_BACKENDS
from eplb_core.registry.registry import BackendEntry, BackendState, default_registry
from eplb_core.words import word_list

if TYPE_CHECKING:
    from rich.table import Table

_STYLES: Final = {
    BackendState.READY: "green",
    BackendState.NOT_INSTALLED: "yellow",
    BackendState.UNAVAILABLE: "yellow",
}
_PROBE_TIMEOUT_S: Final = 30.0
_GPU_FILES: Final = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/nvhost-gpu")
"""What the drivers of GPUs leave in /dev: NVIDIA's, WSL's, AMD's (whose GPUs torch calls cuda too), Jetson's."""


@click.command()
@click.option("--probe", is_flag=True, help="Try every backend for real, each in a child process.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="With --probe: the device of the tensors. [default: cpu]"
)
@click.option("--json", "json_path", metavar="FILE", help="Also write JSON to FILE; - prints only JSON.")
def backends(probe: bool, device: str | None, json_path: str | None) -> None:
    """List every installed backend, where it comes from, and whether it can be used here."""
    if device is not None and not probe:
        raise click.UsageError("--device needs --probe.")
    # A plugin that prints during its import must not corrupt the JSON document.
    with contextlib.redirect_stdout(sys.stderr):
        entries = default_registry().entries()
    present = _present_devices()
    results: dict[str, ProbeResult] = {}
    if probe:
        entries, results = _probe(entries, device or "cpu", json_path)
    else:
        entries = [_without_devices(entry, present) for entry in entries]
    choice = _choice_of_auto(entries, results, device or "cpu") if probe else None
    if json_path is not None:
        write_json(_document(entries, results, choice), json_path, "backends/1")
    if json_path == STDOUT:
        return
    console = human_console(json_path)
    if entries:
        console.print(_table(entries, results, present))
    else:
        console.print("No backend is installed.")
    if probe:
        where = f"for {device or 'cpu'} tensors"
        console.print(f"auto would take {choice} {where}" if choice else f"auto finds no backend {where}", markup=False)
    for name, command in _absent(entries).items():
        console.print(f"not installed: {name} ({with_local_commands(command)})", markup=False, soft_wrap=True)


def _present_devices() -> tuple[str, ...]:
    """Return the device types of this machine, without importing torch, which takes seconds."""
    return ("cpu", "cuda") if any(os.path.exists(path) for path in _GPU_FILES) else ("cpu",)


def _without_devices(entry: BackendEntry, present: Sequence[str]) -> BackendEntry:
    """Return the entry as unavailable if it only moves tensors of devices that this machine does not have."""
    if entry.state is not BackendState.READY or entry.spec is None:
        return entry
    devices = entry.spec.capabilities.device_types
    if set(devices) & set(present):
        return entry
    missing = "GPU" if devices == ("cuda",) else "such device"
    why = f"it moves {word_list(devices, 'and')} tensors, and this machine has no {missing}"
    return dataclasses.replace(entry, state=BackendState.UNAVAILABLE, why=why)


def _absent(entries: Sequence[BackendEntry]) -> dict[str, str]:
    """Return the known backends that are not installed, with the command that installs each."""
    return {name: command for name, command in KNOWN_BACKENDS.items() if name not in {entry.name for entry in entries}}


def _choice_of_auto(
    entries: Sequence[BackendEntry], results: Mapping[str, ProbeResult], device_type: str
) -> str | None:
    """Return what `auto` would take in a process group on this machine, or None if nothing works."""
    from eplb_core.hooks.host import BackendCandidate, PluginHost

    candidates = []
    for entry in entries:
        result, spec = results.get(entry.choice), entry.spec
        if result is None or spec is None:
            continue
        unfit = spec.capabilities.unfit(device_type, stateless=False, has_device_group=True)
        usable = result.available and not unfit
        candidates.append(
            BackendCandidate(
                name=entry.name,
                usable_on_all=usable,
                reasons=(unfit or result.reason,),
                device_type=device_type,
                priority=spec.priority,
            )
        )
    with contextlib.redirect_stdout(sys.stderr):
        return PluginHost().load().choose_backend(candidates)


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


def _table(entries: Sequence[BackendEntry], results: Mapping[str, ProbeResult], present: Sequence[str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in ("backend", "distribution", "version", "devices", "background", "state", "why"):
        table.add_column(column, overflow="fold", no_wrap=column in ("backend", "state"))
    for entry in entries:
        result = results.get(entry.choice)
        tried = (result.reason, result.warning) if result else ()
        why = [entry.why or "; ".join(filter(None, tried)), entry.file, with_local_commands(entry.remedy), *entry.notes]
        capabilities = entry.spec.capabilities if entry.spec else None
        devices = [
            Text(device, style="" if device in present else "dim strike")
            for device in (capabilities.device_types if capabilities else ())
        ]
        table.add_row(
            Text(entry.name),
            Text(entry.distribution),
            Text(entry.version),
            Text(" ").join(devices),
            Text("yes" if capabilities and capabilities.background else ""),
            Text(entry.state, style=_STYLES.get(entry.state, "red")),
            Text("; ".join(part for part in why if part)),
        )
    return table


def _document(
    entries: Sequence[BackendEntry], results: Mapping[str, ProbeResult], choice: str | None
) -> dict[str, Any]:
    return {
        "eplb": __version__,
        "plugin_api": list(PLUGIN_API_VERSION),
        "backends": [_entry_document(entry, results.get(entry.choice)) for entry in entries],
        "known_not_installed": _absent(entries),
        "auto": choice,
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
