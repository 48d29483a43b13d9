"""Links that are learned from real runs predict the time of others."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from eplb_core.bench.workload import make_workload
from eplb_core.cli import main
from eplb_core.contract.option_types import ByteSize, Duration
from eplb_core.errors import InputError
from eplb_core.simulate.calibrate import MeasuredRun, calibrate
from eplb_core.simulate.cost import Links, cost_of
from eplb_core.simulate.run import Setup, planned

ROOT = Path(__file__).parents[2]
CORES = Links(
    rank_rate=ByteSize(2**62),
    host_rate=ByteSize(3 * 10**9),
    copy_rate=ByteSize(9 * 10**9),
    step=Duration(0.002),
    start=Duration(0.004),
)
WIRES = Links(rank_rate=ByteSize(10**9), copy_rate=ByteSize(5 * 10**9), step=Duration(0.001), start=Duration(0.003))


def eplb(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_of(links: Links, churn: float, window: int, seed: int, steps: int = 4) -> MeasuredRun:
    """A run whose times are exactly those of the links, but for the first, which takes ten times as long."""
    work = make_workload(
        ranks=3, layers=4, slots=8, redundant=4, expert_bytes=1 << 16, churn=churn, seed=seed, steps=steps
    )
    setup = Setup(
        num_ranks=3,
        num_nodes=1,
        num_slots=24,
        num_groups=1,
        tensor_bytes=work.tensor_bytes,
        num_layers=4,
        window_bytes=window,
        in_place_from=None,
        links=links,
    )
    schedules = [planned(setup, old, new) for old, new in itertools.pairwise(work.placements)]
    seconds = [cost_of(plan, cut, setup.expert_bytes, links).seconds for plan, cut in schedules]
    return MeasuredRun(
        setup=setup,
        placements=work.placements,
        seconds=[10 * seconds[0], *seconds[1:]],
        bounded_steps=[len(cut) for _, cut in schedules],
    )


def several(links: Links) -> list[MeasuredRun]:
    sizes = [(1.0, 3 << 16), (1.0, 1 << 22), (0.3, 1 << 22), (0.2, 3 << 16)]
    return [run_of(links, churn, window, seed) for seed, (churn, window) in enumerate(sizes)]


@pytest.mark.parametrize("links", [CORES, WIRES], ids=["one memory", "a link for each rank"])
def test_links_that_made_the_times_predict_other_runs(links: Links) -> None:
    found = calibrate(several(links))
    assert found.off < 0.001
    other = run_of(links, 0.6, 5 << 16, seed=9)
    for (old, new), seconds in list(zip(itertools.pairwise(other.placements), other.seconds, strict=True))[1:]:
        plan, steps = planned(other.setup, old, new)
        assert cost_of(plan, steps, other.setup.expert_bytes, found.links).seconds == pytest.approx(seconds, rel=0.02)


def test_one_disturbed_rearrangement_changes_little() -> None:
    runs = several(CORES)
    disturbed = replace(runs[1], seconds=[*runs[1].seconds[:-1], 20 * runs[1].seconds[-1]])
    links = calibrate([runs[0], disturbed, *runs[2:]]).links
    assert links.host_rate == pytest.approx(CORES.host_rate, rel=0.1)
    assert links.step == pytest.approx(CORES.step, rel=0.1)


def test_the_option_that_is_printed_gives_the_same_links() -> None:
    from eplb_core.cli.simulate import _links

    found = calibrate(several(CORES))
    again, _ = _links(found.option(), ())
    assert again.host_rate == found.links.host_rate
    assert again.step == pytest.approx(found.links.step, abs=1e-7)


def test_runs_with_other_steps_than_their_schedules_are_refused() -> None:
    run = several(CORES)[0]
    with pytest.raises(InputError, match="took other steps"):
        calibrate([replace(run, bounded_steps=[steps + 1 for steps in run.bounded_steps])])


def test_runs_in_which_nothing_moves_are_refused() -> None:
    run = several(CORES)[0]
    still = replace(run, placements=np.repeat(run.placements[:1], 3, axis=0), seconds=[1.0] * 2, bounded_steps=[0] * 2)
    with pytest.raises(InputError, match="nothing to calibrate with"):
        calibrate([still])


def test_a_real_run_calibrates_a_simulation(tmp_path: Path) -> None:
    found = []
    for number, (churn, window) in enumerate([(1, "256KiB"), (1, "4MiB"), (0.3, "1MiB")]):
        found.append(tmp_path / f"{number}.json")
        sizes = ["--layers", 3, "--slots", 6, "--expert-bytes", "64KiB", "--steps", 3, "--churn", churn]
        said = eplb("bench", "--backend", "torch_gloo", *sizes, "--window", window, "--json", found[-1])
        assert said.exit_code == 0, said.output
    calibration = [argument for path in found for argument in ("--calibrate", path)]
    said = eplb("simulate", "--rebalances", 1, "--layers", 2, *calibration, "--json", tmp_path / "simulated.json")
    assert said.exit_code == 0, said.output
    assert "--links 'rank_rate=" in said.output
    document = json.loads((tmp_path / "simulated.json").read_text())
    assert document["calibration"]["links"]["step"] >= 0
    assert document["summary"]["incremental"]["seconds"] > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ("{}", "KeyError: 'workload'"),
        ('{"error": "rank 1 failed"}', "a run in it failed: rank 1 failed"),
        (
            '{"workload": {}, "device": "cpu", "window_bytes": 9, "seconds": [1], "bounded_steps": [1]}',
            "times do not fit",
        ),
    ],
)
def test_what_is_not_a_run_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    said = eplb("simulate", "--calibrate", tmp_path / "run.json")
    assert said.exit_code == 2
    assert message in said.output


def test_links_are_given_or_learned() -> None:
    assert "--links and --calibrate" in eplb("simulate", "--links", "step=1ms", "--calibrate", "x.json").output


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [2, 4])
def test_simulated_seconds_are_within_a_fifth_of_real_ones(ranks: int) -> None:
    script = ROOT / "benchmarks" / "simulated_seconds.py"
    said = subprocess.run(
        [sys.executable, script, "--ranks", str(ranks), "--rounds", "5"], capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stdout + said.stderr
