"""What engines record of their loads is read as what it is, added up over ranks and steps, or refused by name."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eplb_core.errors import InputError
from eplb_core.inputs.loads import LoadOptions, RecordedLoads, read_loads, read_recording
from eplb_core.inputs.placements import write_placement
from eplb_core.inputs.recording import ModelHints

# Two layers, three experts in five slots. Passes of two ranks: counts of slots, and by hand of experts.
PLACEMENT = [[0, 1, 2, 0, -1], [2, 2, 1, 0, 1]]
SLOTS = [[1, 2, 3, 4, 0], [5, 6, 7, 8, 9]]
EXPERTS = [[1 + 4, 2, 3], [8, 7 + 9, 5 + 6]]


def records(rank: int, passes: int = 2, **more: Any) -> dict[str, Any]:
    """What SGLang's recorder dumps in its modes per_pass and per_token."""
    return {
        "records": [
            {
                "forward_pass_id": number,
                "rank": rank,
                "gatherer_key": "primary",
                "global_physical_count": torch.tensor(SLOTS, dtype=torch.int32) * (number + 1),
            }
            | more
            for number in range(passes)
        ],
        "last_physical_to_logical_map": torch.tensor(PLACEMENT),
    }


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def write_lines(path: Path, *contents: object) -> Path:
    path.write_text("".join(json.dumps(content) + "\n" for content in contents))
    return path


# --- SGLang ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", [".pt", ".pth"])
def test_passes_of_one_rank_are_mapped_to_experts_and_added_up(tmp_path: Path, extension: str) -> None:
    torch.save(records(rank=3), tmp_path / f"dump{extension}")
    found = read_recording(tmp_path / f"dump{extension}")
    assert found.loads.tolist() == (3 * np.array(EXPERTS)).tolist()
    assert found.num_steps == 2
    assert found.notes == ("these are the tokens of rank 3 only; give the directory to sum all ranks",)


def test_a_folder_adds_up_the_ranks_of_each_pass(tmp_path: Path) -> None:
    for rank in range(3):
        more = {"topk_ids_of_layer": torch.zeros(2, 4, 8, dtype=torch.int32), "input_ids": [1, 2]}
        torch.save(records(rank, **more), tmp_path / f"expert_distribution_recorder_1.5_{rank}.pt")
    found = read_recording(tmp_path)
    assert found.loads.tolist() == (3 * 3 * np.array(EXPERTS)).tolist()
    assert (found.num_steps, found.notes) == (2, ())


