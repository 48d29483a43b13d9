"""`eplb doctor`: inspect this machine, its backends, and the links between its ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from eplb_core.cli.completion import complete_backends
from eplb_core.cli.output import EXIT_PROBLEM, STDOUT, human_console, parse_size, seconds_option, write_json
from eplb_core.contract.backend import ProbeResult
from eplb_core.doctor.checks import Finding, Severity, run_checks, worst
from eplb_core.errors import BackendError, InputError
from eplb_core.launch.torchrun import started_by_torchrun
from eplb_core.registry.config import AUTO, parse_config
from eplb_core.registry.registry import BackendEntry, BackendState, default_registry

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_core.cli.doctor.ranks import Ranks
    from eplb_core.doctor.links import LinkReport
    from eplb_core.doctor.machine import Machine

_PROBE_TIMEOUT_S: Final = 30.0
_CHECK_TIMEOUT_S: Final = 30.0
_FAULTY: Final = (BackendState.BROKEN, BackendState.CONFLICT, BackendState.INCOMPATIBLE)


def _parse_size(context: click.Context, param: click.Parameter, value: str) -> int:
    return parse_size(param.opts[0], value, least=1 << 10)


@click.command()
@click.argument("configs", nargs=-1, metavar="[CONFIG]...", shell_complete=complete_backends)
@click.option("--ranks", type=click.IntRange(2), help="Local processes to start, without torchrun.  [default: 2]")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Device of the tensors.  [default: cuda if available]"
)
@click.option(
    "--size", "nbytes", metavar="SIZE", callback=_parse_size, default="32MiB", show_default=True, help="Message size."
)
@seconds_option(120.0, "Time limit for each backend, in seconds.")
@click.option("--strict", is_flag=True, help="Exit with 1 on warnings too.")
@click.option("--json", "json_path", metavar="FILE", help="Also write JSON to FILE; - prints only JSON.")
@click.pass_context
def doctor(
    ctx: click.Context,
    configs: tuple[str, ...],
    ranks: int | None,
    device: str | None,
    nbytes: int,
    timeout_s: float,
    strict: bool,
    json_path: str | None,
) -> None:
    """Inspect this machine, try every backend, and measure the link between every two ranks.

    CONFIG selects the backend to measure, such as 'nixl?mode=packed'; the default is every backend that works here.
    Under torchrun it joins the existing ranks, on several machines too.

    Exit code: 0 if everything works, 1 if something does not, 2 if the input cannot be used.
    """
    from eplb_core.cli.doctor import tables as tables
    from eplb_core.doctor.links import LinkTest, judge

    _check_configs(configs)
    if not timeout_s > 0:
        raise InputError(f"--timeout is {timeout_s:g}", why="it must be above 0 seconds")
    device = _device(device)
    group = _ranks(ranks, timeout_s)
    console = human_console(json_path)
    console.quiet = not group.is_first or json_path == STDOUT

    # A plugin that prints during its import must not corrupt the JSON document.
    with contextlib.redirect_stdout(sys.stderr):
        entries = default_registry().entries()
        machines = group.machines(_look(entries))
    findings = _of_machines(machines)
    tables.print_machines(console, machines)

    probed = _probe(console, entries, device) if group.is_first else {}
    findings += _of_entries(entries)
    findings += [Finding(name, Severity.WARNING, probe.warning) for name, probe in probed.items() if probe.warning]
    tables.print_backends(console, entries, probed)

    usable = [entry.name for entry in entries if entry.choice in probed and probed[entry.choice].available]
    chosen = list(configs) or group.share(usable)
    if not chosen:
        findings.append(Finding("backends", Severity.PROBLEM, f"none works on {device}", "eplb backends"))
    measured: dict[str, list[LinkReport]] = {}
    for config in chosen:
        refusal = _refusal(config)
        if refusal is not None:
            findings.append(refusal)
            continue
        with console.status(f"measuring {config} with {group.world_size} ranks on {device}"):
            measured[config] = group.measure(LinkTest(config, device, nbytes, timeout_s))
        tables.print_links(console, config, measured[config])
        findings += judge(config, device, measured[config])

    if group.is_first:
        findings += _of_plugins()
    tables.print_findings(console, findings)
    if json_path is not None and group.is_first:
        document = {
            "verdict": worst(findings),
            "device": device,
            "ranks": group.world_size,
            "message_bytes": nbytes,
            "machines": [dataclasses.asdict(machine) for machine in machines],
            "backends": [_backend_document(entry, probed.get(entry.choice)) for entry in entries],
            "links": {config: [dataclasses.asdict(each) for each in found] for config, found in measured.items()},
            "findings": [dataclasses.asdict(finding) for finding in findings],
        }
        write_json(document, json_path, "doctor/1")
    bad = (Severity.PROBLEM, Severity.WARNING) if strict else (Severity.PROBLEM,)
    code = group.leave(EXIT_PROBLEM if worst(findings) in bad else 0)
    if code:
        ctx.exit(code)


def _ranks(ranks: int | None, timeout_s: float) -> Ranks:
    from eplb_core.cli.doctor.ranks import JoinedRanks, LocalRanks

    if not started_by_torchrun():
        return LocalRanks(ranks or 2, timeout_s)
    if ranks is not None:
        raise click.UsageError("--ranks cannot be used under torchrun, which has already started the ranks.")
    return JoinedRanks(timeout_s)


def _device(device: str | None) -> str:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available", remedy="give --device cpu")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _check_configs(configs: Sequence[str]) -> None:
    """Raise `ConfigError` for the first malformed config string, or the first with an unknown option."""
    for text in configs:
        with contextlib.suppress(BackendError):  # the doctor reports it
            default_registry().resolve(text)


def _refusal(text: str) -> Finding | None:
    config = parse_config(text)
    if config.name == AUTO:
        return None
    try:
        default_registry().select(config)
    except BackendError as error:
        why = "; ".join(filter(None, (error.what, error.where, error.why)))
        return Finding(text, Severity.PROBLEM, why, error.remedy or "")
    return None


def _look(entries: Sequence[BackendEntry]) -> Machine:
    from eplb_core.doctor.machine import look_at_machine

    needed = [alternatives for entry in entries if entry.spec for alternatives in entry.spec.requires]
    return look_at_machine(module for alternatives in needed for module in alternatives.split("|"))


def _of_machines(machines: Sequence[Machine]) -> list[Finding]:
    several = len(machines) > 1
    return [
        dataclasses.replace(finding, name=f"{machine.host}: {finding.name}" if several else finding.name)
        for machine in machines
        for finding in machine.findings
    ]


def _of_entries(entries: Sequence[BackendEntry]) -> list[Finding]:
    return [
        Finding(entry.choice, Severity.WARNING, f"it is {entry.state}: {entry.why}", entry.remedy)
        for entry in entries
        if entry.state in _FAULTY
    ]


def _of_plugins() -> list[Finding]:
    from eplb_core.hooks.observed import default_plugins

    with contextlib.redirect_stdout(sys.stderr):
        host = default_plugins()
        failures = [Finding("plugins", Severity.WARNING, failure) for failure in host.failures]
        return failures + run_checks(host.doctor_checks(), _CHECK_TIMEOUT_S)


def _probe(console: Console, entries: Sequence[BackendEntry], device: str) -> Mapping[str, ProbeResult]:
    """Probe the ready backends; return the results by `name@distribution`."""
    from eplb_core.registry.probe import run_probe

    found = {}
    for entry in entries:
        if entry.state is BackendState.READY:
            with console.status(f"probing {entry.name} on {device}"):
                found[entry.choice] = run_probe(entry, device, timeout_s=_PROBE_TIMEOUT_S)
    return found


def _backend_document(entry: BackendEntry, probe: ProbeResult | None) -> dict[str, Any]:
    return {
        "name": entry.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "state": str(entry.state),
        "why": entry.why,
        "remedy": entry.remedy,
        "usable": probe is not None and probe.available,
        "probe": probe.reason if probe is not None else "",
        "warning": probe.warning if probe is not None else "",
    }
