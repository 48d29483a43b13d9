"""Plots a rebalance: the load of each rank before and after, and the bytes between ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from eplb_core.cli.rebalance.report import format_bytes
from eplb_core.errors import InputError
from eplb_core.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from eplb_core.cli.rebalance.report import RebalanceReport

_BEFORE, _AFTER, _INK, _FAINT = "#b9bec7", "#1769aa", "#22262b", "#d9dde3"
_MOST_LABELS = 16  # ticks and numbers beyond this only make noise


PLOT_SUFFIXES: Final = (".png", ".svg")


def check_plot_target(path: Path) -> None:
    """Check that `save_plot` can work, before any work is done.

    Raises:
        InputError: the name ends neither in `.png` nor in `.svg`, or matplotlib is not installed.
    """
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise InputError(
            f"a plot cannot be written as {path.suffix or 'a file without extension'}",
            where=str(path),
            remedy=f"give a name that ends in {' or '.join(PLOT_SUFFIXES)}",
        )
    require("plot", "--plot")


def save_plot(report: RebalanceReport, path: Path) -> None:
    """Write the plot, as PNG or SVG by the name of the file.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A separate figure without pyplot: nothing here needs a display or changes global settings.
    figure = Figure(figsize=(12, 4.8), dpi=144, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    _draw_loads(left, report)
    _draw_traffic(figure, right, report)
    figure.suptitle(
        f"{report.source}: {len(report.layers)} layers of {report.experts} experts in {report.slots} slots, "
        f"{report.ranks} ranks, {report.backend}",
        color=_INK,
        fontsize=11,
        x=0.012,
        ha="left",
    )
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError("the plot cannot be written", where=str(path), why=error.strerror) from error


def _draw_loads(axes: Axes, report: RebalanceReport) -> None:
    """Draw the mean of all layers as bars, and the range of single layers as lines on them."""
    ranks = np.arange(report.ranks)
    highest = 1.0
    for offset, loads, color, when, after in (
        (-0.2, report.load_before, _BEFORE, "before", False),
        (0.2, report.load_after, _AFTER, "after", True),
    ):
        label = f"{when}: max / mean {np.mean(report.imbalances(after)):.3f}"
        if len(loads):
            axes.bar(ranks + offset, loads.mean(axis=0), width=0.36, color=color, label=label, zorder=2)
            axes.vlines(ranks + offset, loads.min(axis=0), loads.max(axis=0), color=_INK, linewidth=1.1, zorder=4)
            highest = max(highest, float(loads.max()))
    axes.axhline(1.0, color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    axes.set_title("Load of each rank: mean of the layers, and their range", loc="left", fontsize=10, color=_INK)
    axes.set_ylim(0, 1.15 * highest)
    axes.set_xlabel("rank")
    axes.set_ylabel("load / mean load of the layer")
    _tick_ranks(axes, report.ranks, x=True)
    if len(report.load_before):
        axes.legend(frameon=False, loc="upper right", ncols=2, fontsize=9, borderaxespad=0)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8, zorder=0)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_traffic(figure: Figure, axes: Axes, report: RebalanceReport) -> None:
    peak = int(report.traffic.max())
    scale, unit = next((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if peak >= s or s == 1)
    traffic = np.ma.masked_array(report.traffic / scale, mask=np.eye(report.ranks, dtype=bool))
    image = axes.imshow(traffic, cmap="Blues", vmin=0, vmax=max(peak / scale, 1e-9))
    axes.set_facecolor(_FAINT)
    axes.set_title(f"Bytes between ranks: {format_bytes(report.bytes_remote)}", loc="left", fontsize=10, color=_INK)
    axes.set_xlabel("to rank")
    axes.set_ylabel("from rank")
    _tick_ranks(axes, report.ranks, x=True)
    _tick_ranks(axes, report.ranks, x=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if report.ranks <= _MOST_LABELS // 2:
        for source, destination in np.argwhere(~np.eye(report.ranks, dtype=bool)):
            value = float(report.traffic[source, destination]) / scale
            color = "white" if value * scale > 0.6 * peak else _INK
            axes.text(destination, source, f"{value:.3g}", ha="center", va="center", fontsize=9, color=color)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, label=unit)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _tick_ranks(axes: Axes, num_ranks: int, *, x: bool) -> None:
    ticks = np.arange(0, num_ranks, -(-num_ranks // _MOST_LABELS))
    (axes.set_xticks if x else axes.set_yticks)(ticks)
