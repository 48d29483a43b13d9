"""Checkpoints of the known families are read byte for byte, lazily, and damaged ones are refused by name."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eplb_core.errors import HandshakeError, InputError
from eplb_core.inputs.checkpoint import Checkpoint
from eplb_core.inputs.checkpoint_wire import decode_checkpoint, encode_checkpoint
from eplb_core.inputs.experts import TensorSpec
from eplb_core.inputs.make_checkpoint import STYLES, Style, make_checkpoint
from eplb_core.inputs.models import MODELS, RandomExperts, find_model, parse_scale, scaled

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def made(tmp_path: Path) -> MakeCheckpoint:
    """Make a small checkpoint: 2 MoE layers, 3 experts."""

    def make(style: Style, *, shards: int = 2) -> Path:
        directory = tmp_path / style
        make_checkpoint(directory, style=style, layers=2, experts=3, hidden=8, intermediate=16, shards=shards, seed=7)
        return directory

    return make


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Load every shard with safetensors alone."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite a checkpoint of one shard and no index, after `change` was applied to its tensors."""
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)


def edit_config(directory: Path, **settings: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


# Expected names are spelled out here, family by family, as the published checkpoints have them.
FAMILIES = {
    "mixtral": ("model.layers.{layer}.block_sparse_moe.experts.{expert}.", "w1", "w3", "w2", 0),
    "qwen3": ("model.layers.{layer}.mlp.experts.{expert}.", "gate_proj", "up_proj", "down_proj", 0),
    "deepseek": ("model.layers.{layer}.mlp.experts.{expert}.", "gate_proj", "up_proj", "down_proj", 1),
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("style", STYLES)
def test_every_expert_has_its_tensors_and_no_others(made: MakeCheckpoint, style: Style, shards: int) -> None:
    directory = made(style, shards=shards)
    stored = all_tensors(directory)
    checkpoint = Checkpoint.open(directory)
    prefix, gate, up, down, first_layer = FAMILIES[style]
    for layer in range(2):
        names = [spec.name for spec in checkpoint.tensor_specs(layer)]
        for expert in range(3):
            name = prefix.format(layer=first_layer + layer, expert=expert)
            expected = {projection: raw(stored[f"{name}{projection}.weight"]) for projection in (gate, up, down)}
            if style == "deepseek":
                scales = [f"{projection}.weight_scale_inv" for projection in (gate, up, down)]
                expected |= {scale: raw(stored[name + scale]) for scale in scales}
            found = [raw(tensor) for tensor in checkpoint.expert_tensors(layer, expert)]
            assert dict(zip(names, found, strict=True)) == expected


@pytest.mark.parametrize("style", STYLES)
def test_tensors_are_as_their_specs_say(made: MakeCheckpoint, style: Style) -> None:
    checkpoint = Checkpoint.open(made(style))
    for layer in range(checkpoint.num_layers):
        found = [(tensor.shape, tensor.dtype) for tensor in checkpoint.expert_tensors(layer, 1)]
        assert found == [(spec.shape, spec.torch_dtype) for spec in checkpoint.tensor_specs(layer)]


def test_fp8_weights_come_with_their_scales(made: MakeCheckpoint) -> None:
    assert Checkpoint.open(made("deepseek")).tensor_specs(0) == (
        TensorSpec("down_proj", (8, 16), "float8_e4m3fn"),
        TensorSpec("gate_proj", (16, 8), "float8_e4m3fn"),
        TensorSpec("up_proj", (16, 8), "float8_e4m3fn"),
        TensorSpec("down_proj.weight_scale_inv", (1, 1), "float32"),
        TensorSpec("gate_proj.weight_scale_inv", (1, 1), "float32"),
        TensorSpec("up_proj.weight_scale_inv", (1, 1), "float32"),
    )


def test_dense_and_prediction_layers_are_not_counted(made: MakeCheckpoint) -> None:
    checkpoint = Checkpoint.open(made("deepseek"))
    assert checkpoint.layer_ids == (1, 2)
    assert checkpoint.num_layers == 2
    assert checkpoint.num_hidden_layers == 3
    assert checkpoint.notes == (
        "experts of prediction layers were left out: model.layers.N.mlp.experts (layer 3); "
        "--part mtp balances them alone",
    )


def test_prediction_layers_can_be_balanced_alone(made: MakeCheckpoint) -> None:
    checkpoint = Checkpoint.open(made("deepseek"), part="mtp")
    assert (checkpoint.layer_ids, checkpoint.num_experts, checkpoint.notes) == ((3,), 3, ())
    assert checkpoint.num_hidden_layers is None


def test_files_without_an_index_are_found(made: MakeCheckpoint) -> None:
    directory = made("qwen3", shards=3)
    indexed = Checkpoint.open(directory).expert_tensors(1, 2)
    (directory / "model.safetensors.index.json").unlink()
    assert [raw(t) for t in Checkpoint.open(directory).expert_tensors(1, 2)] == [raw(t) for t in indexed]


def test_a_checkpoint_without_config_is_read_by_its_names_alone(made: MakeCheckpoint) -> None:
    directory = made("mixtral")
    (directory / "config.json").unlink()
    checkpoint = Checkpoint.open(directory)
    assert (checkpoint.num_layers, checkpoint.num_experts) == (2, 3)


def test_opening_and_reading_one_expert_leaves_damaged_other_experts_alone(made: MakeCheckpoint) -> None:
    directory = made("mixtral", shards=1)
    (path,) = directory.glob("*.safetensors")
    before = [raw(tensor) for tensor in Checkpoint.open(directory).expert_tensors(0, 0)]
    header_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    content = path.read_bytes()
    offset = json.loads(content[8:header_bytes])["model.layers.1.block_sparse_moe.experts.2.w2.weight"]["data_offsets"]
    place = header_bytes + offset[0]
    path.write_bytes(content[:place] + bytes(16) + content[place + 16 :])
    changed = Checkpoint.open(directory)
    assert [raw(tensor) for tensor in changed.expert_tensors(0, 0)] == before
    assert raw(changed.expert_tensors(1, 2)[1])[:16] == bytes(16)


def refusals() -> Iterator[object]:
    """How to damage a Mixtral checkpoint of one shard, and what the message has to name."""
    expert = "model.layers.1.block_sparse_moe.experts.2"

    def drop_expert(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(expert)]:
            del tensors[name]

    def drop_projection(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{expert}.w3.weight"]

    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{expert}.w2.weight"] = torch.zeros(8, 15, dtype=torch.bfloat16)

    def retype(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{expert}.w2.weight"] = torch.zeros(8, 16, dtype=torch.float16)

    def add_part(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{expert}.w2.bias"] = torch.zeros(8)

    def no_experts(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "experts" in name]:
            del tensors[name]

    def one_too_many(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.block_sparse_moe.experts.3.w1.weight"] = torch.zeros(16, 8)

    def layer_too_many(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.5.block_sparse_moe.experts.0.w1.weight"] = torch.zeros(16, 8)

    yield pytest.param(drop_expert, "expert 2 of layer 1 is missing", f"{expert}.w1.weight", id="missing expert")
    yield pytest.param(drop_projection, "expert 2 of layer 1 lacks", f"{expert}.w3.weight", id="missing projection")
    yield pytest.param(reshape, "experts of layer 1 differ", f"{expert}.w2.weight", id="another shape")
    yield pytest.param(retype, "experts of layer 1 differ", f"{expert}.w2.weight", id="another dtype")
    yield pytest.param(add_part, "expert 0 of layer 1 lacks", "experts.0.w2.bias", id="a part of one expert only")
    yield pytest.param(no_experts, "no experts", "mixtral", id="no experts")
    yield pytest.param(one_too_many, "states 3 experts, but the checkpoint has expert 3", "mixtral", id="more experts")
    yield pytest.param(layer_too_many, "states 2 layers", "model.layers.5", id="more layers")


@pytest.mark.parametrize(("change", "message", "named"), list(refusals()))
def test_a_damaged_checkpoint_is_refused(
    made: MakeCheckpoint, change: Callable[[dict[str, torch.Tensor]], None], message: str, named: str
) -> None:
    directory = made("mixtral", shards=1)
    edit(directory, change)
    with pytest.raises(InputError, match=message) as caught:
        Checkpoint.open(directory)
    assert named in str(caught.value)


def test_a_scale_of_one_projection_only_is_moved_like_any_other_tensor(made: MakeCheckpoint) -> None:
    directory = made("mixtral", shards=1)

    def add_scale(tensors: dict[str, torch.Tensor]) -> None:
        for expert in range(3):
            tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight_scale"] = torch.ones(1) * expert

    edit(directory, add_scale)
    checkpoint = Checkpoint.open(directory)
    assert [spec.name for spec in checkpoint.tensor_specs(0)] == ["w1", "w2", "w3"]
    assert [spec.name for spec in checkpoint.tensor_specs(1)] == ["w1", "w2", "w3", "w1.weight_scale"]
    assert checkpoint.expert_tensors(1, 2)[3].tolist() == [2.0]


def test_an_expert_that_config_counts_but_no_layer_has_is_missing(made: MakeCheckpoint) -> None:
    directory = made("qwen3")
    edit_config(directory, num_experts=4)
    with pytest.raises(InputError, match=r"expert 3 of layer 0 is missing .*config\.json states 4 experts"):
        Checkpoint.open(directory)


def test_a_missing_shard_is_named_with_a_tensor_it_should_hold(made: MakeCheckpoint) -> None:
    directory = made("mixtral", shards=2)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"a shard is missing \(.*model-00002-of-00002.safetensors\): .*experts"):
        Checkpoint.open(directory)


def test_a_tensor_that_the_index_promises_in_vain_is_named(made: MakeCheckpoint) -> None:
    directory = made("mixtral", shards=2)
    first, second = sorted(directory.glob("*.safetensors"))
    shutil.copy(first, second)
    with pytest.raises(InputError, match=r"a tensor is missing in its shard .*00002.*experts.*weight"):
        Checkpoint.open(directory)


def test_a_truncated_shard_is_refused(made: MakeCheckpoint) -> None:
    directory = made("mixtral", shards=1)
    (path,) = directory.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="a shard cannot be read as safetensors"):
        Checkpoint.open(directory)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "[]", "config.json is not a JSON object"),
        ("model.safetensors.index.json", "{}", "no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}', "no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../secret"}}', "which is not a file name"),
    ],
)
def test_a_damaged_description_is_refused(made: MakeCheckpoint, name: str, content: str, message: str) -> None:
    directory = made("mixtral")
    (directory / name).write_text(content)
    with pytest.raises(InputError, match=message):
        Checkpoint.open(directory)


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the checkpoint does not exist"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(InputError, match="holds no safetensors checkpoint"):
        Checkpoint.open(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="the checkpoint is not a directory"):
        Checkpoint.open(tmp_path / "file")


def test_a_checkpoint_is_not_made_in_a_folder_with_files(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(InputError, match="not empty"):
        make_checkpoint(tmp_path)


def test_a_checkpoint_of_our_own_is_replaced_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, experts=4, shards=3)
    make_checkpoint(tmp_path, experts=6, shards=1)

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]
    assert Checkpoint.open(tmp_path).num_experts == 6


def test_a_checkpoint_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["made_by_eplb"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    with pytest.raises(InputError, match="was not written by eplb make-checkpoint"):
        make_checkpoint(tmp_path)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_beside_a_checkpoint_of_our_own_keeps_all_of_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "precious").touch()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    with pytest.raises(InputError, match="it also holds precious"):
        make_checkpoint(tmp_path, experts=4)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_without_experts_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="experts is 0"):
        make_checkpoint(tmp_path, experts=0)


# Bytes of one expert in one layer, by hand from the shapes that the models publish.
EXPERT_BYTES = {
    "deepseek-v3": 44_040_192 + 4 * (32 * 56 + 56 * 16),
    "qwen3-30b-a3b": 9_437_184,
    "qwen3-235b-a22b": 37_748_736,
    "mixtral-8x7b": 352_321_536,
    "gpt-oss-120b": (5760 + 2880) * (2880 // 2 + 2880 // 32 + 2),
}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_published_expert_has_its_published_size(model: object) -> None:
    assert find_model(model.name).expert_bytes == EXPERT_BYTES[model.name]  # type: ignore[attr-defined]


def test_an_unknown_model_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model called 'DeepSeek-V2'.*did you mean deepseek-v3"):
        find_model("DeepSeek-V2")


def test_scaling_shrinks_rows_and_keeps_one_at_least() -> None:
    tensors = scaled(find_model("deepseek-v3").tensors, parse_scale("1/64"))
    assert [tensor.shape for tensor in tensors] == [(64, 7168), (112, 2048), (1, 56), (1, 16)]


@pytest.mark.parametrize("text", ["0", "-1/2", "2", "1/0", "", "half", "nan"])
def test_a_scale_outside_0_to_1_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a scale"):
        parse_scale(text)


def test_random_experts_are_the_same_for_everyone_and_differ_from_one_another() -> None:
    tensors = (TensorSpec("w13", (3, 5), "float8_e4m3fn"), TensorSpec("w2", (7,), "bfloat16"))
    contents = set()
    for seed in range(2):
        source, again = (RandomExperts(tensors, num_layers=2, num_experts=2, seed=seed) for _ in range(2))
        for layer in range(2):
            for expert in range(2):
                made = source.expert_tensors(layer, expert)
                assert [(tensor.shape, tensor.dtype) for tensor in made] == [
                    ((3, 5), torch.float8_e4m3fn),
                    ((7,), torch.bfloat16),
                ]
                assert [raw(t) for t in made] == [raw(t) for t in again.expert_tensors(layer, expert)]
                contents.update(raw(tensor) for tensor in made)
    assert len(contents) == 2 * 2 * 2 * 2


def test_an_open_checkpoint_can_be_sent_and_needs_no_header_again(made: MakeCheckpoint) -> None:
    directory = made("mixtral", shards=1)
    checkpoint = Checkpoint.open(directory)
    expected = [raw(tensor) for tensor in checkpoint.expert_tensors(1, 2)]
    (path,) = directory.glob("*.safetensors")
    content = path.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    path.write_bytes(content[:8] + b"?" * header_bytes + content[8 + header_bytes :])
    sent = pickle.loads(pickle.dumps(checkpoint))  # noqa: S301 - what this test made itself
    assert [raw(tensor) for tensor in sent.expert_tensors(1, 2)] == expected


@pytest.mark.parametrize("style", STYLES)
def test_a_table_sent_to_another_rank_reads_the_same(made: MakeCheckpoint, style: Style) -> None:
    checkpoint = Checkpoint.open(made(style))
    received = decode_checkpoint(encode_checkpoint(checkpoint))
    for name in ("layer_ids", "num_experts", "num_groups", "num_hidden_layers", "notes", "left_out", "files"):
        assert getattr(received, name) == getattr(checkpoint, name)
    for layer in range(2):
        assert received.tensor_specs(layer) == checkpoint.tensor_specs(layer)
        expected = [raw(tensor) for tensor in checkpoint.expert_tensors(layer, 2)]
        assert [raw(tensor) for tensor in received.expert_tensors(layer, 2)] == expected


def test_a_rank_that_sees_other_files_refuses_the_table(made: MakeCheckpoint) -> None:
    directory = made("mixtral", shards=1)
    payload = encode_checkpoint(Checkpoint.open(directory))
    (path,) = directory.glob("*.safetensors")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"?")
    with pytest.raises(
        InputError, match=rf"differs from the one that rank 0 has read .*it has {size + 1} bytes here, {size} there"
    ):
        decode_checkpoint(payload)
    path.unlink()
    with pytest.raises(InputError, match="a shard is missing on this machine"):
        decode_checkpoint(payload)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b.replace(b"int64", b"objec"), lambda b: b"\x90"])
