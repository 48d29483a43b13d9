"""`eplb make-checkpoint`: write a small mixture-of-experts checkpoint for experiments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from eplb_core.cli.output import human_console
from eplb_core.inputs.make_checkpoint import STYLES
from eplb_core.inputs.make_checkpoint import make_checkpoint as write_checkpoint

if TYPE_CHECKING:
    from eplb_core.inputs.make_checkpoint import Style


@click.command("make-checkpoint")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--style", type=click.Choice(STYLES), default="mixtral", show_default=True, help="Naming scheme of the tensors."
)
@click.option("--layers", default=2, show_default=True, help="MoE layers.")
@click.option("--experts", default=12, show_default=True, help="Experts per layer.")
@click.option("--hidden", default=64, show_default=True, help="The model's hidden size.")
@click.option("--intermediate", default=128, show_default=True, help="The experts' intermediate size.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random weights.")
@click.option("--shards", default=2, show_default=True, help="Files to spread the tensors over.")
def make_checkpoint(
    directory: Path, style: str, layers: int, experts: int, hidden: int, intermediate: int, seed: int, shards: int
) -> None:
    """Write a small MoE checkpoint into DIRECTORY.

    Files, names and dtypes match a real checkpoint (with --style deepseek: float8 weights with their scales); the
    weights are random bytes. DIRECTORY must be new or empty, or hold an earlier checkpoint of this command, which is
    replaced.
    """
    from eplb_core.cli.rebalance.report import format_bytes

    num_bytes = write_checkpoint(
        directory,
        style=cast("Style", style),
        layers=layers,
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        seed=seed,
        shards=shards,
    )
    human_console().print(
        f"{directory}: {format_bytes(num_bytes)}, {layers} MoE layers of {experts} experts, in the style of {style}",
        markup=False,
    )