def test_the_last_passes_of_all_ranks_are_a_window(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save(records(rank, passes=3), tmp_path / f"{rank}.pt")
    found = read_recording(tmp_path, LoadOptions(window_steps=1))
    assert found.loads.tolist() == (2 * 3 * np.array(EXPERTS)).tolist()
    assert found.num_steps == 1


def test_a_pass_that_was_recorded_twice_is_refused(tmp_path: Path) -> None:
    for copy in range(2):
        torch.save(records(0), tmp_path / f"{copy}.pt")
    with pytest.raises(InputError, match="pass 0 of rank 0 was recorded twice"):
        read_loads(tmp_path)


def test_ranks_that_recorded_different_placements_are_refused(tmp_path: Path) -> None:
    torch.save(records(0), tmp_path / "0.pt")
    torch.save(records(1) | {"last_physical_to_logical_map": torch.zeros(2, 5)}, tmp_path / "1.pt")
    with pytest.raises(InputError, match="the ranks recorded different placements"):
        read_loads(tmp_path)


def test_records_without_counts_are_refused_with_the_modes_that_have_them(tmp_path: Path) -> None:
    torch.save({"records": [{"topk_ids_of_layer": torch.zeros(2, 4, 8)}]}, tmp_path / "dump.pt")
    with pytest.raises(InputError, match=r"no global_physical_count.*\n.*mode stat, per_pass or per_token"):
        read_loads(tmp_path / "dump.pt")


def test_several_dumps_of_logical_counts_are_added_up(tmp_path: Path) -> None:
    for number in range(2):
        torch.save({"rank": 0, "logical_count": torch.tensor([EXPERTS, EXPERTS])}, tmp_path / f"{number}.pt")
    assert read_loads(tmp_path).tolist() == (4 * np.array(EXPERTS)).tolist()


def test_dumps_of_slots_under_different_placements_are_not_added_up(tmp_path: Path) -> None:
    for number, placement in enumerate((PLACEMENT, PLACEMENT[::-1])):
        content = {"expert_load_window": [SLOTS], "physical_to_logical_map": placement}
        write_json(tmp_path / f"{number}.json", content)
    with pytest.raises(InputError, match="count the slots of different placements"):
        read_loads(tmp_path)
    write_json(tmp_path / "1.json", {"expert_load_window": [SLOTS], "physical_to_logical_map": PLACEMENT})
    assert read_loads(tmp_path).tolist() == (2 * np.array(EXPERTS)).tolist()


@pytest.mark.parametrize("number", [None, "7", 1.5])
def test_records_without_the_number_of_their_pass_are_refused(tmp_path: Path, number: object) -> None:
    torch.save(records(0, forward_pass_id=number), tmp_path / "dump.pt")
    with pytest.raises(InputError, match="a record has no forward_pass_id"):
        read_loads(tmp_path / "dump.pt")


def test_csv_files_of_all_ranks_are_added_up(tmp_path: Path) -> None:
    (tmp_path / "0.csv").write_text("layer_id,expert_id,count\n3,0,5\n3,2,1\n4,1,7\n")
    (tmp_path / "1.csv").write_text("layer_id,expert_id,count\n3,0,2\n4,0,1\n")
    assert read_loads(tmp_path).tolist() == [[7, 0, 1], [1, 7, 0]]
    assert read_loads(tmp_path / "0.csv").tolist() == [[5, 0, 1], [0, 7, 0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no columns layer_id, expert_id and count"),
        ("a,b\n1,2\n", "no columns layer_id, expert_id and count.*: it has a, b"),
        ("layer_id,expert_id,count\n", "the loads are empty"),
        ("layer_id,expert_id,count\n0,x,1\n", "a line of the CSV is not three numbers .*line 2"),
        ("layer_id,expert_id,count\n0,-1,1\n", "a layer or an expert is negative .*line 2"),
    ],
)
def test_an_unusable_csv_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "loads.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_loads(tmp_path / "loads.csv")


# --- TensorRT-LLM ----------------------------------------------------------------------------------------------------


def statistic(folder: Path, rank: int, iterations: range, layers: range) -> None:
    counts = {
        f"{iteration}_{layer}": torch.tensor([rank, iteration, layer]) for iteration in iterations for layer in layers
    }
    save_file(counts, folder / f"rank{rank}.safetensors")


def test_the_statistic_of_tensorrt_llm_is_added_up_over_ranks_and_iterations(tmp_path: Path) -> None:
    for rank in range(2):
        statistic(tmp_path, rank, range(9, 12), range(3, 5))
    write_json(tmp_path / "meta_info.json", {"num_experts": 3, "num_experts_per_token": 1})
    save_file({"9_3": torch.ones(3, 3)}, tmp_path / "cooccurrence_rank0.safetensors")
    expected = [[3 * (0 + 1), 2 * (9 + 10 + 11), 6 * layer] for layer in (3, 4)]
    found = read_recording(tmp_path)
    assert (found.loads.tolist(), found.num_steps, found.notes) == (expected, 3, ())
    last = read_recording(tmp_path, LoadOptions(window_steps=1))
    assert last.loads.tolist() == [[1, 2 * 11, 2 * layer] for layer in (3, 4)]


def test_one_rank_of_tensorrt_llm_alone_is_noted(tmp_path: Path) -> None:
    statistic(tmp_path, 1, range(2), range(2))
    assert "one rank only" in read_recording(tmp_path / "rank1.safetensors").notes[0]


def test_an_iteration_without_one_of_the_layers_is_refused(tmp_path: Path) -> None:
    save_file({"1_0": torch.ones(2), "1_1": torch.ones(2), "2_0": torch.ones(2)}, tmp_path / "rank0.safetensors")
    with pytest.raises(InputError, match="layer 1 of iteration 2 is missing"):
        read_loads(tmp_path)


def test_other_tensors_are_not_taken_for_a_statistic(tmp_path: Path) -> None:
    save_file({"model.layers.0.mlp.gate.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"'model\.layers\.0\.mlp.gate\.weight' is not an iteration and a layer"):
        read_loads(tmp_path / "model.safetensors")


# --- vLLM: physical slots --------------------------------------------------------------------------------------------


def test_counts_of_slots_are_mapped_with_the_placement_that_is_given(tmp_path: Path) -> None:
    np.save(tmp_path / "window.npy", np.array([SLOTS, SLOTS]))
    options = LoadOptions(counts="physical", placement=np.array(PLACEMENT))
    assert read_loads(tmp_path / "window.npy", options).tolist() == (2 * np.array(EXPERTS)).tolist()


def test_experts_without_a_slot_have_no_load(tmp_path: Path) -> None:
    np.save(tmp_path / "window.npy", np.array(SLOTS))
    options = LoadOptions(counts="physical", placement=np.array(PLACEMENT), model=ModelHints(num_experts=4))
    assert read_loads(tmp_path / "window.npy", options).tolist() == [[*row, 0] for row in EXPERTS]


@pytest.mark.parametrize("name", ["expert_load_window", "expert_load_pass", "global_physical_count"])
def test_names_that_mean_slots_are_never_taken_for_experts(tmp_path: Path, name: str) -> None:
    torch.save({name: torch.tensor([SLOTS])}, tmp_path / "loads.pt")
    with pytest.raises(InputError, match=r"count physical slots.*\n.*--counts physical --placement FILE"):
        read_loads(tmp_path / "loads.pt")
    options = LoadOptions(placement=np.array(PLACEMENT))
    assert read_loads(tmp_path / "loads.pt", options).tolist() == EXPERTS


@pytest.mark.parametrize("name", ["logical_count", "routed_experts"])
def test_counts_that_are_said_to_be_of_experts_are_not_taken_for_slots(tmp_path: Path, name: str) -> None:
    content = {name: [SLOTS, SLOTS]}
    options = LoadOptions(counts="physical", placement=np.array(PLACEMENT))
    with pytest.raises(InputError, match="the loads count logical experts"):
        read_loads(write_json(tmp_path / "loads.json", content), options)


def test_a_file_with_counts_of_slots_may_bring_the_placement(tmp_path: Path) -> None:
    content = {"expert_load_window": [SLOTS], "physical_to_logical_map": PLACEMENT}
    assert read_loads(write_json(tmp_path / "loads.json", content)).tolist() == EXPERTS


def test_a_placement_of_another_shape_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "loads.npy", np.array(SLOTS))
    options = LoadOptions(counts="physical", placement=np.zeros((2, 6), np.int64))
    with pytest.raises(InputError, match="the loads count 2 layers of 5 slots, the placement has 2 layers of 6 slots"):
        read_loads(tmp_path / "loads.npy", options)


# --- JSON lines, answers ---------------------------------------------------------------------------------------------


def test_each_json_line_is_a_step(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "loads.jsonl", EXPERTS, EXPERTS)
    assert read_recording(path).num_steps == 2
    assert read_loads(path).tolist() == (2 * np.array(EXPERTS)).tolist()


def test_json_lines_may_name_what_they_count(tmp_path: Path) -> None:
    logical = write_lines(tmp_path / "logical.jsonl", {"step": 1, "loads": EXPERTS}, {"step": 2, "loads": EXPERTS})
    assert read_loads(logical).tolist() == (2 * np.array(EXPERTS)).tolist()
    line = {
        "step_idx": 0,
        "expert_load_pass": {"shape": [2, 5], "dtype": "torch.int32", "value": [*SLOTS[0], *SLOTS[1]]},
        "physical_to_logical_map": {"shape": [2, 5], "dtype": "torch.int64", "value": [*PLACEMENT[0], *PLACEMENT[1]]},
    }
    assert read_loads(write_lines(tmp_path / "physical.jsonl", line)).tolist() == EXPERTS


def test_json_lines_whose_placement_changes_are_refused(tmp_path: Path) -> None:
    lines = [{"expert_load_pass": SLOTS, "physical_to_logical_map": each} for each in (PLACEMENT, PLACEMENT[::-1])]
    with pytest.raises(InputError, match="the placement changes between the records"):
        read_loads(write_lines(tmp_path / "loads.jsonl", *lines))


@pytest.mark.parametrize("text", ["", "\n\n", "{", '{"a": 1}\n'])
def test_unusable_json_lines_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "loads.jsonl").write_text(text)
    with pytest.raises(InputError):
        read_loads(tmp_path / "loads.jsonl")


ROUTED = [[[0, 1], [2, 1]], [[0, 2], [-1, -1]], [[1, 0], [2, 0]]]  # three tokens, two layers, two experts each
CHOSEN = [[3, 2, 1], [1, 1, 2]]


def test_routed_experts_of_an_answer_are_counted(tmp_path: Path) -> None:
    answer = {"choices": [{"index": 0, "routed_experts": ROUTED}, {"index": 1, "routed_experts": ROUTED}]}
    found = read_recording(write_json(tmp_path / "answer.json", answer))
    assert (found.loads.tolist(), found.num_steps) == ((2 * np.array(CHOSEN)).tolist(), 2)


def test_routed_experts_in_base64_take_their_shape_from_the_model(tmp_path: Path) -> None:
    text = base64.b64encode(np.array(ROUTED, np.dtype("<i4")).tobytes()).decode()
    answers = [
        {"text": "a", "meta_info": {"routed_experts": text}},
        {"choices": [{"sgl_ext": {"routed_experts": text}}]},
    ]
    path = write_lines(tmp_path / "answers.jsonl", *answers)
    model = ModelHints(num_experts=4, num_layers=2, experts_per_token=2)
    assert read_loads(path, LoadOptions(model=model)).tolist() == [[*(2 * n for n in row), 0] for row in CHOSEN]
    with pytest.raises(InputError, match=r"shape of the routed experts is unknown.*\n.*--checkpoint"):
        read_loads(path)


@pytest.mark.parametrize(
    ("routed", "message"), [("not base64!", "not base64 of int32"), ([[1, 2]], r"their shape is \[1, 2\]")]
)
def test_unusable_routed_experts_are_refused(tmp_path: Path, routed: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_loads(write_json(tmp_path / "answer.json", {"routed_experts": routed}))


# --- what is not loads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        {"physical_to_logical_map": [[0, 1, 2, 3]]},
        {"placement": [[0, 1, 2, 3]], "num_ranks": 2},
        {"moe_layer_count": 1, "layer_list": []},
        {"initial_global_assignments": {"3": [0, 1]}, "num_slots": 2},
    ],
)
def test_a_placement_is_not_taken_for_loads(tmp_path: Path, content: object) -> None:
    with pytest.raises(InputError, match=r"this file holds a placement, not loads.*\n.*give it as --placement"):
        read_loads(write_json(tmp_path / "placement.json", content))


