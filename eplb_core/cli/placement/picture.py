"""A placement, and a change, as pictures: one row a layer, one column a slot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from eplb_core.errors import InputError
from eplb_core.planning.placement import EMPTY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from eplb_core.cli.placement.drawn import Change, Drawn

_INK: Final = "#22262b"
_FAINT: Final = "#d9dde3"
_COPIES: Final = ("#ffffff", "#dfe4ea", "#8db9dc", "#2f7fbf", "#0d4a80")  # empty, 1, 2, 3, 4 and more
_CHANGES: Final = ("#eceff2", "#b9b0d8", "#1769aa", "#c9503c")  # none, local, from another rank, emptied
_MOST_NUMBERS: Final = 32 * 16  # slots whose experts are written into them
_MOST_LABELS: Final = 16


def save_placement(drawn: Drawn, path: Path) -> None:
    """Draw in how many slots the expert of each slot lies, and with loads how much each rank bears.

    Raises:
        InputError: the file cannot be written.
    """
    relative = drawn.relative_loads()
    figure = _figure(f"{drawn.source.name}: {drawn.num_experts} experts in {drawn.placement.shape[1]} slots")
    ratios = (1,) if relative is None else (2, 1)
    first, *others = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    copies = np.take_along_axis(drawn.copies(), np.maximum(drawn.placement, 0), axis=1)
    shades = np.where(drawn.placement == EMPTY, 0, np.minimum(copies, len(_COPIES) - 1))
    _draw_slots(first, drawn, shades, _COPIES, ("empty", "1 copy", "2", "3", "4 and more"))
    first.set_title("Slots, by the number of copies of their expert", loc="left", fontsize=10, color=_INK)
    if relative is not None:
        [beside] = others
        image = beside.imshow(relative, cmap="Blues", vmin=0, aspect="auto", interpolation="none")
        beside.set_title("Load of a rank / mean of the layer", loc="left", fontsize=10, color=_INK)
        beside.set_xlabel("rank")
        _tick(beside, range(drawn.num_ranks), drawn.layers)
        figure.colorbar(image, ax=beside, fraction=0.046, pad=0.03).outline.set_visible(False)
    _save(figure, path)


def save_change(change: Change, path: Path) -> None:
    """Draw which slots change and why, and what each rank sends to each other.

    Raises:
        InputError: the file cannot be written.
    """
    plan, new = change.plan, change.new
    figure = _figure(f"{change.old.source.name} to {new.source.name}: {plan.num_transfers} experts cross between ranks")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    kinds = np.where((plan.old != EMPTY) & (plan.new == EMPTY), 3, 0)
    slots = plan.move_rank * plan.slots_per_rank + plan.move_slot
    kinds[plan.move_layer, slots] = np.where(plan.move_transfer < 0, 1, 2)
    _draw_slots(left, new, kinds, _CHANGES, ("unchanged", "copied on its rank", "from another rank", "emptied"))
    left.set_title("Slots that change, with the expert that they get", loc="left", fontsize=10, color=_INK)
    traffic = change.traffic()
    unit = "experts" if change.expert_bytes is None else "GB"
    scale = 1 if change.expert_bytes is None else 1e9
    shown = np.ma.masked_array(traffic / scale, mask=np.eye(len(traffic), dtype=bool))
    image = right.imshow(shown, cmap="Blues", vmin=0, vmax=max(float(shown.max()), 1e-9))
    right.set_facecolor(_FAINT)
    right.set_title(f"From each rank to each other: {unit}", loc="left", fontsize=10, color=_INK)
    right.set_xlabel("to rank")
    right.set_ylabel("from rank")
    _tick(right, range(len(traffic)), tuple(range(len(traffic))))
    figure.colorbar(image, ax=right, fraction=0.046, pad=0.03).outline.set_visible(False)
    _save(figure, path)


def _figure(title: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), dpi=144, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, color=_INK, fontsize=11, x=0.012, ha="left")
    return figure


def _draw_slots(
    axes: Axes, drawn: Drawn, shades: NDArray[np.int64], colors: tuple[str, ...], names: tuple[str, ...]
) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    axes.imshow(shades, cmap=ListedColormap(colors), vmin=0, vmax=len(colors) - 1, aspect="auto", interpolation="none")
    for rank in range(1, drawn.num_ranks):
        axes.axvline(rank * drawn.slots_per_rank - 0.5, color=_INK, linewidth=0.8)
    if shades.size <= _MOST_NUMBERS:
        for (row, slot), expert in np.ndenumerate(drawn.placement):
            color = "white" if _is_dark(colors[shades[row, slot]]) else _INK
            text = "" if expert == EMPTY else str(expert)
            axes.text(slot, row, text, ha="center", va="center", fontsize=8, color=color)
    middles = [(rank + 0.5) * drawn.slots_per_rank - 0.5 for rank in range(drawn.num_ranks)]
    step = -(-drawn.num_ranks // _MOST_LABELS)
    axes.set_xticks(middles[::step], [f"rank {rank}" for rank in range(0, drawn.num_ranks, step)])
    _tick(axes, None, drawn.layers)
    used = sorted(set(np.unique(shades).tolist()))
    axes.legend(
        handles=[Patch(facecolor=colors[each], edgecolor=_FAINT, label=names[each]) for each in used],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1),
        ncols=len(used),
        frameon=False,
        fontsize=9,
    )


def _is_dark(color: str) -> bool:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 140


def _tick(axes: Axes, columns: range | None, layers: tuple[int, ...]) -> None:
    step = -(-len(layers) // _MOST_LABELS)
    axes.set_yticks(range(0, len(layers), step), [str(each) for each in layers[::step]])
    if columns is not None:
        axes.set_xticks(list(columns)[:: -(-len(columns) // _MOST_LABELS)])
        axes.set_ylabel(axes.get_ylabel() or "layer")
    else:
        axes.set_ylabel("layer")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError("the plot cannot be written", where=str(path), why=error.strerror) from error
