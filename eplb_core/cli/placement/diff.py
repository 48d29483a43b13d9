"""`eplb placement diff`: draws what moves between two placements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eplb_core.cli.output import STDOUT, human_console, parse_size, write_json
from eplb_core.errors import InputError

if TYPE_CHECKING:
    from eplb_core.cli.placement.drawn import Drawn


@click.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option("--ranks", type=int, help="Ranks that share the slots.  [default: as the files say]")
@click.option("--nodes", type=int, default=1, show_default=True, help="Nodes that the ranks are spread over.")
@click.option("--layers", help="COUNT for the first so many, or START:STOP.  [default: all]")
@click.option("--loads", type=click.Path(path_type=Path), help="Recorded loads: show the balance before and after.")
@click.option("--expert-bytes", "expert_size", help="The size of an expert, such as 44MB: show bytes.")
@click.option("--as-planned", is_flag=True, help="Take NEW slot by slot. Otherwise an expert keeps its slot on a rank.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it here (.png, .svg).")
@click.option("--json", "json_path", metavar="FILE", help="Write it as JSON too; - is standard output, with no table.")
def diff(
    old: Path,
    new: Path,
    ranks: int | None,
    nodes: int,
    layers: str | None,
    loads: Path | None,
    expert_size: str | None,
    as_planned: bool,
    plot: Path | None,
    json_path: str | None,
) -> None:
    """Draw what moves between the placements in OLD and NEW: layer by layer, and from which rank to which."""
    from eplb_core.cli.placement.drawn import Change
    from eplb_core.cli.placement.tables import print_change
    from eplb_core.planning.plan import plan_rearrangement

    if plot is not None:
        from eplb_core.cli.rebalance.plot import check_plot_target

        check_plot_target(plot)
    expert_bytes = None if expert_size is None else parse_size("--expert-bytes", expert_size)
    before, after = _read_pair(old, new, ranks, layers, loads)
    if nodes < 1 or before.num_ranks % nodes:
        raise InputError(f"{before.num_ranks} ranks cannot be shared evenly by {nodes} nodes")
    node_of_rank = [rank * nodes // before.num_ranks for rank in range(before.num_ranks)]
    plan = plan_rearrangement(
        before.placement, after.placement, before.num_ranks, node_of_rank, keep_slots=not as_planned
    )
    change = Change(before, replace(after, placement=plan.new), plan, expert_bytes)
    if plot is not None:
        from eplb_core.cli.placement.picture import save_change

        save_change(change, plot)
    if json_path is not None:
        write_json(change.document(), json_path, "placement-diff/1")
    if json_path != STDOUT:
        print_change(change, human_console(json_path))


def _read_pair(old: Path, new: Path, ranks: int | None, layers: str | None, loads: Path | None) -> tuple[Drawn, Drawn]:
    """Read both; a file that does not say how many ranks there are takes the number from the other one."""
    from eplb_core.cli.placement.drawn import read_drawn
    from eplb_core.inputs.placement_formats import read_placement_file

    if ranks is None:
        said = [read_placement_file(path).num_ranks for path in (old, new)]
        ranks = next((each for each in said if each is not None), None)
    before, after = (read_drawn(path, ranks, layers, loads) for path in (old, new))
    if before.placement.shape != after.placement.shape:
        shapes = [f"{each.placement.shape[0]} layers of {each.placement.shape[1]} slots" for each in (before, after)]
        raise InputError(f"the placements have different shapes: {shapes[0]}, and {shapes[1]}", where=f"{old}, {new}")
    return before, after
