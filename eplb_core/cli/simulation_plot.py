"""Plots a simulation: imbalance over time, and the bytes into the busiest rank at each rebalance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eplb_core.cli.rebalance.plot import check_plot_target
from eplb_core.errors import InputError

if TYPE_CHECKING:
    from eplb_core.simulate.run import Rebalance

__all__ = ["check_plot_target", "save_plot"]

_INK, _FAINT = "#22262b", "#d9dde3"
_COLORS = ("#1769aa", "#c4561b", "#3d8b4f", "#8e5ea2", "#b9912b", "#5b6470", "#d0607e", "#3aa3a0", "#8c6d4f")


def save_plot(runs: Mapping[str, Sequence[Rebalance]], title: str, path: Path) -> None:
    """Write the plot, as PNG or SVG by the name of the file.

    Args:
        runs: name of a policy -> its rebalances.
        title: of the whole figure.
        path: the file.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 4.8), dpi=144, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for (name, rows), color in zip(runs.items(), _COLORS * (1 + len(runs) // len(_COLORS)), strict=False):
        number = range(1, len(rows) + 1)
        left.plot(number, [row.imbalance for row in rows], color=color, label=name, marker="o", markersize=3)
        moved = [row.cost.rank_bytes_max / 1e9 for row in rows]
        right.plot(number, moved, color=color, label=name, marker="o", markersize=3)
    left.set_title(
        "Imbalance (max / mean) after each rebalance, mean of the layers", loc="left", fontsize=10, color=_INK
    )
    right.set_title("GB into the busiest rank", loc="left", fontsize=10, color=_INK)
    for axes in (left, right):
        axes.set_xlabel("rebalance")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=_FAINT, linewidth=0.8)
        axes.tick_params(length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    left.set_ylim(bottom=1.0)
    right.set_ylim(bottom=0.0)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(title, color=_INK, fontsize=11, x=0.012, ha="left")
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError("the plot cannot be written", where=str(path), why=error.strerror) from error
