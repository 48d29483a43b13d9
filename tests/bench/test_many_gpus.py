"""`benchmarks/many_gpus.py` proves itself on a CPU: every part runs; what fails or hangs is told and left behind."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from rich.console import Console

from eplb_core.launch.bounded import Ended, run_bounded

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
REHEARSAL_S = 100.0


def rehearse(out: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Run the script on the CPU; return its exit code, its document and what it printed."""
    command = [sys.executable, str(SCRIPTS / "many_gpus.py"), "--device", "cpu", "--json", str(out), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=REHEARSAL_S, check=False)
    assert out.exists(), ended.stderr
    return ended.returncode, json.loads(out.read_text()), ended.stdout + ended.stderr


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("many_gpus")


@pytest.fixture
def campaign(scripts: ModuleType, tmp_path: Path) -> Any:
    """A campaign that has run nothing yet."""
    given = scripts.parse_arguments(["--device", "cpu", "--json", str(tmp_path / "out.json")])
    findings = scripts.Findings(given.json, Console(quiet=True), {})
    made = scripts.Campaign(given, findings)
    made.part = "backends"
    return made


def test_a_rehearsal_on_the_cpu_measures_every_part_and_writes_it_down(tmp_path: Path) -> None:
    pytest.importorskip("nixl", reason="the nixl extra is not installed")
    parts = ["--only", "link", "backends", "peers", "inference", "--workloads", "DeepSeek-V3", "nothing", "1 swap"]
    backends = ["--backends", "torch_gloo", "nixl?mode=direct", "--vllm", str(tmp_path / "nothing")]
    code, document, printed = rehearse(tmp_path / "out.json", *parts, *backends)
    assert code == 0, printed
    assert document["finished"]
    assert document["good"]
    few = {}
    for row in document["rows"]:
        if row["workload"] in ("nothing", "1 swap"):
            few[row["workload"], row["what"]] = row
    rows = {(row["part"], row["what"]): row for row in document["rows"] if row not in few.values()}
    assert len(few) == 4
    for (workload, _), row in few.items():
        assert row["state"] == "ok"
        assert row["details"]["bytes_moved"] == (workload == "1 swap") * 2 * row["details"]["expert_bytes"]
        # What moves nothing has a time, and no rate.
        assert (row["gb_per_s"] is None, row["link_share"] is None) == ((workload == "nothing",) * 2)
    moved = [f"{backend}{paced}" for backend in ("torch_gloo", "nixl?mode=direct") for paced in ("", " paced")]
    assert list(rows) == [
        ("link", "one copies"),
        ("link", "all copy"),
        ("backends", "torch_gloo"),
        ("backends", "nixl?mode=direct"),
        ("peers", "vLLM 0.33.0"),
        *(("inference", what) for what in moved),
    ]
    skipped = rows.pop(("peers", "vLLM 0.33.0"))
    assert skipped["state"] == "skipped"
    assert "holds no vLLM" in skipped["reason"]
    assert {row["state"] for row in rows.values()} == {"ok"}
    link = rows["link", "all copy"]["gb_per_s"]
    for (part, _), row in rows.items():
        assert row["gb_per_s"] > 0
        if part != "link":
            assert math.isclose(row["link_share"], row["gb_per_s"] / link)
            assert row["details"]["wrong_tensors"] == 0
        assert (part == "inference") == (row["slowdown"] is not None)
    assert rows["backends", "torch_gloo"]["details"]["devices"] == ["cpu", "cpu"]
    for what in moved[1::2]:
        details = rows["inference", what]["details"]
        assert details["pace"] > 0
        assert details["batches"] > 0


@pytest.mark.nightly
def test_the_whole_rehearsal_passes_with_four_ranks(tmp_path: Path) -> None:
    code, document, printed = rehearse(
        tmp_path / "out.json", "--ranks", "4", "--only", "link", "tests", "backends", "inference"
    )
    assert code == 0, printed
    assert {row["what"]: row["state"] for row in document["rows"] if row["part"] == "tests"} == {
        "test_nccl_multi.py": "skipped",
        "test_killed_rank.py": "ok",
        "test_job_streams.py": "skipped",
    }


@pytest.mark.nightly
def test_a_script_that_hangs_ends_itself_and_says_so(tmp_path: Path) -> None:
    program = (
        "import sys, time, many_gpus; many_gpus._GRACE_S = 0.1; "
        "many_gpus.Campaign.run_link = lambda self, limit_s: time.sleep(60); "
        f"many_gpus.main(['--device', 'cpu', '--only', 'link', '--limit', '5', '--json', {str(tmp_path / 'out')!r}])"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=SCRIPTS, timeout=50, check=False)
    assert ended.returncode == 1
    document = json.loads((tmp_path / "out").read_text())
    assert not document["finished"]
    assert "ended by force" in document["rows"][-1]["reason"]


