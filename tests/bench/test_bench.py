"""`eplb bench` measures what users get, counts what really had to move, and sees every byte that is wrong."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from eplb_core.bench.pattern import fill, find_wrong
from eplb_core.bench.rank import BenchRun, RankMeasurement
from eplb_core.bench.run import make_document
from eplb_core.bench.summary import summarize
from eplb_core.bench.workload import Workload, make_workload, read_workload
from eplb_core.cli import main
from eplb_core.errors import EplbError, InputError
from eplb_core.transport.pattern import Pattern
from tests.support.fake_distributions import install, run_child, spec_source

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
SMALL = {"layers": 2, "slots": 4, "redundant": 2, "expert_bytes": 12_000, "steps": 3}
CPU = torch.device("cpu")


def nothing(done: int, total: int) -> None:
    """A progress function for tests that do not look at it."""


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_workload", SCRIPTS / "make_workload.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arrays_of(work: Workload) -> dict[str, NDArray[np.int64]]:
    return {
        "placements": work.placements,
        "tensor_bytes": np.array(work.tensor_bytes),
        "ranks": np.array(work.num_ranks),
    }


def save(path: Path, **arrays: Any) -> Path:
    """Write a workload of 2 ranks with 2 slots each, or what `arrays` make of it."""
    whole = {"placements": [[[0, 1, 2, 0]], [[2, 1, 0, 1]]], "tensor_bytes": [1000, 7], "ranks": 2} | arrays
    np.savez(path, **{name: np.array(array) for name, array in whole.items() if array is not None})
    return path


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *(str(argument) for argument in arguments)])


# --- the workload ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ranks": 4, "seed": 7},
        {"ranks": 3, "slots": 5, "redundant": 0, "churn": 0.2, "steps": 9, "expert_bytes": 1_000_001},
        {"ranks": 1, "layers": 1, "slots": 2, "redundant": 1, "churn": 0.01, "expert_bytes": 384},
        {"ranks": 4, "layers": 8, "slots": 16, "redundant": 8, "expert_bytes": 44_040_192},
        {"swaps": 0},
        {"ranks": 3, "layers": 7, "swaps": 3, "seed": 5},
        {"ranks": 2, "layers": 2, "slots": 8, "redundant": 3, "swaps": 7},
    ],
)
def test_the_script_and_the_command_make_the_same_workload_bit_for_bit(options: dict[str, Any]) -> None:
    module = script()
    written = module.make(**{**module.DEFAULTS, "churn": 1.0, **options})
    made = arrays_of(make_workload(**options))
    assert list(made) == list(written)
    for name, array in made.items():
        np.testing.assert_array_equal(array, written[name], strict=True)


def test_every_placement_holds_every_expert() -> None:
    work = make_workload(ranks=3, slots=4, redundant=5, churn=0.5, steps=5)
    for row in work.placements.reshape(-1, 12):
        assert set(row.tolist()) == set(range(7))


def test_no_swaps_move_nothing() -> None:
    work = make_workload(swaps=0, steps=3)
    assert (work.placements == work.placements[0]).all()
    assert work.arriving_bytes() == 0


@pytest.mark.parametrize(("swaps", "layers"), [(1, 5), (4, 5), (5, 5), (12, 5)])
def test_a_swap_brings_two_ranks_an_expert_each_and_layers_share_them_evenly(swaps: int, layers: int) -> None:
    ranks, slots = 3, 8
    work = make_workload(ranks=ranks, layers=layers, slots=slots, redundant=3, swaps=swaps, steps=4)
    assert work.arriving_bytes() == 2 * swaps * work.expert_bytes
    for old, new in itertools.pairwise(work.placements):
        changed = (old != new).sum(axis=1)
        assert changed.sum() == 2 * swaps
        assert changed.max() - changed.min() <= 2
        # The same experts as often as before, so every one is still there.
        np.testing.assert_array_equal(np.sort(old, axis=1), np.sort(new, axis=1))
    # They are not the same slots in every step.
    assert len({tuple(map(tuple, np.argwhere(a != b))) for a, b in itertools.pairwise(work.placements)}) == 4


def test_only_experts_that_a_rank_did_not_hold_count_as_moved() -> None:
    # Rank 0 had {0, 1} and gets 2; rank 1 had {2, 0}, gets 1, and the empty slot counts for nothing.
    first = Workload(np.array([[[0, 1, 2, 0]], [[2, 1, -1, 1]]]), (100, 11), 2)
    assert first.arriving_bytes() == 2 * 111
    # A second step in which nothing moves halves the mean.
    second = Workload(np.array([[[0, 1, 2, 0]], [[2, 1, -1, 1]], [[1, 2, 1, -1]]]), (100, 11), 2)
    assert second.arriving_bytes() == 111


def test_a_workload_is_read_back_from_its_file(tmp_path: Path) -> None:
    made = make_workload(**SMALL)
    path = tmp_path / "w.npz"
    np.savez(path, **arrays_of(made))
    found = read_workload(path)
    np.testing.assert_array_equal(found.placements, made.placements, strict=True)
    assert (found.tensor_bytes, found.num_ranks) == (made.tensor_bytes, made.num_ranks)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ranks": None}, "lacks an array"),
        ({"ranks": 0}, "'ranks' must be one number"),
        ({"ranks": [2, 2]}, "'ranks' must be one number"),
        ({"ranks": 3}, "step 0 is not valid"),
        ({"tensor_bytes": []}, "'tensor_bytes'"),
        ({"tensor_bytes": [4, 0]}, "'tensor_bytes'"),
        ({"tensor_bytes": [4.5]}, "whole numbers"),
        ({"placements": [[[0, 1, 2, 0]]]}, "with at least one step"),
        ({"placements": [[0, 1, 2, 0]]}, "with at least one step"),
        ({"placements": [[[0, 1, 2, 0]], [[3, 1, 2, 0]]]}, "step 0 is not valid"),
    ],
)
def test_a_file_that_is_no_workload_says_which_array_is_wrong(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    with pytest.raises(EplbError, match=message):
        read_workload(save(tmp_path / "w.npz", **arrays))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x93NUMPY"])
def test_a_file_that_is_no_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"not an \.npz"):
        read_workload(path)


# --- the bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [(6, 2, 1), (5, 3, 1), (5, 2, 0)])
def test_the_bytes_of_two_tensors_agree_only_by_chance(other: tuple[int, int, int]) -> None:
    pattern = Pattern(4096, CPU)
    same = (pattern.row(4096, 5, 2, 1) == pattern.row(4096, *other)).sum()
    assert same < 64  # 16 on average for random bytes


@pytest.mark.parametrize("shift", [1, 4, 8, 16, 64, 256, 1024])
def test_shifted_bytes_agree_only_by_chance(shift: int) -> None:
    row = Pattern(4096, CPU).row(4096, 5, 2, 1)
    assert (row[shift:] == row[:-shift]).sum() < 64


def filled(held: NDArray[np.int64]) -> list[list[torch.Tensor]]:
    """Return one layer of two tensors, of 1001 and 7 bytes a slot."""
    weights = [[torch.full((held.shape[1], nbytes), 0xEE, dtype=torch.uint8) for nbytes in (1001, 7)]]
    fill(weights, held, Pattern(1001, CPU), nothing)
    return weights


HELD = np.array([[3, 0, -1, 3]])


def test_filled_slots_are_found_right() -> None:
    assert find_wrong(filled(HELD), HELD, Pattern(1001, CPU), nothing) == []


@pytest.mark.parametrize("byte", [0, 500, 1000])
def test_one_flipped_byte_is_found(byte: int) -> None:
    weights = filled(HELD)
    weights[0][0][1, byte] ^= 1
    assert find_wrong(weights, HELD, Pattern(1001, CPU), nothing) == [(0, 1, 0)]


def test_what_an_empty_slot_holds_does_not_matter() -> None:
    weights = filled(HELD)
    weights[0][0][2].fill_(0x55)
    assert find_wrong(weights, HELD, Pattern(1001, CPU), nothing) == []


def test_an_expert_that_should_have_moved_is_found_in_each_of_its_tensors() -> None:
    wanted = np.array([[3, 3, -1, 3]])
    assert find_wrong(filled(HELD), wanted, Pattern(1001, CPU), nothing) == [(0, 1, 0), (0, 1, 1)]


# --- the command -----------------------------------------------------------------------------------------------------


def test_one_backend_writes_the_documented_fields(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    workload = save(
        tmp_path / "w.npz",
        placements=[[[0, 1, 2, 0]], [[2, 1, 0, 1]], [[0, 1, 2, 1]]],
        tensor_bytes=[100_000, 1001],
    )
    result = bench("--workload", workload, "--backend", "torch_gloo?timeout=40s", "--json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert {key: found[key] for key in ("backend", "device", "ranks", "layers", "correct", "wrong_tensors")} == {
        "backend": "torch_gloo?timeout=40s",
        "device": "cpu",
        "ranks": 2,
        "layers": 1,
        "correct": True,
        "wrong_tensors": 0,
    }
    # Step 0 brings 2 to rank 0 and 1 to rank 1; step 1 brings 0 to rank 0 and 2 to rank 1.
    assert found["bytes_moved"] == 2 * 101_001
    first, last = found["seconds"]
    assert (found["seconds_first"], found["seconds_median"]) == (first, last)
    assert found["seconds_min"] == min(first, last)
    assert math.isclose(found["gb_per_s"], 2 * 101_001 / last / 1e9)
    assert 0 < found["staging_bytes_max"] <= 256 * 2**20
    assert list(found["phases"]) == ["plan", "pack", "wait", "commit"]
    assert math.isclose(sum(found["phases"].values()), sum(found["phases_in_detail"].values()))
    assert all(seconds >= 0 for seconds in found["phases"].values())
    assert {rank: set(peers) for rank, peers in found["paths"].items()} == {"0": {"1"}, "1": {"0"}}


@pytest.mark.parametrize("swaps", [0, 3])
def test_steps_that_swap_a_few_experts_end_where_they_should(swaps: int, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sizes = ["--layers", 5, "--slots", 4, "--redundant", 1, "--expert-bytes", "12kB", "--steps", 4, "--swaps", swaps]
    result = bench(*sizes, "--backend", "torch_gloo", "--json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["correct"] is True
    assert found["bytes_moved"] == 2 * swaps * found["expert_bytes"]
    assert (found["gb_per_s"] > 0) == (swaps > 0)


def test_a_step_takes_as_long_as_on_the_slowest_rank() -> None:
    def rank(seconds: list[float]) -> RankMeasurement:
        return RankMeasurement(
            seconds=seconds,
            phases=[{}] * len(seconds),
            experts_moved=[7, 7, 7],
            bounded_steps=[1, 1, 1],
            paths={},
            staging_bytes=0,
            window_bytes=1 << 20,
            wrong_tensors=0,
            placements_reached=True,
            config="",
            device="cpu",
            device_name="cpu",
        )

    job = BenchRun(workload=make_workload(**SMALL), backend="torch_gloo")
    document = make_document(job, [rank([9.0, 1.0, 4.0]), rank([8.0, 3.0, 2.0])])
    assert document["seconds"] == [9.0, 3.0, 4.0]
    assert document["seconds_median"] == 3.5


@pytest.mark.parametrize("config", ["nixl", "nixl?mode=packed"])
def test_nixl_moves_every_byte_right_in_a_small_window(config: str, tmp_path: Path) -> None:
    pytest.importorskip("nixl", reason="the nixl extra is not installed")
    out = tmp_path / "out.json"
    sizes = ["--layers", 3, "--slots", 4, "--redundant", 3, "--expert-bytes", "64KiB", "--steps", 3]
    result = bench("--ranks", 3, *sizes, "--backend", config, "--window", "200kB", "--json", out)
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["correct"] is True


FAKE_BACKENDS = """
    import torch

    from eplb_backends.torch_gloo import communicator
    from eplb_backends.torch_gloo.options import GlooOptions


    class Corrupting(communicator.GlooCommunicator):
        def move(self, sends, recvs):
            stats = super().move(sends, recvs)
            *_, last = [payload.tensor for payloads in recvs.values() for payload in payloads]
            last[-1] ^= 1
            return stats


    def corrupting(context, options, expert_weights):
        return Corrupting(context, GlooOptions(), context.cpu_group)


    def failing(context, options, expert_weights):
        raise OSError("the cable is out")
