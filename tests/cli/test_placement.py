"""`eplb placement convert` writes what engines read, reads it back, and refuses what they cannot hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from eplb_core.cli import main
from eplb_core.cli.rebalance.request import RebalanceRequest, prepare
from eplb_core.errors import InputError
from eplb_core.inputs.make_checkpoint import make_checkpoint
from eplb_core.inputs.placement_formats import FORMATS, read_placement_file
from eplb_core.inputs.placements import read_placement, write_placement

yaml = pytest.importorskip("yaml", reason="the extra eplb[yaml] is not installed")

# Layers 3 and 4 of a model of five: two ranks, three slots each, four experts.
PLACEMENT = np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 3]])
FIRST_LAYER = 3
EXTENSION = {"tensorrt-llm": ".yaml"}


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["placement", "convert", *map(str, arguments)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.json"
    write_placement(path, PLACEMENT, num_ranks=2)
    return path


def converted(source: Path, target_format: str, *arguments: object) -> Path:
    target = (
        source.parent / f"{target_format}{len(list(source.parent.iterdir()))}{EXTENSION.get(target_format, '.json')}"
    )
    result = convert(source, target, "--to", target_format, "--first-layer", FIRST_LAYER, "--ranks", 2, *arguments)
    assert result.exit_code == 0, result.output
    return target


def test_sglang_gets_a_row_for_every_layer_of_the_model(source: Path) -> None:
    content = json.loads(converted(source, "sglang").read_text())
    dense = [0, 1, 2, 3, 0, 1]
    assert content == {"physical_to_logical_map": [dense, dense, dense, *PLACEMENT.tolist()]}


def test_tensorrt_llm_gets_yaml_by_the_number_of_the_layer(source: Path) -> None:
    assert yaml.safe_load(converted(source, "tensorrt-llm").read_text()) == {
        "num_slots": 6,
        "initial_global_assignments": {3: PLACEMENT[0].tolist(), 4: PLACEMENT[1].tolist()},
        "layer_updates_per_iter": 0,
    }


def test_vllm_gets_a_list_for_each_layer(source: Path) -> None:
    assert json.loads(converted(source, "vllm").read_text()) == PLACEMENT.tolist()


def test_vllm_ascend_gets_the_experts_of_each_device(source: Path) -> None:
    content = json.loads(converted(source, "vllm-ascend").read_text())
    assert content["moe_layer_count"] == 2
    assert content["layer_list"][1] == {
        "layer_id": 1,
        "device_count": 2,
        "device_list": [{"device_id": 0, "device_expert": [3, 2, 1]}, {"device_id": 1, "device_expert": [0, 3, 3]}],
    }


@pytest.mark.parametrize(("first", "second"), list(permutations(FORMATS, 2)))
def test_from_any_format_to_any_other_and_back_is_the_same(source: Path, first: str, second: str) -> None:
    once = converted(source, first)
    assert read_placement_file(once).format == first
    again = converted(converted(once, second), first)
    assert again.read_bytes() == once.read_bytes()
    assert read_placement(converted(again, "eplb")).tolist() == PLACEMENT.tolist()


def test_the_checkpoint_says_which_layers_have_experts(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", style="deepseek", experts=4)  # layer 0 is dense, 1 and 2 have experts
    write_placement(tmp_path / "p.npz", PLACEMENT, num_ranks=2)
    result = convert(tmp_path / "p.npz", tmp_path / "s.json", "--to", "sglang", "--checkpoint", tmp_path / "model")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "s.json").read_text())["physical_to_logical_map"]
    assert rows == [[0, 1, 2, 3, 0, 1], *PLACEMENT.tolist()]
    back = convert(tmp_path / "s.json", tmp_path / "v.json", "--to", "vllm", "--checkpoint", tmp_path / "model")
    assert back.exit_code == 0, back.output
    assert json.loads((tmp_path / "v.json").read_text()) == PLACEMENT.tolist()


def test_one_list_of_vllm_is_for_all_layers_of_the_model(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", style="deepseek", experts=4)
    (tmp_path / "map.json").write_text("[0, 1, 2, 3, 0, 1]")
    arguments = ("--to", "eplb", "--ranks", 2, "--checkpoint", tmp_path / "model")
    result = convert(tmp_path / "map.json", tmp_path / "p.json", *arguments)
    assert result.exit_code == 0, result.output
    assert read_placement(tmp_path / "p.json").tolist() == [[0, 1, 2, 3, 0, 1]] * 2


def test_a_torch_file_of_sglang_is_read(tmp_path: Path) -> None:
    torch.save({"physical_to_logical_map": torch.from_numpy(PLACEMENT)}, tmp_path / "map.pt")
    assert read_placement(tmp_path / "map.pt").tolist() == PLACEMENT.tolist()


@pytest.mark.parametrize("target_format", FORMATS)
def test_a_rebalance_starts_from_any_format(tmp_path: Path, source: Path, target_format: str) -> None:
    make_checkpoint(tmp_path / "model", style="deepseek", experts=4)
    target = tmp_path / f"start{EXTENSION.get(target_format, '.json')}"
    made = convert(source, target, "--to", target_format, "--checkpoint", tmp_path / "model")
    assert made.exit_code == 0, made.output
    np.save(tmp_path / "loads.npy", [[1, 2, 3, 4], [4, 3, 2, 1]])
    request = RebalanceRequest(
        loads=tmp_path / "loads.npy", checkpoint=tmp_path / "model", placement=target, ranks=2, groups=1
    )
    assert prepare(request).old.tolist() == PLACEMENT.tolist()


def sources() -> Iterator[object]:
    yield pytest.param([[0, 1, 2, -1]], "--to vllm --ranks 2", "vllm has no empty slots", id="an empty slot")
    yield pytest.param([[0, 2, 0, 2]], "--to vllm", "layer 0 of the placement has no slot for expert 1", id="a gap")
    yield pytest.param([[0, 1, 0, 1]], "--to vllm --experts 4", "no slot for expert 2 and 1 more", id="two missing")
    yield pytest.param([[0, 1, 2, 3]], "--to vllm --experts 2", "logical expert 2, which does not", id="too many")
    yield pytest.param([[0, 1, 2]], "--to vllm-ascend --ranks 2", "cannot share evenly", id="uneven")
    yield pytest.param([[0, 1]], "--to vllm-ascend", "does not say how many ranks", id="no ranks")
    yield pytest.param([[0, 1]], "--to vllm --first-layer -1", "--first-layer is -1", id="a negative layer")
    yield pytest.param([0, 1], "--to vllm", "not a table [layers, slots]", id="one row")
    yield pytest.param(
        {"num_ranks": 2, "placement": [[0, 1]]},
        "--to vllm --ranks 1",
        "--ranks is 1, but the placement is for 2",
        id="ranks",
    )
    yield pytest.param({"layer_list": []}, "--to vllm", "the placement is incomplete", id="half of vllm-ascend's")
    device = {"device_expert": [0]}
    uneven = {"moe_layer_count": 1, "layer_list": [{"device_list": [device, {"device_expert": [0, 1]}]}]}
    yield pytest.param(uneven, "--to vllm", "the devices hold different numbers", id="uneven devices")
    short = {"moe_layer_count": 2, "layer_list": [{"device_list": [device]}]}
    yield pytest.param(short, "--to vllm", "moe_layer_count is 2, but there are 1 layers", id="too few layers")
    wrong = {"initial_global_assignments": {"x": [0]}}
    yield pytest.param(wrong, "--to vllm", "is not a number", id="a layer called x")
    slots = {"initial_global_assignments": {"0": [0, 1]}, "num_slots": 3}
    yield pytest.param(slots, "--to vllm", "num_slots is 3, but the layers have 2", id="num_slots")
    yield pytest.param([[0, 1]], "--to tensorrt-llm", "cannot be written as .json for tensorrt-llm", id="not YAML")


@pytest.mark.parametrize(("content", "arguments", "message"), list(sources()))
def test_what_cannot_be_converted_is_refused(tmp_path: Path, content: object, arguments: str, message: str) -> None:
    (tmp_path / "source.json").write_text(json.dumps(content))
    result = convert(tmp_path / "source.json", tmp_path / "target.json", *arguments.split())
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert message in line
    assert not (tmp_path / "target.json").exists()


@pytest.mark.parametrize(
    "text", ["a: [", "- 1\n- 2\n", "initial_global_assignments: 5\n", "!!python/object:os.system {}"]
)
def test_unusable_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(InputError):
        read_placement(tmp_path / "p.yaml")
    with pytest.raises(InputError, match="the placement file does not exist"):
        read_placement(tmp_path / "absent.yaml")
