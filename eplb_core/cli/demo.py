"""`eplb demo`: the whole job on generated input."""

from __future__ import annotations

import json
import shlex
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import click

from eplb_core.cli.completion import complete_backends
from eplb_core.cli.output import human_console
from eplb_core.errors import InputError

LOADS: Final = (
    (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86),
    (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27),
)
"""Tokens per logical expert of two layers: the example of DeepSeek's EPLB, https://github.com/deepseek-ai/EPLB."""

_GROUPS = 4
_MOST_RANKS = 12  # one for each expert


@click.command()
@click.option("--ranks", default=4, show_default=True, help="Local ranks, 1 to 12.")
@click.option(
    "--backend",
    shell_complete=complete_backends,
    help="Config string of the backend.  [default: EPLB_BACKEND, or auto]",
)
@click.option("--keep", type=click.Path(path_type=Path), help="Keep the loads and the checkpoint in this directory.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw loads and traffic here (.png, .svg).")
@click.option("--json", "json_path", help="Write all numbers here; - is standard output.")
@click.pass_context
def demo(
    context: click.Context, /, ranks: int, backend: str | None, keep: Path | None, plot: Path | None, json_path: str
) -> None:
    """Make a small checkpoint and loads, move its experts to a better placement, and verify every byte.

    Needs no files and no GPU. The input is removed afterwards; --keep keeps it, to try `eplb rebalance` with.
    """
    from eplb_core.cli.rebalance.command import rebalance
    from eplb_core.inputs.make_checkpoint import make_checkpoint

    if not 1 <= ranks <= _MOST_RANKS:
        raise InputError(
            f"--ranks is {ranks}", why=f"the demo has {_MOST_RANKS} experts; give 1 to {_MOST_RANKS} ranks"
        )
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eplb-demo-")))
        make_checkpoint(folder / "checkpoint")
        loads = folder / "loads.json"
        loads.write_text(json.dumps({"loads": LOADS}) + "\n", encoding="utf-8")
        nodes = 2 if ranks in (4, 8) else 1
        options = {
            "checkpoint": folder / "checkpoint",
            "ranks": ranks,
            "redundant": -len(LOADS[0]) % ranks or ranks,  # each rank gets as many slots, and one more if they are even
            "nodes": nodes,
            "groups": _GROUPS if nodes > 1 else 1,
            "backend": backend,
        }
        console = human_console(json_path)
        words = ["eplb", "rebalance", str(loads)]
        for name, value in options.items():
            if value is not None:
                words += [f"--{name}", str(value)]
        console.print(f"$ {shlex.join(words)}\n", markup=False, highlight=False, soft_wrap=True)
        context.invoke(rebalance, loads=loads, plot=plot, json_path=json_path, **options)
