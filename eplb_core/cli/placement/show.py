"""`eplb placement show`: draws a placement."""

from __future__ import annotations

from pathlib import Path

import click

from eplb_core.cli.output import STDOUT, human_console, write_json


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--ranks", type=int, help="Ranks that share the slots.  [default: as SOURCE says]")
@click.option("--layers", help="COUNT for the first so many, or START:STOP.  [default: all]")
@click.option("--loads", type=click.Path(path_type=Path), help="Recorded loads: show the balance too.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it here (.png, .svg).")
@click.option("--json", "json_path", metavar="FILE", help="Write it as JSON too; - is standard output, with no table.")
def show(
    source: Path, ranks: int | None, layers: str | None, loads: Path | None, plot: Path | None, json_path: str | None
) -> None:
    """Draw the placement in SOURCE: which experts each rank holds, in any of the formats of `convert`."""
    from eplb_core.cli.placement.drawn import read_drawn
    from eplb_core.cli.placement.tables import print_placement

    if plot is not None:
        from eplb_core.cli.rebalance.plot import check_plot_target

        check_plot_target(plot)
    drawn = read_drawn(source, ranks, layers, loads)
    if plot is not None:
        from eplb_core.cli.placement.picture import save_placement

        save_placement(drawn, plot)
    if json_path is not None:
        write_json(drawn.document(), json_path, "placement-show/1")
    if json_path != STDOUT:
        print_placement(drawn, human_console(json_path), listed=layers is not None)
