"""`eplb simulate`: many rebalances at any scale, without weights: balance, bytes, seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from eplb_core.cli.output import STDOUT, human_console, parse_size, write_json
from eplb_core.errors import ConfigError, InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console

    from eplb_core.simulate.compared import Contestant
    from eplb_core.simulate.cost import Cost, Links
    from eplb_core.simulate.run import Rebalance, Setup
    from eplb_core.simulate.trace import Interval, Kind

_MOST_RANKS = 4096
_MOST_ROWS = 20  # rebalances in the table; the document has all


@click.command()
@click.option(
    "--model", default="deepseek-v3", show_default=True, help="A published model: its layers, experts, bytes."
)
@click.option("--layers", type=click.IntRange(1), help="MoE layers.  [default: those of the model, or of --loads]")
@click.option("--ranks", type=click.IntRange(1, _MOST_RANKS), default=8, show_default=True)
@click.option(
    "--nodes", type=click.IntRange(1), default=1, show_default=True, help="Nodes that share the ranks evenly."
)
@click.option("--redundant", type=click.IntRange(0), default=32, show_default=True, help="Slots beyond one per expert.")
@click.option("--groups", type=click.IntRange(1), default=1, show_default=True, help="Expert groups of the router.")
@click.option(
    "--policy", "policies", multiple=True, help="A config string; repeat it to compare.  [default: incremental]"
)
@click.option(
    "--compare",
    is_flag=True,
    help="Compare the built-in ways to rebalance: none, fresh plans, slot keeping, swaps, incremental.",
)
@click.option("--as-planned", is_flag=True, help="Use plans unchanged, without relabelling ranks or keeping slots.")
@click.option(
    "--loads", type=click.Path(path_type=Path), help="A recording [steps, layers, experts] instead of --trace."
)
@click.option(
    "--interval", type=click.IntRange(1), default=1, show_default=True, help="With --loads: steps per interval."
)
@click.option("--trace", type=click.Choice(["lognormal", "zipf"]), default="lognormal", show_default=True)
@click.option(
    "--drift", type=click.FloatRange(0, 1), default=0.2, show_default=True, help="Change of loads per interval."
)
@click.option(
    "--rebalances", type=click.IntRange(1), default=10, show_default=True, help="Number of rebalances, without --loads."
)
@click.option(
    "--tokens", type=click.FloatRange(0, min_open=True), help="Tokens per expert and interval.  [default: no noise]"
)
@click.option("--seed", default=0, show_default=True)
@click.option("--links", help="Rates, such as 'rank_rate=200GB&node_rate=400GB&step=1ms'; see the documentation.")
@click.option(
    "--calibrate",
    "measured",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Learn the rates from JSON of `eplb bench`, instead of --links; repeat it for several files.",
)
@click.option("--window", default="256MiB", show_default=True, help="Staging memory of a rank for received experts.")
@click.option(
    "--in-place-from",
    default="1GiB",
    show_default=True,
    help="Staging bytes that cost as much time as a step: 1GiB on GPUs, 24MiB on CPUs; none stages everything.",
)
@click.option(
    "--workload",
    type=click.Path(path_type=Path),
    help="Only the cost of a bench workload's placements, without a policy.",
)
@click.option("--json", "json_path", metavar="FILE", help="Write all numbers here; - is standard output.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw imbalance and bytes over time here (.png, .svg).")
def simulate(json_path: str | None, plot: Path | None, workload: Path | None, **options: Any) -> None:
    """Simulate many rebalances, without weights and without ranks.

    A policy chooses placements as it would in a serving system; plans and schedules are real, so experts, bytes, steps
    and staging are exact. Seconds follow from the rates of --links.

    Exit code: 0, or 2 if the input cannot be used.
    """
    from eplb_core.cli.simulation_plot import check_plot_target, save_plot

    if json_path not in (None, STDOUT) and not Path(str(json_path)).parent.is_dir():
        raise InputError("the directory for --json does not exist", where=str(Path(str(json_path)).parent))
    if plot is not None:
        check_plot_target(plot)
    console = human_console(json_path)
    links, learned = _links(options["links"], options.pop("measured"))
    calibration: dict[str, object] = {"calibration": learned} if learned else {}
    if learned:
        console.print(learned["text"], markup=False, soft_wrap=True)
    if workload is not None:
        costs = _workload_costs(workload, options, links)
        _print_costs(costs, console)
        if json_path is not None:
            steps = {"workload": str(workload), "steps": [asdict(cost) for cost in costs]}
            write_json({**steps, **calibration}, json_path, "simulate-workload/1")
        return
    setup, expert_name = _setup(options, links)
    runs: dict[str, list[Rebalance]] = {}
    chosen = _contestants(options)
    from eplb_core.simulate.run import simulate as run

    for contestant in chosen:
        with console.status(contestant.name):
            runs[contestant.name] = run(
                replace(setup, moves=contestant.moves), contestant.policy, _trace(options, setup)
            )
    console.print(_headline(options, setup, expert_name), markup=False)
    if len(runs) == 1:
        _print_run(next(iter(runs.values())), console)
    _print_summary(runs, console)
    if json_path is not None:
        document = {
            "setup": {key: str(value) if isinstance(value, Path) else value for key, value in options.items()},
            "runs": {name: [rebalance.document() for rebalance in rows] for name, rows in runs.items()},
            "summary": {name: _means(rows) for name, rows in runs.items()},
            **calibration,
        }
        write_json(document, json_path, "simulate/1")
    if plot is not None:
        save_plot(runs, _headline(options, setup, expert_name), plot)


# --- from options to a simulation -------------------------------------------------------------------------------------


def _setup(options: dict[str, Any], links: Links) -> tuple[Setup, str]:
    from eplb_core.inputs.models import find_model
    from eplb_core.simulate.run import Setup

    model = find_model(options["model"])
    experts, layers = model.num_experts, options["layers"] or model.num_layers
    if options["loads"] is not None:
        shape = _recording(options).shape
        layers, experts = shape[1], shape[2]
    num_slots, ranks, nodes = experts + options["redundant"], options["ranks"], options["nodes"]
    if num_slots % ranks:
        missing = -num_slots % ranks
        raise InputError(
            f"{num_slots} slots cannot be shared evenly by {ranks} ranks",
            why=f"{experts} experts and {options['redundant']} redundant ones",
            remedy=f"give --redundant {options['redundant'] + missing}",
        )
    if ranks % nodes:
        raise InputError(f"{ranks} ranks cannot be shared evenly by {nodes} nodes")
    in_place = options["in_place_from"]
    setup = Setup(
        num_ranks=ranks,
        num_nodes=nodes,
        num_slots=num_slots,
        num_groups=options["groups"],
        tensor_bytes=tuple(tensor.nbytes for tensor in model.tensors),
        num_layers=layers,
        window_bytes=parse_size("--window", options["window"]),
        in_place_from=None if in_place == "none" else parse_size("--in-place-from", in_place),
        links=links,
    )
    return setup, f"{experts} experts of {model.expert_bytes / 1e6:.1f} MB"


def _contestants(options: dict[str, Any]) -> tuple[Contestant, ...]:
    from eplb_core.registry.policies import select_policy
    from eplb_core.simulate.compared import Contestant, contestants

    if options["compare"]:
        if options["policies"]:
            raise InputError("--compare and --policy were given", remedy="give only one")
        return contestants()
    names = list(dict.fromkeys(options["policies"])) or ["incremental"]
    selected = [select_policy(name) for name in names]
    moves: Any = "planned" if options["as_planned"] else "relabelled"
    return tuple(Contestant(each.text, each.policy, moves) for each in selected)


def _recording(options: dict[str, Any]) -> NDArray[np.float64]:
    from eplb_core.inputs.loads import read_load_window

    window = read_load_window(options["loads"])
    return window if options["layers"] is None else window[:, : options["layers"]]


def _trace(options: dict[str, Any], setup: Setup) -> Iterator[Interval]:
    from eplb_core.simulate.trace import cut_trace, make_trace

    if options["loads"] is not None:
        return cut_trace(_recording(options), options["interval"])
    return make_trace(
        kind=cast("Kind", options["trace"]),
        layers=setup.num_layers,
        experts=setup.num_slots - options["redundant"],
        intervals=options["rebalances"] + 1,
        drift=options["drift"],
        tokens=options["tokens"],
        seed=options["seed"],
    )


def _links(text: str | None, measured: Sequence[Path]) -> tuple[Links, dict[str, Any]]:
    """Return the links, and what was learned from runs, if any were given."""
    from eplb_core.registry.config import parse_config, resolve_options
    from eplb_core.simulate.cost import Links

    if measured:
        if text is not None:
            raise InputError("--links and --calibrate were given", remedy="give only one")
        from eplb_core.cli.calibration import read_runs
        from eplb_core.simulate.calibrate import calibrate

        found = calibrate(read_runs(measured))
        told = (
            f"learned from {found.rearrangements} rearrangements, {100 * found.off:.0f} % off in the median: "
            f"--links '{found.option()}'"
        )
        return found.links, {"text": told, "links": asdict(found.links), "off": found.off}
    if text is None:
        return Links(), {}
    try:
        links: Links = resolve_options(parse_config(f"links?{text}"), Links, kind="setting", environment={}).values
    except ConfigError as error:
        raise InputError(f"--links: {error.what}", why=error.why, remedy=error.remedy) from error
    return links, {}


def _workload_costs(path: Path, options: dict[str, Any], links: Links) -> list[Cost]:
    from eplb_core.bench.workload import read_workload
    from eplb_core.cli.calibration import setup_of
    from eplb_core.simulate.run import simulate_workload

    work = read_workload(path)
    in_place = options["in_place_from"]
    in_place_from = None if in_place == "none" else parse_size("--in-place-from", in_place)
    return simulate_workload(
        setup_of(work, parse_size("--window", options["window"]), in_place_from, links), work.placements
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def _headline(options: dict[str, Any], setup: Setup, experts: str) -> str:
    loads = (
        f"loads of {options['loads'].name}"
        if options["loads"]
        else f"{options['trace']} loads, drift {options['drift']:g}"
    )
    return (
        f"{setup.num_layers} layers of {experts} in {setup.num_slots} slots, {setup.num_ranks} ranks on "
        f"{setup.num_nodes} {'node' if setup.num_nodes == 1 else 'nodes'}, {loads}"
    )


def _means(rows: Sequence[Rebalance]) -> dict[str, float]:
    count = max(len(rows), 1)
    keys = ("imbalance_kept", "imbalance", "slots_anew", "policy_s", "planning_s")
    costs = ("bytes_moved", "bytes_between_nodes", "rank_bytes_max", "steps", "messages", "seconds")
    means = {key: sum(getattr(row, key) for row in rows) / count for key in keys}
    means |= {key: sum(getattr(row.cost, key) for row in rows) / count for key in costs}
    worst = {"imbalance_worst": max((row.imbalance_worst for row in rows), default=1.0)}
    return {**means, **worst, "staging_bytes_max": max((row.cost.staging_bytes_max for row in rows), default=0)}


def _print_run(rows: Sequence[Rebalance], console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("rebalance", "kept", "after", "slots anew", "between ranks", "busiest rank", "steps", "time", "plan"):
        table.add_column(title, justify="left" if title == "plan" else "right")
    for number, row in enumerate(rows[:_MOST_ROWS], 1):
        table.add_row(
            str(number),
            f"{row.imbalance_kept:.3f}",
            f"{row.imbalance:.3f}",
            f"{100 * row.slots_anew:.1f} %",
            f"{row.cost.bytes_moved / 1e9:.2f} GB",
            f"{row.cost.rank_bytes_max / 1e9:.2f} GB",
            str(row.cost.steps),
            f"{row.cost.seconds * 1e3:.1f} ms",
            row.plan,
        )
    console.print(table)
    if len(rows) > _MOST_ROWS:
        console.print(f"and {len(rows) - _MOST_ROWS} more; --json has all", markup=False)


def _print_summary(runs: dict[str, list[Rebalance]], console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("mean of all rebalances")
    for title in (
        "imbalance",
        "worst",
        "slots anew",
        "between ranks",
        "between nodes",
        "busiest rank",
        "time",
        "policy",
    ):
        table.add_column(title, justify="right")
    for name, rows in runs.items():
        mean = _means(rows)
        table.add_row(
            name,
            f"{mean['imbalance']:.3f}",
            f"{mean['imbalance_worst']:.3f}",
            f"{100 * mean['slots_anew']:.1f} %",
            f"{mean['bytes_moved'] / 1e9:.2f} GB",
            f"{mean['bytes_between_nodes'] / 1e9:.2f} GB",
            f"{mean['rank_bytes_max'] / 1e9:.2f} GB",
            f"{mean['seconds'] * 1e3:.1f} ms",
            f"{mean['policy_s'] + mean['planning_s']:.2f} s",
        )
    console.print(table)


def _print_costs(costs: Sequence[Cost], console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("step", "experts", "bytes", "bounded steps", "staging", "time"):
        table.add_column(title, justify="right")
    for number, cost in enumerate(costs[:_MOST_ROWS], 1):
        table.add_row(
            str(number),
            f"{cost.experts_moved:,}",
            f"{cost.bytes_moved:,}",
            str(cost.steps),
            f"{cost.staging_bytes_max / 2**20:.1f} MiB",
            f"{cost.seconds * 1e3:.1f} ms",
        )
    console.print(table)
