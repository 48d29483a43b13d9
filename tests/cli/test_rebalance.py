"""`eplb rebalance` moves real weights and proves it, and refuses bad input with one line before any rank starts."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from safetensors.torch import load_file, save_file

import eplb_core
from eplb_core.cli import main
from eplb_core.cli.checkout import with_local_commands
from eplb_core.cli.rebalance.launch import run_local
from eplb_core.cli.rebalance.request import RebalanceRequest, prepare
from eplb_core.errors import InputError
from eplb_core.inputs.make_checkpoint import Style, make_checkpoint
from eplb_core.inputs.placements import read_placement, write_placement
from eplb_core.policies import slots_anew
from eplb_core.policies.base import PlacementDecision, PlacementRequest, decide
from tests.support.programs import run_program
from tests.support.stored import Stored

PUBLISHED = Path(__file__).parents[2] / "examples" / "published-loads.json"
LOADS = np.array(json.loads(PUBLISHED.read_text())["loads"])
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
EXPERT_BYTES = 3 * 8 * 16 * 2  # three bfloat16 projections of 8 x 16
FP8_EXPERT_BYTES = 3 * 8 * 16 + 3 * 4  # the same in float8, with one float32 scale each


def make(folder: Path, style: Style = "mixtral", **numbers: int) -> Path:
    path = folder / f"{style}-checkpoint"
    make_checkpoint(path, style=style, **{"experts": 12, "hidden": 8, "intermediate": 16, **numbers})
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """2 layers of 12 experts, as many as the published loads have."""
    return make(tmp_path)


def eplb(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def rebalance(*arguments: object) -> Result:
    return eplb("rebalance", *arguments)


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def imbalance_by_hand(placement: Sequence[Sequence[int]], num_ranks: int) -> list[float]:
    """Return max / mean of the ranks' loads of each layer, written out for the published loads."""
    result = []
    for layer, row in enumerate(placement):
        per_rank = [0.0] * num_ranks
        for slot, expert in enumerate(row):
            per_rank[slot * num_ranks // len(row)] += float(LOADS[layer][expert]) / list(row).count(expert)
        result.append(max(per_rank) * num_ranks / sum(per_rank))
    return result


# --- what it does ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "expert_bytes", "backend"),
    [("mixtral", EXPERT_BYTES, "torch_gloo"), ("deepseek", FP8_EXPERT_BYTES, "auto")],
)
def test_two_ranks_move_a_checkpoint_and_every_byte_is_compared(
    tmp_path: Path, style: Style, expert_bytes: int, backend: str
) -> None:
    out, document = tmp_path / "new.json", tmp_path / "numbers.json"
    result = rebalance(
        PUBLISHED, "--checkpoint", make(tmp_path, style), "--ranks", 2, "--redundant", 4, "--groups", 1,
        "--backend", backend, "--out", out, "--json", document,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "verified" in result.stdout
    found = json.loads(document.read_text())
    assert found["verified"] is True
    assert (found["checked_slots"], found["checked_bytes"]) == (2 * 16, 2 * 16 * expert_bytes)
    assert found["bytes_remote"] == found["experts_remote"] * expert_bytes > 0
    placement = read_placement(out).tolist()
    assert [set(row) for row in placement] == [set(range(12))] * 2
    assert [layer["imbalance_after"] for layer in found["per_layer"]] == pytest.approx(imbalance_by_hand(placement, 2))
    assert found["imbalance"]["after"]["mean"] < found["imbalance"]["before"]["mean"]


@pytest.mark.parametrize(("ranks", "backend"), [(3, "torch_nccl"), (4, "nixl")])
def test_more_ranks_move_random_weights_of_a_published_shape(tmp_path: Path, ranks: int, backend: str) -> None:
    if backend == "nixl":
        pytest.importorskip("nixl", reason="the extra eplb[nixl] is not installed")
    document = tmp_path / "numbers.json"
    result = rebalance(
        PUBLISHED, "--model", "gpt-oss-120b", "--scale", "1/720", "--ranks", ranks, "--redundant", 12,
        "--backend", backend, "--json", document,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(document.read_text())
    expert_bytes = 8 * (1440 + 90 + 2) + 4 * (1440 + 90 + 2)
    assert (found["backend"], found["ranks"], found["slots"], found["verified"]) == (backend, ranks, 24, True)
    assert found["checked_bytes"] == 2 * 24 * expert_bytes
    traffic = np.array(found["traffic_bytes"])
    assert traffic.shape == (ranks, ranks)
    assert traffic.sum() == found["bytes_remote"]


def test_a_window_of_one_expert_is_enough_and_checksums_are_compared_if_asked(checkpoint: Path, tmp_path: Path) -> None:
    document = tmp_path / "numbers.json"
    result = rebalance(
        PUBLISHED, "--checkpoint", checkpoint, "--ranks", 2, "--redundant", 4, "--backend", "torch_gloo",
        "--window", f"{EXPERT_BYTES}B", "--verify", "full", "--json", document,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search(r"checksums +equal before and after \(full\)", result.stdout)
    found = json.loads(document.read_text())
    assert (found["verify"], found["staging_bytes_max"], found["verified"]) == ("full", EXPERT_BYTES, True)
    assert found["phases"]["verify"] > 0


def test_with_a_pace_it_moves_in_the_background_and_no_faster(tmp_path: Path) -> None:
    document, pace = tmp_path / "numbers.json", 1_000_000
    result = rebalance(
        PUBLISHED, "--model", "gpt-oss-120b", "--scale", "1/240", "--ranks", 2, "--redundant", 4,
        "--backend", "torch_gloo", "--pace", "1MB/s", "--verify", "sample", "--json", document,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search(r"pace +in the background, 1.00 MB/s into a rank at most", result.stdout)
    found = json.loads(document.read_text())
    assert (found["pace_bytes_per_s"], found["verify"], found["verified"]) == (pace, "sample", True)
    incoming = np.array(found["traffic_bytes"]).sum(axis=0).max()
    one_burst = 64 << 10  # goes at once
    assert found["seconds"] > (incoming - one_burst) / pace - 0.02 > 0.1


@pytest.mark.parametrize("on_a_terminal", [True, False])
def test_a_bar_shows_the_bytes_that_have_moved_where_there_is_a_terminal(checkpoint: Path, on_a_terminal: bool) -> None:
    screen = io.StringIO()
    job = prepare(RebalanceRequest(loads=PUBLISHED, checkpoint=checkpoint, ranks=2, redundant=4, backend="torch_gloo"))
    results = run_local(job, Console(file=screen, force_terminal=on_a_terminal, width=120, color_system=None))
    assert [result.wrong_slots for result in results] == [0, 0]
    moved = int(job.plan().traffic(np.array(job.expert_bytes)).sum())
    shown = rf"move experts .*{moved / 1000:.1f}/{moved / 1000:.1f} kB"
    assert bool(re.search(shown, screen.getvalue())) == on_a_terminal
    assert bool(screen.getvalue()) == on_a_terminal


def test_only_the_chosen_layers_take_part(checkpoint: Path, tmp_path: Path) -> None:
    document = tmp_path / "numbers.json"
    result = rebalance(
        PUBLISHED, "--checkpoint", checkpoint, "--ranks", 2, "--layers", "1:2", "--backend", "torch_gloo",
        "--json", document,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(document.read_text())
    assert [layer["layer"] for layer in found["per_layer"]] == [1]
    assert found["checked_slots"] == 12


def test_a_placement_with_empty_slots_can_be_the_start(checkpoint: Path, tmp_path: Path) -> None:
    document = tmp_path / "numbers.json"
    start = [[*range(6), -1, -1, *range(6, 12), -1, 0], [*range(11, 3, -1), *range(4), -1, -1, -1, -1]]
    result = rebalance(
        PUBLISHED, "--checkpoint", checkpoint, "--ranks", 2, "--placement", write(tmp_path / "start.json", start),
        "--backend", "torch_gloo", "--json", document,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(document.read_text())["checked_slots"] == 2 * 16


def test_starting_from_its_own_result_moves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.npz"
    job = prepare(RebalanceRequest(loads=PUBLISHED, checkpoint=checkpoint, ranks=2, redundant=4))
    write_placement(start, job.new, num_ranks=2)
    result = rebalance(
        PUBLISHED, "--checkpoint", checkpoint, "--ranks", 2, "--placement", start, "--backend", "torch_gloo",
        "--json", "-",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["experts_remote"], found["experts_local"], found["gb_per_s"]) == (0, 0, 0.0)
    assert (found["checked_slots"], found["verified"]) == (2 * 16, True)


def flip_a_bit(directory: Path, name: str) -> None:
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].view(torch.uint8).flatten()[0] ^= 1
            save_file(tensors, path)


def test_one_wrong_bit_is_not_verified(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    flip_a_bit(other, "model.layers.1.block_sparse_moe.experts.7.w2.weight")
    out, document = tmp_path / "new.json", tmp_path / "numbers.json"
    result = rebalance(
        PUBLISHED, "--checkpoint", checkpoint, "--verify-against", other, "--ranks", 2, "--redundant", 4,
        "--backend", "torch_gloo", "--json", document, "--out", out,
    )  # fmt: skip
    assert result.exit_code == 1
    found = json.loads(document.read_text())
    assert found["verified"] is False
    assert found["wrong_slots"] >= 1
    assert all("layer 1" in problem and "w2 is not that of expert 7" in problem for problem in found["problems"])
    assert "w2 is not that of expert 7" in result.stdout
    assert not out.exists()


def test_an_equal_copy_verifies_and_the_plot_is_a_png(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra eplb[plot] is not installed")
    plot, copy = tmp_path / "plot.png", tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    result = rebalance(
        PUBLISHED, "--checkpoint", checkpoint, "--verify-against", copy, "--ranks", 2, "--backend", "torch_gloo",
        "--plot", plot,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_ranks_that_do_not_end_in_time_are_a_failure_of_one_line(checkpoint: Path) -> None:
    result = rebalance(PUBLISHED, "--checkpoint", checkpoint, "--ranks", 2, "--timeout", 0.01)
    assert result.exit_code == 1
    assert_one_line(result, "did not end within 0.01 s")


def test_from_a_placement_on_the_incremental_policy_is_the_default_and_the_report_says_what_ran(
    checkpoint: Path, tmp_path: Path
) -> None:
    start, document = tmp_path / "start.json", tmp_path / "numbers.json"
    request = RebalanceRequest(loads=PUBLISHED, checkpoint=checkpoint, ranks=4, redundant=4)
    write_placement(start, prepare(request).new, num_ranks=4)
    later = write(tmp_path / "later.json", (LOADS * np.linspace(0.7, 1.3, 12)).tolist())
    result = rebalance(
        later, "--checkpoint", checkpoint, "--placement", start, "--backend", "torch_gloo", "--json", document
    )
    assert result.exit_code == 0, result.output
    found = json.loads(document.read_text())
    assert found["policy"] == "incremental"
    assert {layer["plan"] for layer in found["per_layer"]} <= {"incremental", "kept", "fresh relabelled"}
    assert re.search(r"plan +" + re.escape(found["plan"]), result.stdout)
    fresh = prepare(RebalanceRequest(loads=later, checkpoint=checkpoint, placement=start, policy="deepseek"))
    assert found["experts_remote"] < fresh.plan().num_transfers


def test_less_moves_if_ranks_are_relabelled_and_slots_kept(checkpoint: Path) -> None:
    request = RebalanceRequest(loads=PUBLISHED, checkpoint=checkpoint, ranks=4, nodes=2, groups=4, redundant=4)
    kept, planned = prepare(request), prepare(replace(request, as_planned=True))
    assert kept.plan().num_moves < planned.plan().num_moves
    assert kept.plan().num_moves == slots_anew(kept.old, kept.new, 4).sum()  # nothing moves inside a rank
    assert kept.plans == planned.plans == ("hierarchical", "hierarchical")


def test_a_plan_that_ignores_nodes_says_so(checkpoint: Path) -> None:
    job = prepare(RebalanceRequest(loads=PUBLISHED, checkpoint=checkpoint, ranks=4, nodes=2, groups=3, redundant=4))
    assert job.plans == ("global", "global")
    assert job.notes == ("3 groups cannot be shared evenly by 2 nodes, so the plan ignores nodes",)


def test_options_of_a_policy_are_given_as_a_config_string(checkpoint: Path) -> None:
    job = prepare(
        RebalanceRequest(loads=PUBLISHED, checkpoint=checkpoint, ranks=4, redundant=4, policy="incremental?max_moves=1")
    )
    assert job.policy == "incremental?max_moves=1"
    assert np.bincount(job.plan().transfer_dst_rank, minlength=4).max() <= 1


def test_what_is_not_worth_it_moves_nothing_and_says_why(checkpoint: Path, tmp_path: Path) -> None:
    document, out = tmp_path / "numbers.json", tmp_path / "new.json"
    arguments = (PUBLISHED, "--checkpoint", checkpoint, "--ranks", 2, "--redundant", 4, "--backend", "torch_gloo")
    few = rebalance(*arguments, "--if-worth-it", "--cost", "steps=1", "--json", document, "--out", out)
    assert few.exit_code == 0, few.output
    assert "nothing was moved: not worth it" in few.stdout
    found = json.loads(document.read_text())
    assert (found["moved"], found["worth"]["worth_it"], out.exists()) == (False, False, False)
    many = rebalance(*arguments, "--if-worth-it", "--cost", "steps=100000&step=1s", "--out", out)
    assert many.exit_code == 0, many.output
    assert out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cost", "steps=1"), "--cost needs --if-worth-it"),
        (("--if-worth-it", "--cost", "stepps=1"), "has no option 'stepps', did you mean 'steps'"),
        (("--if-worth-it", "--cost", "rate=20"), "the unit is missing"),
    ],
)
def test_a_wrong_cost_is_refused(checkpoint: Path, options: tuple[str, ...], message: str) -> None:
    assert_one_line(rebalance(PUBLISHED, "--checkpoint", checkpoint, *options), message)


def test_loads_that_are_all_zero_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    loads = write(tmp_path / "zero.json", [[0] * 12] * 2)
    assert_one_line(rebalance(loads, "--checkpoint", checkpoint), "all loads are zero")


def test_a_placement_that_is_not_better_is_announced(checkpoint: Path, tmp_path: Path) -> None:
    equal = write(tmp_path / "equal.json", [[5] * 12] * 2)
    job = prepare(RebalanceRequest(loads=equal, checkpoint=checkpoint, ranks=4, policy="deepseek", as_planned=True))
    assert "not better balanced" in job.notes[0]
    assert "nothing moves" in prepare(replace(request_of(job, equal, checkpoint), policy="incremental")).notes[0]


def request_of(job: Any, loads: Path, checkpoint: Path) -> RebalanceRequest:
    return RebalanceRequest(loads=loads, checkpoint=checkpoint, ranks=job.num_ranks)


def test_the_published_loads_give_the_published_placement(checkpoint: Path) -> None:
    request = RebalanceRequest(
        loads=PUBLISHED, checkpoint=checkpoint, ranks=8, nodes=2, redundant=4, groups=4, as_planned=True
    )
    job = prepare(request)
    assert job.new.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert job.node_of_rank == (0, 0, 0, 0, 1, 1, 1, 1)


@pytest.mark.parametrize(("num_steps", "given"), [(3, 3), (256, 64)])
def test_a_policy_gets_the_steps_of_a_recording_and_of_a_long_one_a_few_joined_ones(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int, given: int
) -> None:
    asked: list[PlacementRequest] = []

    def note_and_decide(policy: Any, request: PlacementRequest) -> PlacementDecision:
        asked.append(request)
        return decide(policy, request)

    monkeypatch.setattr("eplb_core.cli.rebalance.request.decide", note_and_decide)
    steps = np.random.default_rng(0).poisson(LOADS, (num_steps, *LOADS.shape))
    np.save(tmp_path / "steps.npy", steps)
    job = prepare(RebalanceRequest(loads=tmp_path / "steps.npy", checkpoint=checkpoint, layers="1:2"))
    expected = steps[:, 1:2].reshape(given, -1, 1, LOADS.shape[1]).sum(axis=1)
    assert asked[0].window().tolist() == expected.tolist()
    assert job.loads.tolist() == steps[:, 1:2].sum(axis=0).tolist()


def test_noise_of_a_long_recording_moves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.json"
    placed = prepare(RebalanceRequest(loads=PUBLISHED, checkpoint=checkpoint, redundant=4))
    write_placement(start, placed.new, num_ranks=4)
    np.save(tmp_path / "steps.npy", np.random.default_rng(0).poisson(LOADS, (200, *LOADS.shape)))
    request = RebalanceRequest(loads=tmp_path / "steps.npy", checkpoint=checkpoint, placement=start)
    assert prepare(request).plan().num_moves == 0
    assert prepare(replace(request, policy="deepseek", as_planned=True)).plan().num_moves > 0


def test_rows_of_dense_layers_without_load_are_left_out(tmp_path: Path) -> None:
    loads = write(tmp_path / "loads.json", [[0] * 12, *LOADS.tolist()])
    job = prepare(RebalanceRequest(loads=loads, checkpoint=make(tmp_path, "deepseek"), ranks=2))
    assert job.loads.tolist() == LOADS.tolist()
    assert job.layer_names == (1, 2)
    assert "1 row of the loads belongs to dense layers and was left out" in job.notes


BF16, FP4 = ("BF16", (4, 6)), ("F4", (4, 6))
LAYOUTS = {
    "fused": (Stored.fused, "model.layers.{l}.mlp.experts.{p}", {"gate_up_proj_blocks": ("U8", (8, 3)), "bias": BF16}),
    "joined": (Stored.joined, "blocks.{l}.ffn.experts.{p}", {"mlp.w1": BF16, "mlp.v1": BF16}),
    "odd dtypes": (
        Stored.numbered,
        "layers.{l}.ffn.experts.{e}.{p}",
        {"a": FP4, "b": ("U32", (3,)), "c": ("C64", (2, 1)), "d": ("F8_E4M3FNUZ", (3, 5)), "e": ("F8_E8M0", ())},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["torch_gloo", "torch_nccl"])
def test_two_ranks_move_experts_of_any_layout_and_dtype(tmp_path: Path, layout: str, backend: str) -> None:
    stored, document = Stored(), tmp_path / "numbers.json"
    add, template, parts = LAYOUTS[layout]
    add(stored, template, range(2), parts, experts=12)
    stored.add("mtp.layers.0.mlp.experts.0.w1")
    result = rebalance(
        PUBLISHED, "--checkpoint", stored.write(tmp_path / "c", {"num_experts": 12}), "--ranks", 2, "--redundant", 4,
        "--backend", backend, "--json", document,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "note: experts of prediction layers were left out: mtp.layers.N.mlp.experts (layer 0)" in result.stdout
    found = json.loads(document.read_text())
    assert found["verified"] is True
    assert found["checked_bytes"] == 2 * 16 * sum(len(content) for content in stored.expected[0, 0].values())
    assert found["bytes_remote"] > 0
    assert found["notes"][0].startswith("experts of prediction layers were left out")


def test_a_part_is_chosen_by_its_name(tmp_path: Path) -> None:
    stored = Stored()
    for part in ("thinker", "talker"):
        stored.numbered(f"{part}.model.layers.{{l}}.mlp.experts.{{e}}.{{p}}", range(2), {"w1": BF16}, experts=12)
    checkpoint = stored.write(tmp_path / "c")
    result = rebalance(PUBLISHED, "--checkpoint", checkpoint, "--ranks", 2)
    assert_one_line(result, "give --part thinker or --part talker")
    assert prepare(RebalanceRequest(loads=PUBLISHED, checkpoint=checkpoint, part="talker", ranks=2)).layers == (0, 1)


def test_counts_of_slots_are_mapped_with_the_placement_to_start_from(checkpoint: Path, tmp_path: Path) -> None:
    start = [[*range(12), 0, 0], [*range(12), 5, 6]]
    slots = np.arange(28).reshape(2, 14)
    expected = slots[:, :12].copy()
    expected[0, 0] += 12 + 13
    expected[1, 5:7] += [14 + 12, 14 + 13]
    loads, placement = write(tmp_path / "slots.json", slots.tolist()), write(tmp_path / "start.json", start)
    request = {"loads": loads, "checkpoint": checkpoint, "placement": placement, "ranks": 2}
    assert prepare(RebalanceRequest(**request, counts="physical")).loads.tolist() == expected.tolist()
    with pytest.raises(InputError, match=r"as many columns as the placement has slots.*\n.*give --counts physical"):
        prepare(RebalanceRequest(**request))


def test_the_last_steps_of_the_loads_can_be_chosen(checkpoint: Path, tmp_path: Path) -> None:
    steps = np.arange(3 * 24).reshape(3, 2, 12)
    loads = write(tmp_path / "steps.json", steps.tolist())
    window = prepare(RebalanceRequest(loads=loads, checkpoint=checkpoint, ranks=2, window_steps=1))
    assert window.loads.tolist() == steps[2].tolist()
    faded = prepare(RebalanceRequest(loads=loads, checkpoint=checkpoint, ranks=2, decay=0.5))
    assert faded.loads.tolist() == (steps[0] / 4 + steps[1] / 2 + steps[2]).tolist()


def test_rows_of_dense_layers_with_load_are_refused(tmp_path: Path) -> None:
    loads = write(tmp_path / "loads.json", [[1] * 12, *LOADS.tolist()])
    with pytest.raises(InputError, match="the loads have 3 layers, the checkpoint has 2 MoE layers"):
        prepare(RebalanceRequest(loads=loads, checkpoint=make(tmp_path, "deepseek"), ranks=2))


# --- what it refuses -------------------------------------------------------------------------------------------------


def assert_one_line(result: Result, message: str) -> None:
    assert isinstance(result.exception, SystemExit | None)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]


BAD_LOADS: dict[str, tuple[object, str]] = {
    "missing": (None, "the loads file does not exist"),
    "flat": ([1, 2, 3], "1 dimension instead of 2 or 3"),
    "empty": ([[]], "the loads are empty"),
    "ragged": ([[1, 2], [3]], "different lengths"),
    "nan": ([[1.0, float("nan")]], "1 load is NaN"),
    "infinite": ([[1.0, float("inf")]], "1 load is infinite"),
    "negative": ([[1, -1]], "1 load is negative"),
    "words": ([["a"]], "the loads are not numbers"),
    "too few layers": (LOADS[:1].tolist(), "the loads have 1 layer, the checkpoint has 2 MoE layers"),
    "too few experts": (LOADS[:, :10].tolist(), "the loads have 10 experts, the checkpoint has 12 experts"),
}


@pytest.mark.parametrize("case", BAD_LOADS)
def test_bad_loads_are_refused(checkpoint: Path, tmp_path: Path, case: str) -> None:
    content, message = BAD_LOADS[case]
    path = tmp_path / "loads.json"
    if content is not None:
        write(path, content)
    result = rebalance(path, "--checkpoint", checkpoint, "--ranks", 2)
    assert result.exit_code == 2
    assert_one_line(result, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ranks 5", "12 slots cannot be shared evenly by 5 ranks"),
        ("--ranks 5 --redundant 1", "hint: give --redundant 3"),
        ("--ranks 13", "there are 13 ranks, but only 12 slots"),
        ("--ranks 0", "--ranks is 0"),
        ("--redundant -1", "--redundant is -1"),
        ("--nodes 3", "4 ranks cannot be shared evenly by 3 nodes"),
        ("--nodes 0", "--nodes is 0"),
        ("--groups 5", "group"),
        ("--seed -1", "--seed is -1"),
        ("--timeout 0", "--timeout is 0"),
        ("--layers 3", "--layers 3 selects no layers that exist"),
        ("--layers 1:1", "--layers 1:1 selects no layers that exist"),
        ("--counts tokens", "--counts cannot be 'tokens'; hint: give logical or physical"),
        ("--window-steps 0", "--window-steps is 0"),
        ("--window-steps 2", "--window-steps needs loads with steps"),
        ("--decay 2", "--decay is 2"),
        ("--part talker", "no part of the checkpoint is called 'talker'"),
        ("--layers first", "--layers 'first' is neither a number nor a range"),
        ("--policy nonsense", "nonsense"),
        ("--backend nonsense", "nonsense"),
        ("--backend torch_gloo?nonsense=1", "has no option 'nonsense'"),
        ("--backend torch_gloo?", "column 12"),
        ("--window 256", "the unit is missing"),
        ("--window 100B", "window"),
        ("--pace 20", "'20' is not a pace: it does not end in /s; hint: write a size a second"),
        ("--pace 0B/s", "a pace must be above 0 bytes a second, not 0"),
        ("--pace 1MB/s --backend torch_nccl", "backend 'torch_nccl' cannot run beside inference"),
        ("--verify lots", "--verify cannot be 'lots'; hint: give one of off, sample, full"),
        ("--model deepseek-v3", "both of --checkpoint and --model"),
        ("--scale 1/2", "--scale needs --model"),
        ("--placement absent.json", "the placement file does not exist"),
        ("--verify-against absent", "the checkpoint does not exist"),
        ("--out new.txt", "cannot be written as .txt"),
        ("--out absent/new.json", "the directory for --out does not exist"),
        ("--json absent/numbers.json", "the directory for --json does not exist"),
        ("--json .", "--json is a directory"),
        ("--plot plot.gif", "cannot be written as .gif"),
        ("--backend pynccl", "backend 'pynccl' does not move weights on cpu"),
        pytest.param("--device cuda", "torch sees no CUDA device", marks=NO_GPU),
    ],
)
def test_bad_options_are_refused(checkpoint: Path, arguments: str, message: str) -> None:
    result = rebalance(PUBLISHED, "--checkpoint", checkpoint, *arguments.split())
    assert result.exit_code == 2
    assert_one_line(result, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "neither of --checkpoint and --model was given"),
        ("--model deepseek-v2", "did you mean deepseek-v3"),
        ("--model deepseek-v3 --scale 3", "'3' is not a scale"),
        ("--model deepseek-v3 --verify-against x", "--verify-against needs --checkpoint"),
        ("--model deepseek-v3 --part mtp", "--part needs --checkpoint"),
        ("--checkpoint absent", "the checkpoint does not exist"),
        ("--checkpoint .", "no safetensors checkpoint"),
    ],
)
def test_bad_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = rebalance(PUBLISHED, *arguments.split())
    assert result.exit_code == 2
    assert_one_line(result, message)


def test_a_checkpoint_without_experts_is_refused(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    result = rebalance(PUBLISHED, "--checkpoint", tmp_path)
    assert result.exit_code == 2
    assert_one_line(result, "the checkpoint has no experts")


def test_weights_that_do_not_fit_into_memory_are_refused(tmp_path: Path) -> None:
    loads = write(tmp_path / "loads.json", np.ones((94, 2000)).tolist())
    result = rebalance(loads, "--model", "mixtral-8x7b")
    assert result.exit_code == 2
    assert_one_line(result, "GB of memory")


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ([[0, 1], [0, 1], [0, 1]], "the placement has 3 layers, the loads have 2"),
        ([[*range(12), 0]] * 2, "cannot share evenly"),
        ([[*range(12), 0, 12]] * 2, "logical expert 12, which does not exist"),
        ([[*range(12), 0, -2]] * 2, "logical expert -2, which does not exist"),
        ([[*range(11), 0, 0, 0]] * 2, "logical expert 11 has a load, but no copy"),
        ([[0.5] * 12] * 2, "not whole"),
    ],
)
def test_bad_start_placements_are_refused(checkpoint: Path, tmp_path: Path, placement: object, message: str) -> None:
    start = write(tmp_path / "start.json", placement)
    result = rebalance(PUBLISHED, "--checkpoint", checkpoint, "--ranks", 2, "--placement", start)
    assert result.exit_code == 2
    assert_one_line(result, message)


def test_redundant_has_to_agree_with_the_start_placement(checkpoint: Path, tmp_path: Path) -> None:
    start = write(tmp_path / "start.json", [[*range(12), 0, 1]] * 2)
    result = rebalance(PUBLISHED, "--checkpoint", checkpoint, "--ranks", 2, "--placement", start, "--redundant", 4)
    assert result.exit_code == 2
    assert_one_line(result, "the placement has 14 slots, but 12 experts and 4 redundant ones make 16")


def test_a_plot_without_matplotlib_names_the_extra(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = rebalance(PUBLISHED, "--checkpoint", checkpoint, "--plot", "plot.png")
    assert result.exit_code == 2
    assert_one_line(result, with_local_commands('pip install "eplb[plot]"'))


def test_make_checkpoint_writes_what_rebalance_reads(tmp_path: Path) -> None:
    result = eplb("make-checkpoint", tmp_path / "new", "--style", "qwen3", "--experts", 12, "--hidden", 8)
    assert result.exit_code == 0, result.output
    job = prepare(RebalanceRequest(loads=PUBLISHED, checkpoint=tmp_path / "new"))
    assert job.expert_bytes == (3 * 8 * 128 * 2,) * 2


def test_make_checkpoint_refuses_a_folder_with_files(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    result = eplb("make-checkpoint", tmp_path)
    assert result.exit_code == 2
    assert_one_line(result, "the directory is not empty")


# --- under torchrun --------------------------------------------------------------------------------------------------


def torchrun(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0", "-m", "eplb_core", "rebalance", *map(str, arguments),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment, check=False)


def test_under_torchrun_it_joins_the_ranks_that_there_are(checkpoint: Path, tmp_path: Path) -> None:
    document = tmp_path / "numbers.json"
    done = torchrun(
        3, PUBLISHED, "--checkpoint", checkpoint, "--redundant", 3, "--backend", "torch_gloo", "--json", document
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(document.read_text())
    assert (found["ranks"], found["nodes"], found["verified"]) == (3, 1, True)
    assert found["checked_bytes"] == 2 * 15 * EXPERT_BYTES
    assert done.stdout.count("verified") == 1


def under_torchrun(ranks: int, *arguments: object) -> list[str]:
    """Run the command on forked ranks that have torchrun's environment and store; return the exit code of each."""
    program = Path(eplb_core.__file__).with_name("__main__.py")
    ended = run_program(program, ranks, ["rebalance", *map(str, arguments)])
    assert [outcome.error for outcome in ended] == ["SystemExit"] * ranks, ended
    return [outcome.message for outcome in ended]


def test_under_torchrun_bad_input_is_one_line_too(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    codes = under_torchrun(2, PUBLISHED, "--checkpoint", checkpoint, "--ranks", 3)
    assert codes == ["2", "2"]
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: --ranks is 3, but torchrun started 2; hint: omit --ranks"]


def test_under_torchrun_a_checkpoint_that_cannot_be_opened_is_one_line(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"?" * 20)
    codes = under_torchrun(2, PUBLISHED, "--checkpoint", checkpoint, "--verify-against", tmp_path / "broken")
    assert codes == ["2", "2"]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "a shard cannot be read as safetensors" in line


def test_under_torchrun_a_copy_is_compared_with_too(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    codes = under_torchrun(
        2, PUBLISHED, "--checkpoint", checkpoint, "--verify-against", tmp_path / "copy", "--backend", "torch_gloo"
    )
    said, complained = capfd.readouterr()
    assert codes == ["0", "0"], complained
    assert re.search(r"verified +yes", said)
