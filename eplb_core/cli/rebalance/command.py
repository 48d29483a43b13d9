"""`eplb rebalance`: from recorded loads to weights in their new slots, every byte compared."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eplb_core.cli.completion import complete_backends, complete_models, complete_policies
from eplb_core.cli.output import EXIT_PROBLEM, STDOUT, human_console, report_error, seconds_option, write_json
from eplb_core.errors import EplbError, InputError
from eplb_core.launch.rank_process import start_server
from eplb_core.launch.torchrun import started_by_torchrun

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from eplb_core.cli.rebalance.rank import RankResult
    from eplb_core.cli.rebalance.request import RebalanceRequest, RebalanceTask

_DEFAULT_RANKS = 4


@click.command()
@click.argument("loads", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Real weights: a Hugging Face MoE checkpoint.")
@click.option("--part", help="Part of the checkpoint to use: thinker, talker, encoder, decoder, mtp.")
@click.option(
    "--model", shell_complete=complete_models, help="Random weights of a published model's shapes, such as deepseek-v3."
)
@click.option("--scale", default="1", show_default=True, help="Shrink each tensor of --model, such as 1/16.")
@click.option("--ranks", type=int, help=f"Ranks.  [default: {_DEFAULT_RANKS}, or those of torchrun]")
@click.option("--nodes", type=int, help="Nodes that share the ranks evenly.  [default: 1, or those of torchrun]")
@click.option("--redundant", type=int, help="Slots of a layer beyond one for each expert.  [default: 0]")
@click.option("--groups", type=int, help="Expert groups to keep on one node.  [default: the checkpoint's, or 1]")
@click.option(
    "--policy",
    shell_complete=complete_policies,
    help="Config string of the balance policy, such as 'incremental?within=0.01'.  "
    "[default: incremental with --placement, or deepseek]",
)
@click.option(
    "--as-planned",
    is_flag=True,
    help="Use the policy's placement unchanged. By default ranks are relabelled and slots kept to move less.",
)
@click.option(
    "--if-worth-it", is_flag=True, help="Move nothing unless the time saved later exceeds the cost of moving."
)
@click.option(
    "--cost",
    help="With --if-worth-it: the cost of moving and the value of balance, such as "
    "'rate=20GB&step=40ms&steps=5000&moe_share=0.4&knee=1.05&blocked=0'.",
)
@click.option("--layers", help="COUNT for the first COUNT layers, or START:STOP.  [default: all]")
@click.option("--placement", type=click.Path(path_type=Path), help="Start from this placement.  [default: in order]")
@click.option(
    "--counts", default="logical", show_default=True, help="Whether LOADS counts logical experts or physical slots."
)
@click.option("--window-steps", type=int, help="Sum only this many of the last steps of LOADS.  [default: all]")
@click.option("--decay", type=float, default=1.0, show_default=True, help="Weight of a step relative to the next.")
@click.option(
    "--backend",
    shell_complete=complete_backends,
    help="Config string of the backend.  [default: EPLB_BACKEND, or auto]",
)
@click.option(
    "--window",
    help="Staging limit of a rank for received experts, such as 64MiB; the backend's staging, such as nixl?window=, "
    "is extra.  [default: what the backend's window leaves]",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Device of the weights. With cuda, local ranks take the GPUs in turn; under torchrun LOCAL_RANK decides.",
)
@click.option("--pace", help="Move in the background, at no more than this rate into a rank, such as 200MB/s.")
@click.option("--verify", default="off", show_default=True, help="Compare checksums before and after: sample, full.")
@click.option("--seed", default=0, show_default=True, help="Seed of random weights.")
@click.option("--verify-against", type=click.Path(path_type=Path), help="Compare with this copy of the checkpoint.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the new placement here (.json, .npz).")
@click.option("--json", "json_path", help="Write all numbers here; - is standard output.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw loads and traffic here (.png, .svg).")
@seconds_option(1800.0, "Time limit for the whole job, in seconds.")
@click.pass_context
def rebalance(
    context: click.Context,
    /,
    ranks: int | None,
    nodes: int | None,
    out: Path | None,
    json_path: str | None,
    plot: Path | None,
    **options: Any,
) -> None:
    """Move experts to a better placement, and verify every byte.

    LOADS is an engine's recording of how often each expert was chosen, [layers, experts] or [steps, layers, experts],
    in a .json, .jsonl, .npy, .npz, .pt, .csv or .safetensors file, or a directory with the files of all ranks.

    By default it starts local ranks. Under torchrun it joins the existing ranks, on several machines too.

    Exit code: 0 if all weights are where they should be, 1 if not, 2 if the input cannot be used.
    """
    if not started_by_torchrun():
        _check_present(options)
    from eplb_core.cli.rebalance.request import RebalanceRequest, prepare

    output = _Output(out, json_path, plot)
    console = human_console(json_path)
    if not started_by_torchrun():
        request = RebalanceRequest(
            ranks=_DEFAULT_RANKS if ranks is None else ranks, nodes=1 if nodes is None else nodes, **options
        )
        output.check()
        job = prepare(request)
        if _stays(request, job, output, console):
            return
        start_server()  # it imports torch while this process does the same
        from eplb_core.cli.rebalance.launch import run_local

        context.exit(_conclude(request, job, run_local(job, console), output, console))

    from eplb_core.cli.rebalance.launch import JoinedRanks, RefusedError

    joined = JoinedRanks(options["timeout_s"])
    request = RebalanceRequest(ranks=joined.world_size, nodes=joined.num_nodes if nodes is None else nodes, **options)

    def check_and_prepare() -> RebalanceTask:
        if ranks not in (None, joined.world_size):
            raise InputError(f"--ranks is {ranks}, but torchrun started {joined.world_size}", remedy="omit --ranks")
        if joined.is_first:
            output.check()
        return prepare(request, joined.open_checkpoint)

    try:
        job = joined.agree(check_and_prepare, request.timeout_s)
    except RefusedError as refused:
        context.exit(refused.exit_code)
    if request.if_worth_it and not job.worth.worth_it:
        if joined.is_first:
            _stays(request, job, output, console)
        return
    results = joined.run(job, console)
    code = 0
    if joined.is_first:
        try:
            code = _conclude(request, job, results, output, console)
        except EplbError as error:
            report_error(error)
            code = EXIT_PROBLEM
    context.exit(joined.share_exit_code(code, request.timeout_s))


def _check_present(paths: Mapping[str, Any]) -> None:
    """Raise `InputError` if an input does not exist: before the import of torch, which takes seconds."""
    for name, what in (("loads", "the loads file"), ("checkpoint", "the checkpoint")):
        path = paths.get(name)
        if path is not None and not path.exists():
            raise InputError(f"{what} does not exist", where=str(path))


class _Output:
    """The requested output files."""

    def __init__(self, placement: Path | None, json_path: str | None, plot: Path | None) -> None:
        self.placement = placement
        self.json_path = json_path
        self.plot = plot

    def check(self) -> None:
        """Raise `InputError` if one of the files cannot be written, before any work is done."""
        from eplb_core.cli.rebalance.plot import check_plot_target
        from eplb_core.inputs.placements import check_placement_target

        if self.placement is not None:
            check_placement_target(self.placement)
        if self.plot is not None:
            check_plot_target(self.plot)
        json_file = None if self.json_path in (None, STDOUT) else Path(str(self.json_path))
        for option, path in (("--out", self.placement), ("--json", json_file), ("--plot", self.plot)):
            if path is not None and not path.parent.is_dir():
                raise InputError(f"the directory for {option} does not exist", where=str(path.parent))
            if path is not None:
                _check_writable(option, path)
            if path is not None and path.is_dir():
                raise InputError(f"{option} is a directory", where=str(path), remedy="give the name of a file")


def _check_writable(option: str, path: Path) -> None:
    """Raise `InputError` if no file can be made in the folder: the move would be lost with its placement."""
    if path.exists():  # a device, or a file that is replaced
        return
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{option} cannot be written", where=str(path), why=error.strerror) from error


def _stays(request: RebalanceRequest, job: RebalanceTask, output: _Output, console: Console) -> bool:
    """Report and return True if the user asked to move only when it pays, and it does not."""
    if not request.if_worth_it or job.worth.worth_it:
        return False
    for note in job.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(f"nothing was moved: {job.worth}", markup=False)
    if output.json_path is not None:
        from dataclasses import asdict

        document = {"moved": False, "policy": job.policy, "notes": list(job.notes), "worth": asdict(job.worth)}
        write_json(document, output.json_path, "rebalance-declined/1")
    return True


def _conclude(
    request: RebalanceRequest, job: RebalanceTask, results: Sequence[RankResult], output: _Output, console: Console
) -> int:
    """Write the files, print the report, and return the exit code."""
    from eplb_core.cli.rebalance.plot import save_plot
    from eplb_core.cli.rebalance.report import make_report, print_report
    from eplb_core.inputs.placements import write_placement

    if request.checkpoint is not None:
        source = f"checkpoint {request.checkpoint.resolve().name}"
    else:
        source = f"{request.model}" + (f" at {request.scale}" if request.scale != "1" else "") + ", random weights"
    report = make_report(job, results, source=source)
    # The files come first: a closed terminal must not lose the results.
    if output.placement is not None and report.verified:
        write_placement(output.placement, job.new, job.num_ranks)
    if output.plot is not None:
        save_plot(report, output.plot)
    if output.json_path is not None and output.json_path != STDOUT:
        write_json(report.document(), output.json_path, "rebalance/1")
    for note in job.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    print_report(report, console)
    if output.json_path == STDOUT:
        write_json(report.document(), output.json_path, "rebalance/1")
    return 0 if report.verified else EXIT_PROBLEM
