"""The tables of `eplb doctor`: machines, backends, a matrix of links for each backend, and what to fix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from eplb_core.contract.backend import ProbeResult
from eplb_core.doctor.checks import Finding, Severity, worst
from eplb_core.doctor.links import LinkReport, path_of
from eplb_core.doctor.machine import Machine
from eplb_core.registry.entry import BackendEntry

if TYPE_CHECKING:
    from rich.console import Console

_STYLES: Final = {Severity.OK: "green", Severity.WARNING: "yellow", Severity.PROBLEM: "red"}
_MOST_COLUMNS: Final = 16  # with more ranks, one line replaces the matrix


def print_machines(console: Console, machines: Sequence[Machine]) -> None:
    """Print the facts, one column per host, and the environment of each."""
    from rich.table import Table
    from rich.text import Text

    table = Table("")
    for machine in machines:
        table.add_column(Text(machine.host), overflow="fold")
    for fact in dict.fromkeys(fact for machine in machines for fact in machine.facts):
        table.add_row(Text(fact), *(Text(machine.facts.get(fact, "")) for machine in machines))
    for name in dict.fromkeys(name for machine in machines for name in machine.environment):
        table.add_row(Text(name), *(Text(machine.environment.get(name, "not set")) for machine in machines))
    console.print(table)


def print_backends(console: Console, entries: Sequence[BackendEntry], probed: Mapping[str, ProbeResult]) -> None:
    """Print whether each backend works here, or why not."""
    from rich.table import Table
    from rich.text import Text

    table = Table("backend", "distribution", "usable", "why")
    for entry in entries:
        probe = probed.get(entry.choice)
        usable = probe is not None and probe.available
        why = [entry.why or (probe.reason if probe else ""), "" if usable else entry.remedy]
        table.add_row(
            Text(entry.name),
            Text(f"{entry.distribution} {entry.version}"),
            Text("yes" if usable else "no", style="green" if usable else "yellow"),
            Text("; ".join(filter(None, why))),
        )
    console.print(table)


def print_links(console: Console, config: str, reports: Sequence[LinkReport]) -> None:
    """Print GB/s between every two ranks, and the backend's paths and settings."""
    from rich.table import Table
    from rich.text import Text

    title = f"{config}: GB/s from the rank on the left to the rank above"
    if len(reports) <= _MOST_COLUMNS:
        table = Table("", *(str(report.rank) for report in reports))
        console.print(Text(title))
        letters = _letters(reports)
        for source in (report.rank for report in reports):
            table.add_row(str(source), *(_cell(source, report, letters) for report in reports))
        console.print(table)
        for path, letter in letters.items():
            console.print(Text(f"  {letter}  {path}"))
    else:
        rates = sorted((rate, peer, report.rank) for report in reports for peer, rate in report.gbps.items())
        if rates:
            (low, *slowest), (high, *_) = rates[0], rates[-1]
            console.print(Text(f"{title}: {low:.3g} ({slowest[0]} to {slowest[1]}) to {high:.3g}, {len(rates)} links"))
    created = max(report.created_s for report in reports)
    console.print(Text(f"  made in {created:.1f} s on {', '.join(sorted({r.device for r in reports if r.device}))}"))
    for title, values in (
        ("loaded", _merged(r.libraries for r in reports)),
        ("set", _merged(r.environment for r in reports)),
    ):
        if values:
            console.print(Text(f"  {title}: " + ", ".join(f"{name}={value}" for name, value in values.items())))


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    """Print the problems with their remedies, then the passed checks, then the verdict."""
    from rich.text import Text

    order = list(Severity)
    for finding in sorted(findings, key=lambda finding: -order.index(finding.severity)):
        line = Text(f"{finding.severity:8}", style=_STYLES[finding.severity])
        line.append(f" {finding.name}" + (f": {finding.detail}" if finding.detail else ""), style="default")
        console.print(line)
        if finding.remedy:
            console.print(Text(f"         hint: {finding.remedy}"))
    verdict = worst(findings)
    words = {
        Severity.OK: "everything works",
        Severity.WARNING: "everything works, but see the warnings",
        Severity.PROBLEM: "something does not work",
    }
    console.print(Text(words[verdict], style=_STYLES[verdict]))


def _letters(reports: Sequence[LinkReport]) -> dict[str, str]:
    paths = dict.fromkeys(path_of(report.paths.get(peer, "")) for report in reports for peer in report.gbps)
    return {path: chr(ord("a") + index) if index < 26 else "*" for index, path in enumerate(paths)}


def _cell(source: int, report: LinkReport, letters: Mapping[str, str]) -> str:
    if source == report.rank:
        return "-"
    if source not in report.gbps:
        return "failed"
    if source in report.wrong:
        return "wrong"
    return f"{report.gbps[source]:.3g} {letters[path_of(report.paths.get(source, ''))]}"


def _merged(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    return {name: value for part in parts for name, value in sorted(part.items())}
