"""`eplb plugins`: the installed hook plugins, the hooks they implement, and their problems."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from eplb_core import __version__
from eplb_core.cli.output import STDOUT, human_console, write_json
from eplb_core.hooks.host import InstalledPlugin, PluginHost, hook_summaries

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@click.command()
@click.option("--hooks", "show_hooks", is_flag=True, help="List every hook and the plugins that implement it.")
@click.option("--json", "json_path", metavar="FILE", help="Also write JSON to FILE; - prints only JSON.")
def plugins(show_hooks: bool, json_path: str | None) -> None:
    """List every installed hook plugin, where it comes from, and which hooks it implements. Imports all plugins."""
    # A plugin that prints during its import must not corrupt the JSON document.
    with contextlib.redirect_stdout(sys.stderr):
        found = PluginHost().load().plugins
    if json_path is not None:
        write_json(_document(found), json_path, "plugins/1")
    if json_path != STDOUT:
        console = human_console(json_path)
        console.print(_hook_table(found) if show_hooks else _table(found) if found else "No hook plugin is installed.")
        if found and not show_hooks:
            _print_locations(console, found)


def _state(plugin: InstalledPlugin) -> str:
    return "broken" if not plugin.loaded else "misspelt hook" if plugin.problem else "ready"


def _table(found: Sequence[InstalledPlugin]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in ("plugin", "distribution", "version", "state", "hooks", "why"):
        table.add_column(column, overflow="fold", no_wrap=column in ("plugin", "state"))
    for plugin in found:
        state = _state(plugin)
        table.add_row(
            Text(plugin.name),
            Text(plugin.distribution),
            Text(plugin.version),
            Text(state, style="green" if state == "ready" else "red"),
            Text("\n".join(plugin.hooks)),
            Text(plugin.problem),
        )
    return table


def _hook_table(found: Sequence[InstalledPlugin]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in ("hook", "when", "plugins"):
        table.add_column(column, overflow="fold", no_wrap=column == "hook")
    for hook, summary in hook_summaries().items():
        listeners = [
            f"{plugin.name}@{plugin.distribution}" for plugin in found if plugin.loaded and hook in plugin.hooks
        ]
        table.add_row(Text(hook), Text(summary), Text("\n".join(listeners)))
    return table


def _print_locations(console: Console, found: Sequence[InstalledPlugin]) -> None:
    for plugin in found:
        console.print(
            f"{plugin.name}@{plugin.distribution}: {plugin.entry_point}, installed in {plugin.location}", markup=False
        )


def _document(found: Sequence[InstalledPlugin]) -> dict[str, Any]:
    return {
        "eplb": __version__,
        "plugins": [
            {
                "name": plugin.name,
                "distribution": plugin.distribution,
                "version": plugin.version,
                "location": plugin.location,
                "entry_point": plugin.entry_point,
                "state": _state(plugin),
                "hooks": list(plugin.hooks),
                "problem": plugin.problem,
            }
            for plugin in found
        ],
        "hooks": hook_summaries(),
    }
