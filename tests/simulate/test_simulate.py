"""A simulation counts what a real run moves, and its seconds are those of the links that it is given."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from eplb_core.bench.workload import make_workload
from eplb_core.cli import main
from eplb_core.contract.option_types import ByteSize, Duration
from eplb_core.control.call import Calls
from eplb_core.control.commit_record import CommitRecord
from eplb_core.control.groups import StatelessGroup
from eplb_core.control.journal_record import JournalRecord
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.planning.placement import imbalance
from eplb_core.planning.plan import plan_rearrangement
from eplb_core.rearrange.rearranger import Rearranger
from eplb_core.scheduling.schedule import schedule_steps
from eplb_core.simulate.compared import KeepPolicy, OneMovePerPairPolicy, contestants
from eplb_core.simulate.cost import Links, cost_of
from eplb_core.simulate.trace import cut_trace, make_trace
from eplb_core.testing import in_process


def eplb(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def save(path: Path, **sizes: float) -> Path:
    work = make_workload(**sizes)
    np.savez(path, placements=work.placements, tensor_bytes=np.array(work.tensor_bytes), ranks=np.array(work.num_ranks))
    return path


@pytest.mark.parametrize("ranks", [2, 3])
def test_experts_bytes_and_steps_are_exactly_those_of_a_real_run(tmp_path: Path, ranks: int) -> None:
    path = save(tmp_path / "w.npz", ranks=ranks, layers=3, slots=6, redundant=3, expert_bytes=1 << 16, steps=3)
    real, simulated = tmp_path / "real.json", tmp_path / "simulated.json"
    window, in_place = f"{4 << 16}B", "none"  # four experts, so that there are several bounded steps; gloo stages all
    found = eplb("bench", "--workload", path, "--backend", "torch_gloo", "--window", window, "--json", real)
    assert found.exit_code == 0, found.output
    found = eplb("simulate", "--workload", path, "--window", window, "--in-place-from", in_place, "--json", simulated)
    assert found.exit_code == 0, found.output
    bench, steps = json.loads(real.read_text()), json.loads(simulated.read_text())["steps"]
    assert bench["correct"]
    assert [step["experts_moved"] for step in steps] == bench["experts_moved"]
    assert [step["steps"] for step in steps] == bench["bounded_steps"]
    assert max(bench["bounded_steps"]) > 1
    assert sum(step["bytes_moved"] for step in steps) / len(steps) == bench["bytes_moved"]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_control_messages_are_exactly_those_of_a_real_run(ranks: int) -> None:
    work = make_workload(ranks=ranks, layers=5, slots=6, redundant=3, expert_bytes=1 << 16, steps=4)
    window = 4 << 16
    said: dict[int, int] = dict.fromkeys(range(ranks), 0)

    def counted(cls: type, name: str) -> Any:
        function = getattr(cls, name)

        def count(self: Any, *arguments: Any, **more: Any) -> Any:
            said[int(threading.current_thread().name.split()[-1])] += 1
            return function(self, *arguments, **more)

        return mock.patch.object(cls, name, count)

    def serve(group: StatelessGroup) -> list[int]:
        rank = group.rank_in_group
        threading.current_thread().name = f"rank {rank}"
        weights = [
            [torch.zeros(work.slots_per_rank, nbytes, dtype=torch.uint8) for nbytes in work.tensor_bytes]
            for _ in range(work.num_layers)
        ]
        counts = []
        with create_eplb_communicator(group, "in_process", weights[0], registry=in_process.registry()) as communicator:
            rearranger = Rearranger(communicator, weights, window_bytes=window, in_place="never")
            for old, new in itertools.pairwise(work.placements):
                said[rank] = 0
                rearranger.run(old, new)
                counts.append(said[rank])
        return counts

    with counted(Calls, "meet"), counted(CommitRecord, "decide"), counted(JournalRecord, "decide"):
        counts = in_process.run_ranks(ranks, serve)

    nbytes = np.full(work.num_layers, sum(work.tensor_bytes))
    expected = []
    for old, new in itertools.pairwise(work.placements):
        plan = plan_rearrangement(old, new, ranks)
        steps = schedule_steps(plan, nbytes, window_bytes=window)
        expected.append(cost_of(plan, steps, nbytes, Links()).messages)
    assert counts == [expected] * ranks
    assert max(expected) > 3


def test_seconds_are_those_of_the_busiest_link() -> None:
    # Rank 0 receives one expert of 1,000 bytes from rank 2 on the other node, and rank 1 one from rank 0.
    plan = plan_rearrangement([[0, 1, 2, 3]], [[2, 0, 2, 3]], 4, [0, 0, 1, 1])
    steps = schedule_steps(plan, 1000, window_bytes=4096)
    sizes = np.array([1000])
    links = Links(
        rank_rate=ByteSize(10_000),
        node_rate=ByteSize(500),
        copy_rate=ByteSize(1000),
        step=Duration(3),
        start=Duration(4),
    )
    cost = cost_of(plan, steps, sizes, links)
    assert (cost.experts_moved, cost.bytes_moved, cost.bytes_between_nodes, cost.node_bytes_max) == (
        2,
        2000,
        1000,
        1000,
    )
    assert (cost.rank_bytes_max, cost.link_bytes_max, cost.peers_max) == (1000, 1000, 2)
    assert (cost.steps, cost.messages, cost.staging_bytes_max) == (1, 2, 1024)
    assert cost.seconds == pytest.approx(4 + 3 + 1000 / 500 + 1000 / 1000)
    shared = Links(host_rate=ByteSize(100), copy_rate=ByteSize(10**9), step=Duration(0), start=Duration(0))
    assert cost_of(plan, steps, sizes, shared).seconds == pytest.approx((2 * 1000 + 2 * 1000) / 100, rel=1e-3)


def test_nothing_moves_and_nothing_is_paid_if_everything_is_kept() -> None:
    plan = plan_rearrangement([[0, 1]], [[0, 1]], 2)
    cost = cost_of(plan, schedule_steps(plan, 10, window_bytes=256), np.array([10]), Links())
    assert (cost.bytes_moved, cost.steps, cost.seconds) == (0, 0, 0.0)


def test_made_up_loads_drift_by_the_share_that_is_asked_for() -> None:
    trace = list(make_trace(kind="lognormal", layers=4, experts=256, intervals=30, drift=0.2, tokens=None, seed=0))
    change = np.diff(np.log([interval.true for interval in trace]), axis=0)
    assert 0.18 < change.std() < 0.22
    spread = np.log([interval.true for interval in trace]).std(axis=2)
    assert 0.85 < spread.min() < spread.max() < 1.15


def test_counts_are_whole_and_as_many_as_tokens() -> None:
    interval = next(make_trace(kind="zipf", layers=2, experts=64, intervals=1, drift=0.2, tokens=1000, seed=0))
    assert (interval.seen == np.round(interval.seen)).all()
    assert interval.seen.mean() == pytest.approx(1000, rel=0.02)


def test_a_recording_is_cut_and_judged_by_what_follows() -> None:
    window = np.arange(1.0, 9).reshape(4, 1, 2)
    first, last = cut_trace(window, 2)
    assert first.seen.tolist() == window[:2].tolist()
    assert first.true.tolist() == [[5 + 7, 6 + 8]]
    assert last.true.tolist() == [[5 + 7, 6 + 8]]


def test_no_pair_of_ranks_swaps_more_than_once() -> None:
    random = np.random.default_rng(0)
    old = np.tile(np.arange(32), (5, 1))
    loads = random.lognormal(0, 1, (5, 32))
    new = OneMovePerPairPolicy().rebalance(loads, num_slots=32, num_ranks=4, old=old)
    assert (imbalance(new, loads, 4) <= imbalance(old, loads, 4)).all()
    for row in new:
        home, now = np.arange(32) // 8, np.argsort(row) // 8  # without redundancy: where each expert was, and is
        moved = home != now
        assert moved.sum() <= 2 * 6  # six pairs


def test_every_contestant_plays_the_same_trace(tmp_path: Path) -> None:
    document, plot = tmp_path / "all.json", tmp_path / "all.png"
    found = eplb(
        "simulate", "--compare", "--model", "qwen3-30b-a3b", "--layers", 2, "--ranks", 8, "--redundant", 16,
        "--rebalances", 2, "--json", document, "--plot", plot,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    summary = json.loads(document.read_text())["summary"]
    assert list(summary) == [contestant.name for contestant in contestants()]
    assert (summary["keep"]["slots_anew"], summary["keep"]["bytes_moved"]) == (0.0, 0.0)
    fresh, ours = summary["fresh (deepseek, as planned)"], summary["incremental"]
    assert ours["imbalance"] <= fresh["imbalance"]
    assert ours["bytes_moved"] < fresh["bytes_moved"] / 4
    assert summary["fresh, ranks relabelled"]["imbalance"] == pytest.approx(fresh["imbalance"])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_recorded_trace_is_simulated_and_the_plan_is_named(tmp_path: Path) -> None:
    loads = tmp_path / "loads.npy"
    np.save(loads, np.random.default_rng(1).integers(1, 100, (6, 2, 16)))
    found = eplb("simulate", "--loads", loads, "--interval", 2, "--ranks", 4, "--redundant", 4, "--policy", "deepseek")
    assert found.exit_code == 0, found.output
    assert "2 layers of 16 experts" in found.output
    assert found.output.count(" global") == 2


def test_keeping_needs_something_to_keep() -> None:
    with pytest.raises(Exception, match="no placement to keep"):
        KeepPolicy().rebalance([[1]], num_slots=1, num_ranks=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ranks", "7"), "288 slots cannot be shared evenly by 7 ranks"),
        (("--nodes", "3"), "8 ranks cannot be shared evenly by 3 nodes"),
        (("--links", "rank_rat=1GB"), "has no option 'rank_rat', did you mean 'rank_rate'"),
        (("--window", "3"), "--window cannot be '3'"),
        (("--compare", "--policy", "deepseek"), "--compare and --policy were given"),
        (("--policy", "nonsense"), "no installed distribution registers a policy 'nonsense'"),
    ],
)
def test_what_cannot_be_simulated_is_refused(options: tuple[str, ...], message: str) -> None:
    found = eplb("simulate", *options)
    assert found.exit_code == 2
    assert message in found.stderr
