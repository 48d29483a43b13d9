"""How even the load is before, now and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from eplb_core.cli.placement.ranks import ranks_of
from eplb_core.cli.watch.snapshot import RankSnapshot
from eplb_core.errors import EplbError, InputError
from eplb_core.inputs.loads import read_loads
from eplb_core.inputs.placement_formats import read_placement_file
from eplb_core.planning.placement import imbalance


class Balance:
    """Judges placements by recorded loads.

    Args:
        loads: the recording.
        num_ranks: the ranks that share the slots; None for what each source says.
        old: the placement before, for sources that tell none.
        new: the placement after.

    Raises:
        InputError: a file cannot be read, or they do not fit one another.
    """

    def __init__(self, loads: Path, num_ranks: int | None, old: Path | None, new: Path | None) -> None:
        self._loads = read_loads(loads)
        self._num_ranks = num_ranks
        self._first: dict[str, float] = {}
        self._given: dict[str, float] | None = None
        if old is not None and new is not None:
            self._given = {}
            for when, path in (("before", old), ("after", new)):
                file = read_placement_file(path)
                self._given[when] = self._mean(file.placement.tolist(), ranks_of(file, num_ranks, path, needed=True))

    def of(self, snapshot: RankSnapshot) -> dict[str, float] | None:
        """Return the mean over the layers of largest load / mean load: `before`, `now` and `after`, where known.

        Before is what the first look at this source saw.
        """
        num_ranks = self._num_ranks or snapshot.num_ranks
        if not snapshot.placements or num_ranks is None:
            return self._given
        try:
            now = self._mean(snapshot.placements["effective"], num_ranks)
            after = self._mean(snapshot.placements["requested"], num_ranks)
        except EplbError as error:
            raise InputError("the loads do not fit the placements", where=snapshot.source, why=str(error)) from error
        return {"before": self._first.setdefault(snapshot.source, now), "now": now, "after": after}

    def _mean(self, placement: list[list[int]], num_ranks: int) -> float:
        return float(np.mean(imbalance(placement, self._loads, num_ranks)))