"""


def test_wrong_bytes_and_a_failing_backend_are_reported_and_the_others_still_run(tmp_path: Path) -> None:
    for name in ("corrupting", "failing"):
        module = f"{name}_spec"
        install(
            tmp_path,
            f"{name}-eplb",
            backends={name: f"{module}:BACKEND"},
            modules={module: spec_source(name, factory=f"bench_fakes:{name}"), "bench_fakes": FAKE_BACKENDS},
        )
    out = tmp_path / "out.json"
    workload = save(tmp_path / "w.npz")
    names = ("failing", "corrupting", "torch_gloo")
    options = [part for name in names for part in ("--backend", name)]
    done = run_child(
        ["-m", "eplb_core", "bench", "--workload", str(workload), *options, "--json", str(out)], path=[tmp_path]
    )
    assert done.returncode == 1, done.stderr
    failing, corrupting, gloo = json.loads(out.read_text())["runs"]
    assert "the cable is out" in failing["error"]
    assert corrupting["correct"] is False
    assert corrupting["wrong_tensors"] == len(corrupting["examples"]) == 2  # one on each rank
    assert gloo["correct"] is True
    assert "rank 0, layer 0, slot 0, tensor 1: not the bytes of expert 2" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "missing.npz"], "No such file"),
        (["--workload", "missing.npz", "--ranks", 4, "--expert-bytes", 9000], "--ranks, --expert-bytes"),
        (["--ranks", 0], "--ranks is 0"),
        (["--layers", 0], "--layers is 0"),
        (["--ranks", 1, "--slots", 1, "--redundant", 0], "nothing to rearrange"),
        (["--redundant", 32], "--redundant is 32"),
        (["--churn", 0], "--churn is 0"),
        (["--churn", "nan"], "--churn is nan"),
        (["--seed", -1], "--seed is -1"),
        (["--swaps", -1], "--swaps is -1"),
        (["--swaps", 1, "--churn", 0.5], "--swaps and --churn"),
        (["--swaps", 65], "more than the slots leave room for"),
        (["--ranks", 1, "--swaps", 1], "more than the slots leave room for"),
        (["--workload", "missing.npz", "--swaps", 0], "--workload and --swaps"),
        (["--expert-bytes", 100], "--expert-bytes is 100"),
        (["--expert-bytes", "3XB"], "no unit 'XB'"),
        (["--window", "1KiB"], "smaller than one expert"),
        (["--backend", "nixel"], "no backend 'nixel'"),
        (["--backend", "torch_gloo?windw=3"], "windw"),
        (["--timeout", 0], "--timeout is 0"),
        (["--rounds", 0], "--rounds"),
        (["--json", "no/such/folder/out.json"], "directory for --json"),
        (["--layers", 4096, "--expert-bytes", "1GiB"], "of memory"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments: list[object], message: str) -> None:
    result = bench("--backend", "torch_gloo", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.lower().startswith("error")]) == 1
    assert "Traceback" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_refused() -> None:
    result = bench("--device", "cuda")
    assert result.exit_code == 2
    assert "no CUDA device" in result.stderr


# --- several backends ------------------------------------------------------------------------------------------------


def run_of(backend: str, median: float, correct: bool = True) -> dict[str, Any]:
    return {
        "backend": backend,
        "seconds_median": median,
        "seconds_min": median / 2,
        "seconds_first": 2 * median,
        "bytes_moved": 6e9,
        "staging_bytes_max": int(median),
        "correct": correct,
    }


def test_the_summary_compares_medians_over_rounds_with_the_first_backend() -> None:
    runs = [run_of("a", 2.0), run_of("b", 1.0), run_of("a", 9.0), run_of("b", 8.0), run_of("a", 3.0), run_of("b", 1.5)]
    first, second = summarize(["a", "b"], runs)
    assert (first["seconds_median"], second["seconds_median"]) == (3.0, 1.5)
    assert (first["times_as_fast"], second["times_as_fast"]) == (1.0, 2.0)
    assert (first["gb_per_s"], second["gb_per_s"]) == (2.0, 4.0)
    assert (first["seconds_min"], first["rounds"], first["failed"]) == (1.0, 3, 0)
    assert first["correct"]
    assert second["correct"]


def test_one_wrong_or_failed_round_makes_a_backend_wrong() -> None:
    runs = [run_of("a", 1.0), run_of("b", 1.0, correct=False), {"backend": "c", "error": "lost"}]
    rows = summarize(["a", "b", "c"], runs)
    assert [row["correct"] for row in rows] == [True, False, False]
    assert [row["failed"] for row in rows] == [0, 0, 1]


def test_the_gpu_script_goes_on_after_a_failure_and_keeps_every_run(tmp_path: Path) -> None:
    settings = {"DEVICE": "cpu", "RANKS": "2", "SIZES": "tiny:1:4:2:4096", "BACKENDS": "no_such torch_gloo"}
    done = run_child([str(SCRIPTS / "gpu.py")], cwd=tmp_path, environment={**settings, "OUT": "out", "SLOW_STEPS": "2"})
    assert done.returncode == 1, done.stderr
    _, missing, gloo = done.stdout.splitlines()
    assert "FAILED" in missing
    assert "there is no backend 'no_such'" in missing
    assert gloo.endswith("right")
    found = {path.name: json.loads(path.read_text())["correct"] for path in (tmp_path / "out").iterdir()}
    assert found == {"tiny-2ranks-eplb-no-such-0.json": False, "tiny-2ranks-eplb-torch-gloo-0.json": True}