def test_yaml_is_refused_as_a_placement(tmp_path: Path) -> None:
    (tmp_path / "balancer.yaml").write_text("initial_global_assignments: {3: [0, 1]}")
    with pytest.raises(InputError, match=r"loads are not read from YAML.*is a placement\n.*EXPERT_STATISTIC_PATH"):
        read_loads(tmp_path / "balancer.yaml")


@pytest.mark.parametrize("extension", [".json", ".npz"])
def test_what_out_wrote_is_not_taken_for_loads(tmp_path: Path, extension: str) -> None:
    write_placement(tmp_path / f"new{extension}", np.array(PLACEMENT), num_ranks=1)
    with pytest.raises(InputError, match="this file holds a placement, not loads"):
        read_loads(tmp_path / f"new{extension}")


def test_a_bare_table_that_looks_like_a_placement_is_noted(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", [[0, 1, 2, 3, 0], [3, 2, 1, 0, 1]])
    assert "give it as --placement" in read_recording(tmp_path / "table.npy").notes[0]
    np.save(tmp_path / "loads.npy", [[0, 1, 2, 3, 0], [3, 2, 1, 5, 1]])
    assert read_recording(tmp_path / "loads.npy").notes == ()


def test_counts_of_few_experts_are_noted(tmp_path: Path) -> None:
    np.save(tmp_path / "loads.npy", np.eye(12)[:3])
    assert read_recording(tmp_path / "loads.npy").notes == (
        "9 of 12 experts were never chosen in any layer; were the counts of all ranks summed?",
    )


def test_a_sparse_tensor_is_read(tmp_path: Path) -> None:
    torch.save(torch.tensor(EXPERTS).to_sparse(), tmp_path / "loads.pt")
    assert read_loads(tmp_path / "loads.pt").tolist() == EXPERTS


def test_a_list_of_tensors_is_read(tmp_path: Path) -> None:
    torch.save([torch.tensor(row) for row in EXPERTS], tmp_path / "loads.pt")
    assert read_loads(tmp_path / "loads.pt").tolist() == EXPERTS


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_tensors_that_are_not_counts_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({"logical_count": torch.ones(2, 3, dtype=dtype)}, tmp_path / "loads.pt")
    with pytest.raises(InputError, match=f"not numbers .*: found {str(dtype).removeprefix('torch.')} values"):
        read_loads(tmp_path / "loads.pt")


def test_a_refused_pickle_is_explained_without_advice_to_run_it(tmp_path: Path) -> None:
    torch.save({"logical_count": subprocess.Popen}, tmp_path / "loads.pt")
    with pytest.raises(InputError, match=r"Popen, but only tensors, numbers and text are read") as caught:
        read_loads(tmp_path / "loads.pt")
    assert "weights_only" not in str(caught.value)


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "loads.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(EXPERTS).encode())
    assert read_loads(tmp_path / "loads.json").tolist() == EXPERTS


@pytest.mark.parametrize("files", [(), ("a.txt",), ("a.csv", "b.json")])
def test_a_folder_of_no_kind_or_several_is_refused(tmp_path: Path, files: tuple[str, ...]) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="the directory holds"):
        read_loads(tmp_path)


