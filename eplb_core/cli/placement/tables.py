"""A placement, and a change, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eplb_core.planning.placement import EMPTY
from eplb_core.words import count

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from eplb_core.cli.placement.drawn import Change, Drawn

_WIDEST_ROW = 64  # slots of a layer that are listed side by side
_MOST_RANKS = 16  # columns of a matrix
_MOST_LINKS = 10  # of larger groups, the busiest are listed


def print_placement(drawn: Drawn, console: Console, *, listed: bool) -> None:
    """Print a placement.

    Args:
        drawn: what to print.
        console: where to.
        listed: whether slots are listed also where a layer has many; otherwise such layers are summed up.
    """
    layers, slots = drawn.placement.shape
    console.print(
        f"{drawn.source}: {drawn.format}, {count(layers, 'layer')} of {count(drawn.num_experts, 'expert')} in "
        f"{count(slots, 'slot')}, {count(drawn.num_ranks, 'rank')}",
        markup=False,
    )
    copies, imbalances = drawn.copies(), drawn.imbalances()
    wide = slots > _WIDEST_ROW
    if wide and listed:
        console.print(_ranks_downwards(drawn))
        return
    table = _table("layer", *(() if wide else (f"rank {rank}" for rank in range(drawn.num_ranks))))
    gaps = bool((drawn.placement == EMPTY).any())
    for title in ("spare", "most", *(("empty",) if gaps else ()), *(("max / mean",) if imbalances else ())):
        table.add_column(title, justify="right")
    for row, name in enumerate(drawn.layers):
        present = copies[row][copies[row] > 0]
        figures = [int((present - 1).sum()), int(present.max(initial=0))]
        figures += [int((drawn.placement[row] == EMPTY).sum())] if gaps else []
        table.add_row(
            str(name),
            *(() if wide else (_experts(held, copies[row]) for held in drawn.by_rank(row))),
            *map(str, figures),
            *((f"{imbalances[row]:.3f}",) if imbalances else ()),
        )
    console.print(table)
    if wide:
        console.print("--layers START:STOP lists the experts of each rank", style="dim")
    else:
        console.print("* in several slots" + ("   - empty slot" if gaps else ""), style="dim")
    console.print("spare: slots beyond one for each expert   most: the most copies of one", style="dim")
    if (relative := drawn.relative_loads()) is not None:
        _print_loads(relative, console)


def print_change(change: Change, console: Console) -> None:
    """Print what a change moves."""
    old, plan = change.old, change.plan
    console.print(f"{old.source} -> {change.new.source}", markup=False)
    console.print(plan.summary(change.expert_bytes), markup=False)
    layers = change.per_layer()
    wide = old.placement.shape[1] > _WIDEST_ROW
    loads = layers[0]["imbalance_before"] is not None
    table = _table("layer", *(() if wide else (f"rank {rank}" for rank in range(old.num_ranks))))
    for title in ("changed", "cross", *(("max / mean",) if loads else ())):
        table.add_column(title, justify="right")
    for row, layer in enumerate(layers):
        if layer["slots_changed"]:
            table.add_row(
                str(layer["layer"]),
                *(() if wide else (_signed(*each) for each in change.come_and_gone(row))),
                str(layer["slots_changed"]),
                str(layer["experts_remote"]),
                *((f"{layer['imbalance_before']:.3f} -> {layer['imbalance_after']:.3f}",) if loads else ()),
            )
    if table.row_count:
        console.print(table)
    if same := len(layers) - table.row_count:
        console.print(f"{count(same, 'layer')} without a change", style="dim")
    if plan.num_transfers:
        _print_traffic(change, console)


def _print_loads(relative: NDArray[np.float64], console: Console) -> None:
    table = _table("rank")
    for title in ("load / mean", "highest"):
        table.add_column(title, justify="right")
    table.add_column("mean of the layers")
    mean, highest = relative.mean(axis=0), relative.max(axis=0)
    for rank in range(relative.shape[1]):
        bar = "\N{BOX DRAWINGS HEAVY HORIZONTAL}" * round(20 * float(mean[rank] / mean.max()))
        table.add_row(str(rank), f"{mean[rank]:.3f}", f"{highest[rank]:.3f}", bar)
    console.print(table)


def _print_traffic(change: Change, console: Console) -> None:
    from eplb_core.cli.rebalance.report import format_bytes

    traffic = change.traffic()

    def shown(number: int) -> str:
        return f"{number}" if change.expert_bytes is None else format_bytes(number)

    what = "experts" if change.expert_bytes is None else "bytes"
    if len(traffic) > _MOST_RANKS:
        table = _table(f"busiest of {np.count_nonzero(traffic)} links")
        table.add_column(what, justify="right")
        for link in np.argsort(-traffic, axis=None, kind="stable")[:_MOST_LINKS].tolist():
            source, destination = divmod(link, len(traffic))
            if traffic[source, destination]:
                table.add_row(f"rank {source} to rank {destination}", shown(int(traffic[source, destination])))
    else:
        table = _table(f"{what} from \\ to")
        for rank in range(len(traffic)):
            table.add_column(f"rank {rank}", justify="right")
        for source, row in enumerate(traffic.tolist()):
            table.add_row(f"rank {source}", *("" if source == to else shown(each) for to, each in enumerate(row)))
    console.print(table)


def _ranks_downwards(drawn: Drawn) -> Table:
    table = _table("layer", "rank", "experts")
    copies = drawn.copies()
    for row, name in enumerate(drawn.layers):
        for rank, held in enumerate(drawn.by_rank(row)):
            table.add_row(str(name) if rank == 0 else "", str(rank), _experts(held, copies[row]))
    return table


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table


def _experts(held: list[int], copies: NDArray[np.int64]) -> Text:
    from rich.text import Text

    text = Text()
    for slot, expert in enumerate(held):
        text.append(" " if slot else "")
        if expert == EMPTY:
            text.append("-", style="dim")
        elif copies[expert] > 1:
            text.append(f"{expert}*", style="bold cyan")
        else:
            text.append(str(expert))
    return text


def _signed(gets: list[int], loses: list[int]) -> Text:
    from rich.text import Text

    text = Text()
    for sign, experts, style in (("+", gets, "green"), ("-", loses, "red")):
        for expert in experts:
            text.append(f"{' ' if text else ''}{sign}{expert}", style=style)
    return text
