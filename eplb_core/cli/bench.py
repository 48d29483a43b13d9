"""`eplb bench`: measure how fast a backend moves expert weights, and verify every byte."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from eplb_core.cli.completion import complete_backends
from eplb_core.cli.output import EXIT_PROBLEM, STDOUT, human_console, one_line, parse_size, seconds_option, write_json
from eplb_core.errors import EplbError, InputError
from eplb_core.launch.rank_process import start_server

if TYPE_CHECKING:
    from rich.console import Console

    from eplb_core.bench.rank import Advance, BenchRun
    from eplb_core.bench.workload import Workload

_STAGES = {"fill": "fill slots", "move": "rearrange", "check": "compare bytes"}


def _parse_size(context: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Parse a number of bytes, with or without a unit."""
    if value is None:
        return None
    return parse_size(param.opts[0], f"{value}B" if value.isdecimal() else value)


@click.command()
@click.option("--workload", type=click.Path(path_type=Path), help="An .npz with placements, tensor_bytes and ranks.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    shell_complete=complete_backends,
    help="A config string; repeat it to compare several.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--ranks", type=int, help="Without --workload: ranks.  [default: 2]")
@click.option("--layers", type=int, help="Without --workload: layers.  [default: 4]")
@click.option("--slots", type=int, help="Without --workload: slots per rank and layer.  [default: 16]")
@click.option("--redundant", type=int, help="Without --workload: slots that hold extra copies.  [default: 4]")
@click.option("--expert-bytes", callback=_parse_size, help="Without --workload: size of an expert.  [default: 3MiB]")
@click.option("--steps", type=int, help="Without --workload: rearrangements.  [default: 6]")
@click.option("--churn", type=float, help="Without --workload: share of slots redrawn per step.  [default: 1]")
@click.option(
    "--swaps",
    type=int,
    help="Without --workload, instead of --churn: pairs of experts swapped per step; 0 moves nothing.",
)
@click.option("--seed", type=int, help="Without --workload: seed of the random placements.  [default: 0]")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Runs of each backend, in turn.")
@click.option(
    "--window",
    "window_bytes",
    callback=_parse_size,
    help="Staging memory for received experts.  [default: what the backend's windows leave]",
)
@click.option(
    "--in-place",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Receive into vacated slots instead of the window.",
)
@seconds_option(1800.0, "Time limit for each run, in seconds.")
@click.option("--json", "json_path", metavar="FILE", help="Write all numbers here; - is standard output.")
@click.pass_context
def bench(
    context: click.Context,
    /,
    workload: Path | None,
    backends: tuple[str, ...],
    device: str,
    rounds: int,
    window_bytes: int | None,
    in_place: Literal["auto", "always", "never"],
    timeout_s: float,
    json_path: str | None,
    **sizes: Any,
) -> None:
    """Measure how fast a backend moves expert weights.

    Starts the ranks as processes on this machine, gives every expert unique bytes, goes through all placements of a
    workload, and compares every byte at the end. With --device cuda, several ranks may share a GPU.

    Exit code: 0 if all bytes are right, 1 if not, 2 if the input cannot be used.
    """
    if json_path not in (None, STDOUT) and not Path(str(json_path)).parent.is_dir():
        raise InputError("the directory for --json does not exist", where=str(Path(str(json_path)).parent))
    given = {name: value for name, value in sizes.items() if value is not None}
    work = _workload(workload, given)
    start_server()  # it imports torch while this process does the same
    from eplb_core.bench.rank import BenchRun
    from eplb_core.bench.run import check_job
    from eplb_core.bench.summary import print_summary, summarize
    from eplb_core.registry.config import AUTO, backend_from_environment

    names = list(dict.fromkeys(backends)) or [backend_from_environment(None) or AUTO]
    jobs = [
        BenchRun(
            workload=work,
            backend=name,
            device=device,
            window_bytes=window_bytes,
            in_place=in_place,
            timeout_s=timeout_s,
        )
        for name in names
    ]
    for job in jobs:
        check_job(job)
    console = human_console(json_path)
    console.print(_describe(work, device), markup=False)
    runs = []
    for number in range(rounds):
        for job in jobs:
            title = job.backend + (f", round {number + 1} of {rounds}" if rounds > 1 else "")
            run = _run(job, title, console, keep_going=len(jobs) > 1)
            runs.append(run | {"workload": given if workload is None else {"file": str(workload.absolute())}})
    rows = summarize(names, runs)
    print_summary(rows, runs, console)
    if json_path is not None:
        single = len(runs) == 1
        if single:
            write_json(runs[0], json_path, "bench/1")
        else:
            write_json({"rounds": rounds, "summary": rows, "runs": runs}, json_path, "bench-comparison/1")
    if not all(row["correct"] for row in rows):
        context.exit(EXIT_PROBLEM)


def _workload(path: Path | None, sizes: dict[str, Any]) -> Workload:
    from eplb_core.bench.workload import make_workload, read_workload

    if path is None:
        return make_workload(**sizes)
    if sizes:
        options = ", ".join("--" + name.replace("_", "-") for name in sizes)
        raise InputError(
            f"--workload and {options} were given", why="the file defines all of that", remedy="give only one"
        )
    return read_workload(path)


def _describe(work: Workload, device: str) -> str:
    return (
        f"{work.num_ranks} ranks on {device}, {work.num_layers} layers of {work.slots_per_rank} slots a rank, "
        f"{work.expert_bytes:,} bytes an expert, {work.num_steps} steps of {work.arriving_bytes() / 1e6:,.0f} MB"
    )


def _run(job: BenchRun, title: str, console: Console, *, keep_going: bool) -> dict[str, Any]:
    """Return the document of one run; if it failed and others follow, only its settings and the error."""
    from eplb_core.bench.run import run_bench
    from eplb_core.cli.progress import StageBars

    work = job.workload
    titles = {stage: f"{title}: {what}" for stage, what in _STAGES.items()}
    per_part = {"fill": work.num_layers, "move": work.num_steps, "check": work.num_layers}
    with StageBars(console, titles, work.num_ranks, heard_ranks=work.num_ranks) as bars:

        def show(rank: int, event: Advance) -> None:
            share = work.rank_bytes / per_part[event.stage]
            bars.update(rank, event.stage, int(event.done * share), int(event.total * share))

        try:
            return run_bench(job, show)
        except EplbError as error:
            if not keep_going:
                raise
            return {"backend": job.backend, "device": job.device, "error": one_line(error)}
