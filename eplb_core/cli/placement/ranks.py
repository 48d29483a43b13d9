"""Which ranks share the slots of a placement file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eplb_core.errors import InputError

if TYPE_CHECKING:
    from eplb_core.inputs.placement_formats import PlacementFile


def ranks_of(file: PlacementFile, ranks: int | None, source: Path, *, needed: bool) -> int:
    """Return how many ranks share the slots; 1 if neither the file nor the user says so and it is not needed.

    Raises:
        InputError: the file and the user say different numbers, or it is needed and neither says it.
    """
    if ranks is None:
        ranks = file.num_ranks
    elif file.num_ranks not in (None, ranks):
        raise InputError(f"--ranks is {ranks}, but the placement is for {file.num_ranks}", where=str(source))
    if ranks is None and needed:
        raise InputError(
            "the placement does not say how many ranks share its slots", where=str(source), remedy="give --ranks"
        )
    return 1 if ranks is None else ranks
