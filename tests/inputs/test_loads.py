"""Loads and placements are read from every format, and anything unusable is refused with one clear message."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eplb_core.errors import InputError
from eplb_core.inputs.loads import read_loads
from eplb_core.inputs.placements import read_placement, write_placement

EXAMPLES = Path(__file__).parents[2] / "examples"

LOADS = [[1.0, 2.0, 3.5], [4.0, 0.0, 6.0]]
STEPS = [[[1, 2, 3], [4, 5, 6]], [[10, 20, 30], [40, 50, 60]]]
SUMMED = [[11, 22, 33], [44, 55, 66]]


def write(path: Path, content: object) -> Path:
    """Write `content` in the format that the file's name asks for."""
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(content))
        case ".npy":
            np.save(path, np.array(content))
        case ".npz":
            arrays = content if isinstance(content, dict) else {"loads": content}
            np.savez(path, **{name: np.array(value) for name, value in arrays.items()})
        case ".pt":
            torch.save(content, path)
    return path


@pytest.mark.parametrize("extension", [".json", ".npy", ".npz"])
def test_loads_of_layers_and_experts_are_read_as_they_are(tmp_path: Path, extension: str) -> None:
    loads = read_loads(write(tmp_path / f"loads{extension}", LOADS))
    assert loads.dtype == np.float64
    assert loads.tolist() == LOADS


@pytest.mark.parametrize("extension", [".json", ".npy", ".npz"])
def test_loads_of_several_steps_are_summed(tmp_path: Path, extension: str) -> None:
    assert read_loads(write(tmp_path / f"loads{extension}", STEPS)).tolist() == SUMMED


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_a_torch_file_with_logical_count_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    dump = {"rank": 0, "logical_count": torch.tensor(STEPS, dtype=dtype), "rate": torch.zeros(3)}
    assert read_loads(write(tmp_path / "dump.pt", dump)).tolist() == SUMMED


def test_a_torch_file_with_a_tensor_alone_is_read(tmp_path: Path) -> None:
    assert read_loads(write(tmp_path / "dump.pt", torch.tensor(LOADS))).tolist() == LOADS


def test_the_array_called_loads_is_preferred_to_others(tmp_path: Path) -> None:
    path = write(tmp_path / "loads.npz", {"other": [[7]], "loads": LOADS, "logical_count": [[8]]})
    assert read_loads(path).tolist() == LOADS


def test_an_only_array_may_have_any_name(tmp_path: Path) -> None:
    assert read_loads(write(tmp_path / "loads.json", {"made by": "hand", "counts": LOADS})).tolist() == LOADS


def test_the_shipped_example_is_the_published_one() -> None:
    loads = read_loads(EXAMPLES / "published-loads.json")
    assert loads.shape == (2, 12)
    assert loads.sum(axis=1).tolist() == [1033, 1156]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("flat.json", [1, 2, 3], "1 dimension instead of 2 or 3"),
        ("number.json", 5, "0 dimensions instead of 2 or 3"),
        ("deep.npz", [[[[1]]]], "4 dimensions instead of 2 or 3"),
        ("empty.json", [], "1 dimension instead of 2 or 3"),
        ("no-experts.json", [[], []], "the loads are empty"),
        ("no-layers.npz", np.zeros((0, 4)), "the loads are empty"),
        ("nan.json", [[1, float("nan")]], "1 load is NaN .*: it is nan at layer 0, expert 1"),
        ("infinite.npz", [[1, 2], [float("inf"), 1]], "1 load is infinite .*: it is inf at layer 1, expert 0"),
        ("negative.json", [[1, -2], [-3, 4]], "2 loads are negative .*: the first is -2 at layer 0, expert 1"),
        ("step.json", [[[1, 2]], [[1, -5]]], "it is -5 at step 1, layer 0, expert 1"),
        ("overflow.json", [[[1e308]], [[1e308]]], "infinite after summing the steps"),
        ("ragged.json", [[1, 2], [3]], "rows of the loads have different lengths"),
        ("words.json", [["a", "b"]], "the loads are not numbers"),
        ("flags.json", [[True, False]], "the loads are not numbers"),
        ("null.json", [[None, 1]], "the loads are not numbers"),
        ("two.npz", {"a": [[1]], "b": [[2]]}, "several arrays, and none is called 'loads'.*: it has a, b"),
        ("none.json", {"note": "nothing"}, "no array, and none is called 'loads'"),
        ("none.npz", {}, "no array, and none is called 'loads'.*: it has nothing"),
        ("table.txt", LOADS, "unknown extension '.txt'"),
        ("loads", LOADS, "unknown extension ''"),
    ],
)
def test_unusable_loads_are_refused(tmp_path: Path, name: str, content: object, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as caught:
        read_loads(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["x.json", "x.npy", "x.npz", "x.pt"])
@pytest.mark.parametrize("content", [b"", b"{[", b"PK\x03\x04 truncated", bytes(range(256))])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"cannot be read as {path.suffix[1:]}"):
        read_loads(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the loads file does not exist"):
        read_loads(tmp_path / "absent.json")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="the directory holds no file with loads"):
        read_loads(tmp_path / "folder.json")


class _Payload:
    """Would make a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.target,)  # type: ignore[return-value]


def test_a_torch_file_that_carries_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path = write(tmp_path / "dump.pt", {"logical_count": _Payload(tmp_path / "ran")})
    with pytest.raises(InputError, match="cannot be read as pt"):
        read_loads(path)
    assert not (tmp_path / "ran").exists()


def test_a_numpy_file_that_carries_objects_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read as npy"):
        read_loads(tmp_path / "objects.npy")


@pytest.mark.parametrize("extension", [".json", ".npz"])
def test_a_placement_is_read_back_as_it_was_written(tmp_path: Path, extension: str) -> None:
    placement = np.array([[0, 1, -1, 2], [2, 2, 1, 0]])
    path = tmp_path / f"placement{extension}"
    write_placement(path, placement, num_ranks=2)
    read = read_placement(path)
    assert read.dtype == np.int64
    assert read.tolist() == placement.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([0, 1, 2], r"not a table \[layers, slots\]"),
        ([[]], r"not a table \[layers, slots\]"),
        ([[0.5, 1]], "not whole"),
        ([[float("nan"), 1]], "not whole"),
        ([["x"]], "not numbers"),
    ],
)
def test_an_unusable_placement_is_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_placement(write(tmp_path / "placement.json", content))


def test_a_placement_is_not_written_in_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written as \.txt"):
        write_placement(tmp_path / "placement.txt", np.zeros((1, 1), dtype=np.int64), num_ranks=1)


def test_a_placement_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the placement cannot be written"):
        write_placement(tmp_path / "absent" / "placement.json", np.zeros((1, 1), dtype=np.int64), num_ranks=1)
