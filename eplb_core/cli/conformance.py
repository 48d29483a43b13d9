"""`eplb conformance`: check a backend against the contract, without writing any code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from eplb_core.cli.completion import complete_backends, complete_checks
from eplb_core.cli.output import EXIT_PROBLEM, STDOUT, human_console, write_json
from eplb_core.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_core.testing.check import Check
    from eplb_core.testing.report import Report, Result

_STYLES: Final = {"passed": "green", "failed": "red", "not run": "red", "skipped": "yellow"}


@click.command()
@click.argument("config", required=False, shell_complete=complete_backends)
@click.option("--ranks", type=click.IntRange(2), default=3, show_default=True, help="Number of local processes.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Device of the tensors."
)
@click.option(
    "--check",
    "names",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_checks,
    help="Run only this check; may be repeated.",
)
@click.option("--thorough", is_flag=True, help="Also run the long checks.")
@click.option("--register", is_flag=True, help="Register every tensor first, for backends that require it.")
@click.option("--list", "list_only", is_flag=True, help="Only list the checks and the promise behind each.")
@click.option("--json", "json_path", metavar="FILE", help="Also write JSON to FILE; - prints only JSON.")
@click.pass_context
def conformance(
    ctx: click.Context,
    config: str | None,
    ranks: int,
    device: str,
    names: tuple[str, ...],
    thorough: bool,
    register: bool,
    list_only: bool,
    json_path: str | None,
) -> None:
    """Check whether the backend of CONFIG conforms to the communicator contract, in real processes on this machine.

    The expected bytes come from the check, not from the backend. A check that hangs is stopped, with a stack dump of
    every rank.
    """
    from eplb_core.testing.subject import Subject

    if config is None and not list_only:
        raise click.UsageError("Missing argument 'CONFIG', such as nixl or 'torch_gloo?timeout=5s'.")
    # Refuse an unusable backend before the slow import of torch.
    subject = None if config is None or list_only else Subject.declared(config, device, must_register=register)
    from eplb_core.testing.catalogue import all_checks, checks_named

    console = human_console(json_path)
    checks = checks_named(*names) if names else all_checks(thorough=thorough or list_only)
    if config is None or subject is None:
        if json_path != STDOUT:
            _print_list(console, checks)
        if json_path is not None:
            listed = [
                {"name": each.name, "promise": each.promise, "thorough": each.thorough, "page": each.page}
                for each in checks
            ]
            write_json({"checks": listed}, json_path, "conformance-list/1")
        return
    from eplb_core.testing.report import Status
    from eplb_core.testing.runner import run_conformance

    with console.status(f"checking {config} with {ranks} ranks on {device}"):
        report = run_conformance([subject], ranks, checks, on_result=lambda result: _print_result(console, result))
    if set(report.counts) <= {Status.SKIPPED}:
        reasons = sorted({result.detail for result in report})
        raise InputError("nothing could be checked", where=f"{config} on {device}", why="; ".join(reasons))
    _print_summary(console, report, config, ranks, device)
    if json_path is not None:
        document = {"config": config, "ranks": ranks, "device": device, **report.document()}
        write_json(document, json_path, "conformance/1")
    if not report.conforms:
        ctx.exit(EXIT_PROBLEM)


def _print_list(console: Console, checks: Sequence[Check]) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("check", overflow="fold", no_wrap=True)  # it is there to be copied
    table.add_column("promise", overflow="fold")
    table.add_column("")
    for check in checks:
        table.add_row(check.name, check.promise, "thorough" if check.thorough else "")
    console.print(table)


def _print_result(console: Console, result: Result) -> None:
    from rich.text import Text

    line = Text(f"{result.status:8}", style=_STYLES[result.status]).append(f" {result.check}", style="default")
    if result.detail and result.status != "failed":
        line.append(f" ({result.detail})", style="dim")
    console.print(line)
    if result.status == "failed":
        console.print(Text(f"  promised: {result.promise}"))
        first, *rest = result.detail.splitlines() or [""]
        console.print(Text("\n".join([f"  came:     {first}", *(f"  {row}" for row in rest)])))
        if result.page:
            console.print(Text(f"  contract: {result.page}", style="dim"), soft_wrap=True)


def _print_summary(console: Console, report: Report, config: str, ranks: int, device: str) -> None:
    counts = ", ".join(f"{count} {status}" for status, count in sorted(report.counts.items()))
    verdict = "conforms" if report.conforms else "does not conform"
    console.print(f"{config} with {ranks} ranks on {device} {verdict}: {counts}", markup=False, highlight=False)
