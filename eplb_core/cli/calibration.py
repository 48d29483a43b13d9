"""Reads the documents of `eplb bench` for `eplb simulate --calibrate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eplb_core.errors import EplbError, InputError

if TYPE_CHECKING:
    from eplb_core.bench.workload import Workload
    from eplb_core.simulate.calibrate import MeasuredRun
    from eplb_core.simulate.cost import Links
    from eplb_core.simulate.run import Setup

_STEP_BYTES = {"cpu": 24 << 20, "cuda": 1 << 30}
"""The cost of a step in bytes, as weighed by `Rearranger`."""


def read_runs(paths: Sequence[Path]) -> list[MeasuredRun]:
    """Return the runs of documents that `eplb bench --json` wrote.

    Raises:
        InputError: a file cannot be read, is not such a document, or has a run that failed.
    """
    return [_measured(run, path) for path in paths for run in _runs(path)]


def setup_of(work: Workload, window_bytes: int, in_place_from: int | None, links: Links) -> Setup:
    """Return the simulated setup of a workload: all ranks on one node, as `eplb bench` starts them."""
    from eplb_core.simulate.run import Setup

    return Setup(
        num_ranks=work.num_ranks,
        num_nodes=1,
        num_slots=work.slots_per_rank * work.num_ranks,
        num_groups=1,
        tensor_bytes=work.tensor_bytes,
        num_layers=work.num_layers,
        window_bytes=window_bytes,
        in_place_from=in_place_from,
        links=links,
    )


def _runs(path: Path) -> list[dict[str, Any]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("a run to calibrate with cannot be read", where=str(path), why=str(error)) from error
    runs = document.get("runs", [document]) if isinstance(document, dict) else None
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise _not_a_run(path, "it is not a JSON object of runs")
    return runs


def _measured(run: dict[str, Any], path: Path) -> MeasuredRun:
    from eplb_core.bench.workload import make_workload, read_workload
    from eplb_core.simulate.calibrate import MeasuredRun
    from eplb_core.simulate.cost import Links

    if "error" in run:
        raise _not_a_run(path, f"a run in it failed: {run['error']}")
    try:
        made, in_place_from = dict(run["workload"]), _STEP_BYTES[run["device"]]
        window = int(run.get("staging_window_bytes") or run["window_bytes"])
        seconds, steps = [float(each) for each in run["seconds"]], [int(each) for each in run["bounded_steps"]]
        work = read_workload(Path(made["file"])) if "file" in made else make_workload(**made)
    except EplbError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise _not_a_run(path, f"{type(error).__name__}: {error}") from error
    if not len(seconds) == len(steps) == work.num_steps or min(seconds, default=1.0) <= 0:
        raise _not_a_run(path, "its times do not fit its workload")
    return MeasuredRun(
        setup=setup_of(work, window, in_place_from, Links()),
        placements=work.placements,
        seconds=seconds,
        bounded_steps=steps,
    )


def _not_a_run(path: Path, why: str) -> InputError:
    return InputError(
        "this is not a run to calibrate with",
        where=str(path),
        why=why,
        remedy="write it with `eplb bench --json FILE` of this version",
    )
