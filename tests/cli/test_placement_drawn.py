"""`eplb placement show` and `diff` say which rank holds which expert, and what a change moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from eplb_core.cli import main
from eplb_core.inputs.placements import write_placement

# Two ranks of three slots, four experts. Layer 1 does not change.
OLD = np.array([[0, 1, 2, 3, 0, -1], [0, 1, 2, 3, 2, 1]])
NEW = np.array([[3, 1, 0, 2, 0, 1], [0, 1, 2, 3, 2, 1]])
LOADS = [[6, 2, 3, 1], [1, 1, 1, 1]]
# Layer 0: expert 3 crosses to rank 0, experts 1 and 2 to rank 1. Expert 0 keeps its slot on rank 0 unless the file is
# taken slot by slot; then slot 2 gets it by a copy on the rank.
CROSS, KEPT_CHANGES, PLANNED_CHANGES = 3, 3, 4


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["placement", *map(str, arguments)])


def document(*arguments: object) -> Any:
    result = run(*arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, placement in (("old", OLD), ("new", NEW)):
        write_placement(tmp_path / f"{name}.json", placement, num_ranks=2)
    (tmp_path / "loads.json").write_text(json.dumps({"loads": LOADS}))
    return tmp_path


def cells(output: str, first: str) -> list[str]:
    """Return the words of the table's row that begins with `first`."""
    (line,) = [line for line in output.splitlines() if line.split()[:1] == [first]]
    return line.split()


def test_show_lists_the_experts_of_each_rank_and_marks_copies_and_empty_slots(folder: Path) -> None:
    result = run("show", folder / "old.json")

    assert result.exit_code == 0, result.output
    assert "eplb, 2 layers of 4 experts in 6 slots, 2 ranks" in result.output
    # layer, three slots of each rank, spare copies, most copies, empty slots
    assert cells(result.output, "0") == ["0", "0*", "1", "2", "3", "0*", "-", "1", "2", "1"]
    assert cells(result.output, "1") == ["1", "0", "1*", "2*", "3", "2*", "1*", "2", "2", "0"]


def test_show_judges_the_balance_by_recorded_loads(folder: Path) -> None:
    shown = document("show", folder / "old.json", "--loads", folder / "loads.json")
    # Layer 0: half of expert 0, and experts 1 and 2, against expert 3 and the other half: 8 and 4, the mean is 6.
    # Layer 1: 1 + 1/2 + 1/2 on both.
    assert [layer["imbalance"] for layer in shown["layers"]] == pytest.approx([8 / 6, 1.0])


def test_show_writes_each_slot_as_json(folder: Path) -> None:
    shown = document("show", folder / "old.json", "--layers", "0:1")
    assert (shown["ranks"], shown["slots"], shown["experts"]) == (2, 6, 4)
    (layer,) = shown["layers"]
    assert layer["ranks"] == [[0, 1, 2], [3, 0, -1]]
    assert (layer["copies"], layer["empty_slots"]) == ([2, 1, 1, 1], 1)


def test_a_wide_layer_is_summed_up_and_listed_rank_by_rank_where_layers_are_chosen(tmp_path: Path) -> None:
    write_placement(tmp_path / "wide.json", np.tile(np.arange(128), (3, 1)), num_ranks=8)

    summed, listed = run("show", tmp_path / "wide.json"), run("show", tmp_path / "wide.json", "--layers", "1:2")

    assert "rank 0" not in summed.output
    assert "--layers" in summed.output
    assert cells(listed.output, "7") == ["7", *map(str, range(112, 128))]


def test_diff_says_what_crosses_and_which_experts_come_and_go(folder: Path) -> None:
    result = run("diff", folder / "old.json", folder / "new.json", "--loads", folder / "loads.json")

    assert result.exit_code == 0, result.output
    assert f"{CROSS} experts cross between ranks" in result.output
    # rank 0 gets 3 and loses 2; rank 1 gets 1 and 2 and loses 3
    assert cells(result.output, "0")[:8] == ["0", "+3", "-2", "+1", "+2", "-3", str(KEPT_CHANGES), str(CROSS)]
    assert "1 layer without a change" in result.output