def test_bytes_that_are_no_table_are_refused(made: MakeCheckpoint, damage: Callable[[bytes], bytes]) -> None:
    payload = damage(encode_checkpoint(Checkpoint.open(made("mixtral"))))
    with pytest.raises(HandshakeError):
        decode_checkpoint(payload)


def test_a_shard_that_was_cut_after_opening_is_noticed(made: MakeCheckpoint) -> None:
    directory = made("mixtral", shards=1)
    checkpoint = Checkpoint.open(directory)
    (path,) = directory.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="a tensor of the checkpoint changed after it was opened"):
        checkpoint.expert_tensors(1, 2)
    path.unlink()
    with pytest.raises(InputError, match=r"a tensor cannot be read .*No such file"):
        checkpoint.expert_tensors(1, 2)


def test_many_shards_need_few_open_files(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "many", experts=30, hidden=8, intermediate=8, shards=100)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 8, limits[1]))
    try:
        checkpoint = Checkpoint.open(tmp_path / "many")
        for expert in range(30):
            checkpoint.expert_tensors(1, expert)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert checkpoint.num_experts == 30


def test_another_index_is_followed_and_several_are_refused(made: MakeCheckpoint) -> None:
    directory = made("mixtral")
    index = directory / "model.safetensors.index.json"
    index.rename(directory / "consolidated.safetensors.index.json")
    assert Checkpoint.open(directory).num_experts == 3
    shutil.copy(directory / "consolidated.safetensors.index.json", directory / "model.fp8.safetensors.index.json")
    with pytest.raises(InputError, match=r"the directory has several checkpoints .*consolidated.*, model\.fp8"):
        Checkpoint.open(directory)