# --- windows ---------------------------------------------------------------------------------------------------------


STEPS = np.arange(5 * 2 * 3).reshape(5, 2, 3) ** 2


def save_npy(path: Path, steps: np.ndarray) -> Path:
    np.save(path.with_suffix(".npy"), steps)
    return path.with_suffix(".npy")


def save_fortran(path: Path, steps: np.ndarray) -> Path:
    np.save(path.with_suffix(".npy"), np.asfortranarray(steps))
    return path.with_suffix(".npy")


def save_npz(path: Path, steps: np.ndarray) -> Path:
    np.savez_compressed(path.with_suffix(".npz"), note=np.zeros(2), loads=steps)
    return path.with_suffix(".npz")


def save_pt(path: Path, steps: np.ndarray) -> Path:
    torch.save({"logical_count": torch.from_numpy(steps)}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def save_json(path: Path, steps: np.ndarray) -> Path:
    return write_json(path.with_suffix(".json"), steps.tolist())


def save_jsonl(path: Path, steps: np.ndarray) -> Path:
    return write_lines(path.with_suffix(".jsonl"), *steps.tolist())


@pytest.mark.parametrize("save", [save_npy, save_fortran, save_npz, save_pt, save_json, save_jsonl])
@pytest.mark.parametrize(("window", "decay"), [(None, 1.0), (2, 1.0), (9, 1.0), (None, 0.5), (3, 0.25)])
@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
def test_windows_and_decay_count_the_last_steps_the_most(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save: Callable[[Path, np.ndarray], Path],
    window: int | None,
    decay: float,
    block_bytes: int,
) -> None:
    from eplb_core.inputs import arrays

    monkeypatch.setattr(arrays, "BLOCK_BYTES", block_bytes)
    found = read_recording(save(tmp_path / "loads", STEPS), LoadOptions(window_steps=window, decay=decay))
    expected = np.zeros((2, 3))
    for step in STEPS[-(window or len(STEPS)) :]:
        expected = expected * decay + step
    assert found.loads == pytest.approx(expected)
    assert found.num_steps == min(window or 5, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LoadOptions(window_steps=0), "--window-steps is 0"),
        (LoadOptions(window_steps=2), "--window-steps needs loads with steps"),
        (LoadOptions(decay=0.5), "--decay needs loads with steps"),
        (LoadOptions(decay=0), "--decay is 0"),
        (LoadOptions(decay=1.5), "--decay is 1.5"),
        (LoadOptions(decay=float("nan")), "--decay is nan"),
    ],
)
def test_unusable_windows_are_refused(tmp_path: Path, options: LoadOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_loads(save_npy(tmp_path / "loads", np.ones((2, 3))), options)


def test_a_bad_load_in_a_late_block_is_named_by_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eplb_core.inputs import arrays

    monkeypatch.setattr(arrays, "BLOCK_BYTES", 2 * STEPS[0].size * 8)
    steps = STEPS.astype(float)
    steps[3, 1, 2] = np.nan
    with pytest.raises(InputError, match="it is nan at step 3, layer 1, expert 2"):
        read_loads(save_npy(tmp_path / "loads", steps))


_PEAK = """
import re, sys
import numpy, torch
from eplb_core.inputs.loads import read_loads
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
read_loads(sys.argv[2])  # what is imported on first use does not count
open("/proc/self/clear_refs", "w").write("5")
before = peak()
loads = read_loads(sys.argv[1])
print(peak() - before, loads.sum())
"""


@pytest.mark.parametrize("save", [save_npy, save_npz, save_pt])
def test_a_long_recording_needs_no_more_memory_than_some_blocks(
    tmp_path: Path, save: Callable[[Path, np.ndarray], Path]
) -> None:
    steps = np.full((2000, 64, 256), 3, np.int32)  # 131 MB
    path, short = save(tmp_path / "long", steps), save(tmp_path / "short", steps[:2])
    child = subprocess.run(
        [sys.executable, "-c", _PEAK, str(path), str(short)], capture_output=True, text=True, check=False, timeout=100
    )
    assert child.returncode == 0, child.stderr
    grown, total = child.stdout.split()
    assert float(total) == steps.sum(dtype=np.int64)
    assert int(grown) < 64 << 20


def test_reading_returns_the_loads_alone_too(tmp_path: Path) -> None:
    path = save_npy(tmp_path / "loads", np.ones((2, 3)))
    assert isinstance(read_recording(path), RecordedLoads)
    assert read_loads(path).tolist() == np.ones((2, 3)).tolist()