@pytest.mark.parametrize(("option", "changes"), [((), KEPT_CHANGES), (("--as-planned",), PLANNED_CHANGES)])
def test_an_expert_keeps_its_slot_on_a_rank_unless_the_file_is_taken_slot_by_slot(
    folder: Path, option: tuple[str, ...], changes: int
) -> None:
    assert document("diff", folder / "old.json", folder / "new.json", *option)["slots_changed"] == changes


def test_diff_counts_experts_and_bytes_from_rank_to_rank(folder: Path) -> None:
    found = document("diff", folder / "old.json", folder / "new.json", "--expert-bytes", "2MB", "--nodes", "2")

    assert found["experts_from_to"] == [[0, 2], [1, 0]]
    assert (found["bytes_remote"], found["experts_between_nodes"]) == (CROSS * 2_000_000, CROSS)
    crossed = {(each["layer"], each["expert"], each["from_rank"], each["to_rank"]) for each in found["transfers"]}
    assert crossed == {(0, 3, 1, 0), (0, 1, 0, 1), (0, 2, 0, 1)}
    assert found["layers"][0]["ranks"] == [{"gets": [3], "loses": [2]}, {"gets": [1, 2], "loses": [3]}]


def test_of_many_ranks_the_busiest_links_are_listed(tmp_path: Path) -> None:
    old = np.arange(40)[None]
    write_placement(tmp_path / "old.json", old, num_ranks=20)
    write_placement(tmp_path / "new.json", np.roll(old, 2, axis=1), num_ranks=20)

    output = run("diff", tmp_path / "old.json", tmp_path / "new.json").output

    assert "busiest of 20 links" in output
    assert cells(output.replace("rank 0 to rank 1 ", "0-to-1 "), "0-to-1") == ["0-to-1", "2"]


def test_equal_placements_are_told_as_such(folder: Path) -> None:
    result = run("diff", folder / "old.json", folder / "old.json")
    assert result.exit_code == 0
    assert "2 layers without a change" in result.output


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
@pytest.mark.parametrize("command", ["show", "diff"])
def test_both_are_drawn_as_a_picture(folder: Path, command: str, suffix: str, begins: bytes) -> None:
    pytest.importorskip("matplotlib", reason="the extra eplb[plot] is not installed")
    files = [folder / "old.json"] + ([folder / "new.json"] if command == "diff" else [])
    picture = folder / f"drawn{suffix}"

    result = run(command, *files, "--loads", folder / "loads.json", "--plot", picture)

    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(begins)


def test_what_does_not_fit_is_refused_by_name(folder: Path) -> None:
    (folder / "list.json").write_text(json.dumps(OLD.tolist()))
    write_placement(folder / "narrow.json", OLD[:, :4].clip(0), num_ranks=2)
    (folder / "three.json").write_text(json.dumps({"loads": [*LOADS, LOADS[0]]}))
    for arguments, said in (
        (("show", folder / "list.json"), "give --ranks"),
        (("show", folder / "old.json", "--ranks", 3), "--ranks is 3, but the placement is for 2"),
        (("show", folder / "old.json", "--layers", "5:9"), "selects no layers"),
        (("show", folder / "old.json", "--loads", folder / "three.json"), "3 layers, the placement 2"),
        (("show", folder / "old.json", "--plot", folder / "x.pdf"), ".png or .svg"),
        (("diff", folder / "old.json", folder / "narrow.json"), "different shapes"),
        (("diff", folder / "old.json", folder / "new.json", "--nodes", 3), "cannot be shared evenly by 3 nodes"),
    ):
        result = run(*arguments)
        assert (result.exit_code, said in result.output) == (2, True), result.output


def test_a_file_that_does_not_say_the_ranks_takes_them_from_the_other(folder: Path) -> None:
    (folder / "list.json").write_text(json.dumps(NEW.tolist()))
    assert document("diff", folder / "old.json", folder / "list.json")["experts_remote"] == CROSS
