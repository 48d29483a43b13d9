"""`eplb placement convert`: a placement from the format of one engine into that of another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eplb_core.cli.output import human_console
from eplb_core.cli.placement.ranks import ranks_of
from eplb_core.errors import InputError, PlacementError
from eplb_core.inputs.placement_formats import FORMATS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eplb_core.inputs.checkpoint import Checkpoint
    from eplb_core.inputs.placement_formats import PlacementFile


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--to", "target_format", type=click.Choice(FORMATS), required=True, help="The format to write.")
@click.option("--ranks", type=int, help="Ranks that share the slots.  [default: as SOURCE says]")
@click.option("--experts", type=int, help="Logical experts of a layer.  [default: the highest in SOURCE, and 1]")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="The model: which of its layers have experts.")
@click.option("--part", help="The part of the checkpoint, as in eplb rebalance.")
@click.option("--first-layer", type=int, help="Without --checkpoint: the model's number of the first MoE layer.")
def convert(
    source: Path,
    target: Path,
    target_format: str,
    ranks: int | None,
    experts: int | None,
    checkpoint: Path | None,
    part: str | None,
    first_layer: int | None,
) -> None:
    """Convert the placement in SOURCE, whose format is found out, and write it to TARGET.

    SGLang has a row for every layer of the model and TensorRT-LLM names layers by their number: for models with dense
    layers, give --checkpoint or --first-layer.
    """
    from eplb_core.inputs.checkpoint import Checkpoint
    from eplb_core.inputs.placement_formats import (
        check_placement_target,
        read_placement_file,
        write_placement_file,
    )

    check_placement_target(target, target_format)
    model = None if checkpoint is None else Checkpoint.open(checkpoint, part)
    file = read_placement_file(source, None if model is None else model.num_layers)
    ranks = ranks_of(file, ranks, source, needed=target_format in ("eplb", "vllm-ascend"))
    layers = _Layers.of(model, first_layer, file)
    file = replace(file, placement=layers.with_experts(file.placement, source), layer_ids=layers.ids)
    check = _check(file.placement, ranks, experts if experts is not None else layers.num_experts, source)
    written = replace(file, placement=layers.all_rows(check) if target_format == "sglang" else check)
    write_placement_file(target, written, ranks, target_format)
    rows, slots = check.shape
    human_console().print(
        f"{target}: {target_format}, {rows} layer{'' if rows == 1 else 's'} of {slots} slots, out of {file.format}",
        markup=False,
    )


def _check(placement: NDArray[np.int64], ranks: int, num_experts: int | None, source: Path) -> NDArray[np.int64]:
    """Return the placement if every layer of it holds every expert."""
    import numpy as np

    from eplb_core.planning.placement import check_placement

    if num_experts is None:
        num_experts = int(placement.max()) + 1
    checked = check_placement(placement, ranks, num_logical=num_experts, name=str(source))
    for layer, row in enumerate(checked):
        missing = np.setdiff1d(np.arange(num_experts), row)
        if len(missing):
            raise PlacementError(
                f"layer {layer} of the placement has no slot for expert {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
                where=str(source),
                why=f"there are {num_experts} experts",
            )
    return checked


class _Layers:
    """Which layers of the model the rows of a placement are.

    Attributes:
        ids: the model's number of each MoE layer.
        num_layers: all layers, dense ones included.
        num_experts: of a layer, if it is known.
    """

    def __init__(self, ids: tuple[int, ...], num_layers: int, num_experts: int | None = None) -> None:
        self.ids = ids
        self.num_layers = num_layers
        self.num_experts = num_experts

    @classmethod
    def of(cls, model: Checkpoint | None, first_layer: int | None, file: PlacementFile) -> _Layers:
        """Find out which they are: from the model, from the file, from what the user says, or all from 0 on."""
        if model is not None:
            return cls(model.layer_ids, model.num_hidden_layers or model.layer_ids[-1] + 1, model.num_experts)
        rows = len(file.placement)
        if file.layer_ids is not None:
            return cls(file.layer_ids, file.layer_ids[-1] + 1)
        first = first_layer or 0
        if first < 0:
            raise InputError(f"--first-layer is {first}", why="layers are counted from 0")
        if file.format == "sglang":
            if first >= rows:
                raise InputError(f"--first-layer is {first}, but the placement has {rows} layers")
            return cls(tuple(range(first, rows)), rows)
        return cls(tuple(range(first, first + rows)), first + rows)

    def with_experts(self, placement: NDArray[np.int64], source: Path) -> NDArray[np.int64]:
        """Return the rows of the MoE layers."""
        if len(placement) == len(self.ids):
            return placement
        if len(placement) == self.num_layers:
            return placement[list(self.ids)]
        raise InputError(
            f"the placement has {len(placement)} layers, the model has {self.num_layers}, {len(self.ids)} with experts",
            where=str(source),
        )

    def all_rows(self, placement: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return a row for each layer of the model."""
        from eplb_core.inputs.placement_formats import with_dense_rows

        return with_dense_rows(placement, self.ids, self.num_layers)
