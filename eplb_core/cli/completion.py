"""`eplb completion`, and completers of option values. Imports neither torch nor a backend."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from collections.abc import Iterable

COMPLETE_VARIABLE: Final = "_EPLB_COMPLETE"
_SHELLS: Final = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a SHELL script that completes commands, options, and names of backends, policies and models.

    bash: eval "$(eplb completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc;
    fish: eplb completion fish > ~/.config/fish/completions/eplb.fish
    """
    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    classes = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}
    script = classes[shell](context.find_root().command, {}, "eplb", COMPLETE_VARIABLE).source()
    sys.stdout.write(script if script.endswith("\n") else script + "\n")


def complete_backends(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return those of `auto` and the installed backends that start with the text."""
    return _beginning(("auto", *_names("eplb.backends")), incomplete)


def complete_policies(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the installed policies that start with the text."""
    return _beginning(_names("eplb.policies"), incomplete)


def complete_models(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the models of known shapes that start with the text."""
    from eplb_core.inputs.models import MODELS

    return _beginning((model.name for model in MODELS), incomplete)


def complete_checks(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the conformance checks that start with the text."""
    from eplb_core.testing.catalogue import all_checks

    return _beginning((check.name for check in all_checks()), incomplete)


def _names(group: str) -> Iterable[str]:
    return {point.name for point in entry_points(group=group)}


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))
