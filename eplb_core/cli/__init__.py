"""The `eplb` command. A sub-command's module is imported when it is called, so that `eplb --help` imports no torch."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any, cast

import click

from eplb_core.cli.output import (
    EXIT_INTERRUPTED,
    EXIT_PROBLEM,
    EXIT_USAGE,
    exit_code_of,
    flush_streams,
    prepare_streams,
    report_error,
    report_stranger,
)
from eplb_core.errors import EplbError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eplb_core.hooks.host import PluginHost

_COMMANDS = {
    "backends": ("eplb_core.cli.backends:backends", "List the installed backends and whether they can be used."),
    "bench": ("eplb_core.cli.bench:bench", "Measure how fast a backend moves expert weights."),
    "completion": ("eplb_core.cli.completion:completion", "Print the shell completion script."),
    "config": ("eplb_core.cli.config:config", "Explain a config string."),
    "conformance": ("eplb_core.cli.conformance:conformance", "Check a backend against the communicator contract."),
    "demo": ("eplb_core.cli.demo:demo", "Move the experts of a small generated checkpoint."),
    "doctor": ("eplb_core.cli.doctor.command:doctor", "Show what works on this machine, and how fast its links are."),
    "make-checkpoint": (
        "eplb_core.cli.make_checkpoint:make_checkpoint",
        "Write a small MoE checkpoint for experiments.",
    ),
    "new-backend": ("eplb_core.cli.new_backend:new_backend", "Write a project for a new backend."),
    "placement": ("eplb_core.cli.placement.command:placement", "Draw, compare and convert placements."),
    "plugins": ("eplb_core.cli.plugins:plugins", "List the installed hook plugins and the hooks they implement."),
    "rebalance": (
        "eplb_core.cli.rebalance.command:rebalance",
        "Move experts to a better placement and verify every byte.",
    ),
    "simulate": ("eplb_core.cli.simulate:simulate", "Simulate many rebalances at any scale, without weights."),
    "watch": ("eplb_core.cli.watch.command:watch", "Show live what rearrangements of other processes are doing."),
}
"""Sub-command -> (location of its click command, one-line help)."""


class EplbGroup(click.Group):
    """A group whose built-in sub-commands come from a table, followed by those of plugins.

    A built-in command never loads a plugin. An `EplbError` from any command becomes one line and an exit code.
    """

    _host: PluginHost | None = None

    def main(  # type: ignore[override]  # click's has an overload for each value of standalone_mode
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line, even with unusable standard streams; each error becomes one line and a code."""
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        prepare_streams()
        if os.getpid() == 1:  # the kernel drops signals to process 1 that it has no handler for
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            os.getcwd()
        except FileNotFoundError:  # torch's libraries end the process in a directory that is gone
            report_error(InputError("the current directory does not exist", remedy="change to one that does"))
            sys.exit(EXIT_USAGE)
        try:
            sys.exit(self._exit_code(args, prog_name, **extra))
        finally:
            if problem := flush_streams():
                print(f"error: {problem}", file=sys.stderr)
                sys.exit(EXIT_PROBLEM)

    def _exit_code(self, args: Sequence[str] | None, prog_name: str | None, **extra: Any) -> int:
        try:
            code = super().main(args, prog_name, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            return EXIT_USAGE
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "eplb"
            message = " ".join(error.format_message().split()).removesuffix(".")
            report_error(InputError(message, remedy=f"see {path} --help"))
            return EXIT_USAGE
        except click.Abort:
            print("error: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except OSError as error:  # for example while printing a help text
            report_stranger(error)
            return EXIT_PROBLEM
        return code if isinstance(code, int) else 0

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all sub-commands, the built-in ones first."""
        return [*sorted(_COMMANDS), *sorted(self._plugin_commands())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one sub-command, or None if no such command exists."""
        if cmd_name in _COMMANDS:
            module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
            return cast("click.Command", getattr(importlib.import_module(module), attribute))
        return self._plugin_commands().get(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the sub-command, or fail with the nearest names."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=2)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            ctx.fail(f"There is no command {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the sub-commands without importing the built-in ones."""
        plugins = self._plugin_commands()
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in sorted(_COMMANDS.items())])
        if plugins:
            with formatter.section("Commands of plugins"):
                formatter.write_dl([(name, plugins[name].get_short_help_str(80)) for name in sorted(plugins)])

    def invoke(self, ctx: click.Context) -> object:
        """Run the sub-command."""
        code = EXIT_PROBLEM
        try:
            return super().invoke(ctx)
        except EplbError as error:
            self._show_trace(ctx)
            report_error(error)
            code = exit_code_of(error)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
        except Exception as error:  # noqa: BLE001 - the user gets one line for any error
            self._show_trace(ctx)
            report_stranger(error)
        raise click.exceptions.Exit(code)

    @staticmethod
    def _show_trace(ctx: click.Context) -> None:
        if ctx.params.get("traceback"):
            traceback.print_exc()

    def _plugin_commands(self) -> dict[str, click.Command]:
        """Return the commands that plugins add. None of them replaces a built-in one."""
        from eplb_core.hooks.host import PluginHost

        if self._host is None:
            self._host = PluginHost().load()
            for failure in self._host.failures:
                print(f"warning: {failure}", file=sys.stderr)
        found: dict[str, click.Command] = {}
        for command in self._host.cli_commands():
            if isinstance(command, click.Command) and command.name and command.name not in _COMMANDS:
                found.setdefault(command.name, command)
        return found


def _print_version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from eplb_core.cli.version import version_text

        print(version_text())
        context.exit()


@click.group(cls=EplbGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the versions of eplb and its dependencies.",
)
@click.option("--traceback", is_flag=True, help="Show the traceback of an error, for bug reports.")
def main(traceback: bool) -> None:
    """Move mixture-of-experts weights between the ranks of an expert-parallel group."""