def test_what_fails_becomes_a_row_with_its_reason(campaign: Any) -> None:
    def work(_: float) -> None:
        raise OSError("the cable is out")

    campaign.row("nixl", "44 MB", work)
    (row,) = campaign.findings.rows
    assert (row.state, row.reason) == ("failed", "OSError: the cable is out")
    assert not campaign.findings.good


def test_what_hung_once_is_not_run_again_and_takes_no_more_time(campaign: Any) -> None:
    ran = []

    def work(left: float) -> None:
        ran.append(left)
        raise RuntimeError("did not end within 60 s")

    for workload in ("44 MB", "4.7 MB"):
        campaign.row("nixl", workload, work)
    assert len(ran) == 1
    assert [row.state for row in campaign.findings.rows] == ["failed", "failed"]
    assert "not run again" in campaign.findings.rows[1].reason


def test_nothing_is_started_once_the_time_of_its_part_is_used_up(campaign: Any) -> None:
    campaign.part_end = time.monotonic()
    campaign.end = campaign.part_end
    campaign.row("nixl", "44 MB", lambda left: pytest.fail("it was started"))
    campaign.perform([])
    (row,) = campaign.findings.rows
    assert (row.state, row.reason) == ("failed", "not run: the time is used up")


def test_what_found_its_part_used_up_is_run_at_the_end_if_time_is_left(campaign: Any) -> None:
    row = importlib.import_module("findings").Row
    campaign.part, campaign.part_end = "backends", time.monotonic()
    campaign.row("nixl", "44 MB", lambda left: row(part=campaign.part, what="nixl", workload="44 MB"))
    assert not campaign.findings.rows
    campaign.part = "inference"
    campaign.perform([])
    (found,) = campaign.findings.rows
    assert (found.part, found.state) == ("backends", "ok")


@pytest.mark.parametrize(("ours", "good"), [(True, False), (False, True)])
def test_wrong_bytes_count_against_us_only_where_we_moved_them(campaign: Any, ours: bool, good: bool) -> None:
    row = importlib.import_module("findings").Row
    campaign.findings.add(row(part="link", what="all copy"))
    campaign.findings.add(row(part="peers", what="vLLM nixl", ours=ours, state="wrong", reason="13 tensors"))
    assert campaign.findings.good is good


def test_a_failure_on_any_rank_fails_the_file_of_tests(scripts: ModuleType) -> None:
    ended = Ended(1, "", "torchrun: one failed", 9.0)
    told = ["31 passed in 8.99s\n", "FAILED test_x.py::test_y - assert 1 == 2\n1 failed, 30 passed in 9.01s\n"]
    row = importlib.import_module("gpu_tests").judge("test_x.py", ended, told)
    assert (row.state, row.reason) == ("failed", "test_x.py::test_y - assert 1 == 2")
    assert row.remark == "30 passed, 0 skipped"


def test_beside_inference_runs_what_moves_something_or_says_that_nothing_does(
    scripts: ModuleType, campaign: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(campaign, "row", lambda what, workload, work: ran.append(workload))
    nothing, swap = (size for size in campaign.sizes if size.name in ("nothing", "1 swap"))
    campaign.sizes = [nothing, swap]
    campaign.run_inference(1.0)
    assert set(ran) == {"1 swap"}
    campaign.sizes = [nothing]
    campaign.run_inference(1.0)
    assert campaign.findings.rows[-1].state == "skipped"


def test_a_deepseek_expert_has_the_bytes_of_its_three_matrices_and_their_scales(scripts: ModuleType) -> None:
    # 7168 x 2048 in fp8, and a float32 for every block of 128 x 128.
    assert importlib.import_module("workload_sizes").deepseek_tensors(1) == (14_680_064,) * 3 + (56 * 16 * 4,) * 3


def test_a_command_that_does_not_end_is_ended_with_all_that_it_started(scripts: ModuleType, tmp_path: Path) -> None:
    # As torchrun does, it starts its child in a session of its own.
    program = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    ended = run_bounded([sys.executable, "-c", program], 1.0)
    assert ended.exit_code is None
    assert "did not end within" in ended.reason
    with contextlib.suppress(psutil.NoSuchProcess):
        assert (
            psutil.Process(int(ended.stdout)).status() == psutil.STATUS_ZOMBIE
        )  # whoever has inherited it may be slow
