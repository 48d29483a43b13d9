"""`eplb watch` shows what a job says of itself, live or as lines, and ends when the job or the user does."""

from __future__ import annotations

import http.server
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from eplb_core import Rearranger, create_eplb_communicator
from eplb_core.cli import main
from eplb_core.testing import in_process

EPLB = "import sys; sys.argv[0] = 'eplb'; from eplb_core.cli import main; main()"
WAIT_S = 60
ROW = 1000
OLD, NEW = [[0, 1, 2, 3]], [[2, 1, 0, 3]]
LOADS = [[5.0, 3.0, 1.0, 3.0]]  # 8 and 4 before: 8/6; 4 and 8 after


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["watch", *map(str, arguments)])


def statuses_of_a_job() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return what each rank of a real job says before its commit, and at its end."""

    def work(group: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        weights = [[torch.full((2, ROW), group.rank_in_group, dtype=torch.uint8)]]
        with create_eplb_communicator(group, "in_process", weights[0], registry=in_process.registry()) as communicator:
            job = Rearranger(communicator, weights).start(OLD, NEW)
            while not (job.ready_layers() or job.received):
                time.sleep(0.001)
            before = job.status()
            job.wait(WAIT_S)
            return before, job.status()

    return in_process.run_ranks(2, work)


@pytest.fixture(scope="module")
def statuses() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return statuses_of_a_job()


@pytest.fixture
def files(tmp_path: Path, statuses: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[Path]:
    """One status file a rank: the layer is received and not committed."""
    paths = [tmp_path / f"rank{rank}.json" for rank in range(2)]
    for path, (before, _) in zip(paths, statuses, strict=True):
        path.write_text(json.dumps(before))
    return paths


def test_a_job_is_a_line_with_bytes_layers_and_steps_where_there_is_no_terminal(files: list[Path]) -> None:
    result = run("--once", *files)

    assert result.exit_code == 0, result.output
    first, second = result.output.splitlines()
    for rank, line in enumerate((first, second)):
        assert f" rank {rank} rece" in line  # receiving or received
        assert "1.00 kB of 1.00 kB, 0 of 1 steps committed, ready: layers 0" in line


def test_the_imbalance_before_now_and_after_is_judged_by_recorded_loads(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "loads.json").write_text(json.dumps({"loads": LOADS}))
    result = run("--once", files[0], "--loads", tmp_path / "loads.json", "--json", "-")
    (rank,) = json.loads(result.stdout)["ranks"]
    assert rank["imbalance"] == pytest.approx({"before": 8 / 6, "now": 8 / 6, "after": 8 / 6})


def test_it_ends_by_itself_when_every_job_has_ended(
    tmp_path: Path, statuses: list[tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    path = tmp_path / "status.json"
    path.write_text(json.dumps(statuses[0][1]))
    result = run(path)
    assert result.exit_code == 0, result.output
    assert "rank 0 finished" in result.output


def test_a_job_that_failed_is_told_with_its_error_and_exit_code_1(files: list[Path]) -> None:
    status = json.loads(files[0].read_text())
    status |= {"phase": "failed", "error": {"type": "PeerLostError", "message": "rank 1 is gone"}}
    files[0].write_text(json.dumps(status))
    result = run(files[0])
    assert result.exit_code == 1
    assert "PeerLostError: rank 1 is gone" in result.output


@pytest.mark.parametrize(
    "content", [None, "", "{}", '{"phase": 3}', "[1"], ids=["no file", "empty", "{}", "type", "cut"]
)
def test_a_file_that_is_not_there_yet_or_half_written_ends_nothing(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "status.json"
    if content is not None:
        path.write_text(content)
    result = run("--once", path)
    assert result.exit_code == 0, result.output
    assert f"{path} unreadable" in result.output.replace("\n", "")


# --- endpoints -------------------------------------------------------------------------------------------------------


class Exporter:
    """Serves text as eplb-prometheus does; each answer has seen more bytes."""

    def __init__(self) -> None:
        self.running = True
        self.asked = 0
        exporter = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                exporter.asked += 1
                self.send_response(200)
                self.end_headers()
                self.wfile.write(exporter.text().encode())

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def text(self) -> str:
        who, runs = 'backend="nixl",rank="3"', int(self.running)
        return "\n".join(
            [
                "# TYPE eplb_rearrangement_in_progress gauge",
                f"eplb_rearrangement_in_progress{{{who}}} {runs}",
                "# TYPE eplb_rearrangement_bytes_planned gauge",
                f"eplb_rearrangement_bytes_planned{{{who}}} {8000 * runs}",
                "# TYPE eplb_rearrangement_bytes_ahead gauge",
                f"eplb_rearrangement_bytes_ahead{{{who}}} {2000 * runs}",
                "# TYPE eplb_rearrangement_steps_planned gauge",
                f"eplb_rearrangement_steps_planned{{{who}}} {4 * runs}",
                "# TYPE eplb_rearrangement_steps_ahead gauge",
                f"eplb_rearrangement_steps_ahead{{{who}}} {1 * runs}",
                "# TYPE eplb_rearrangements counter",
                f"eplb_rearrangements_total{{{who}}} 7",
                "# TYPE eplb_transfer_received_bytes counter",
                f'eplb_transfer_received_bytes_total{{{who},peer="0"}} {10**9 * self.asked}',
                f'eplb_transfer_received_bytes_total{{{who},peer="1"}} 5',
                "# TYPE process_open_fds gauge",
                "process_open_fds 9",
                "",
            ]
        )


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    pytest.importorskip("prometheus_client", reason="the extra eplb[watch] is not installed")
    exporter = Exporter()
    yield exporter
    exporter.server.shutdown()
    exporter.server.server_close()


def test_an_endpoint_is_read_by_address_or_by_url(exporter: Exporter) -> None:
    for source in (exporter.address, f"http://{exporter.address}/metrics"):
        result = run("--once", source)
        assert result.exit_code == 0, result.output
        assert "rank 3 rearranging, 6.00 kB of 8.00 kB, 3 of 4 steps committed, 7 finished so far" in result.output


def test_between_rearrangements_an_endpoint_is_idle(exporter: Exporter) -> None:
    exporter.running = False
    assert "rank 3 idle, 7 finished so far" in run("--once", exporter.address).output


def test_an_endpoint_that_does_not_answer_is_told_and_waited_for() -> None:
    pytest.importorskip("prometheus_client", reason="the extra eplb[watch] is not installed")
    result = run("--once", "127.0.0.1:1")
    assert (result.exit_code, "unreadable, Connection refused" in result.output) == (0, True), result.output


def read_until(stream: int, word: bytes) -> bytes:
    """Return what a terminal shows up to `word`."""
    shown = b""
    while word not in shown:
        ready, _, _ = select.select([stream], [], [], WAIT_S)
        assert ready, shown
        shown += os.read(stream, 1 << 16)
    return shown


def test_on_a_terminal_it_is_live_with_rates_by_link_and_ctrl_c_ends_it_cleanly(exporter: Exporter) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    command = [sys.executable, "-c", EPLB, "watch", exporter.address, "--interval", "0.1"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        read_until(ours, b"0 -> 3")  # a link, so a second look: a rate takes two
        process.send_signal(signal.SIGINT)
        code = process.wait(WAIT_S)
        rest = b""
        try:
            while chunk := os.read(ours, 1 << 16):
                rest += chunk
        except OSError:  # the terminal is gone with the process
            pass
        os.close(ours)
    assert code == 0, rest
    assert b"Traceback" not in rest
    assert b"\x1b[?25h" in rest  # the cursor is shown again


def test_without_a_terminal_changes_are_lines_until_ctrl_c(exporter: Exporter, tmp_path: Path) -> None:
    document = tmp_path / "last.json"
    command = [sys.executable, "-c", EPLB, "watch", exporter.address, "--interval", "0.1", "--json", str(document)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first, second = process.stdout.readline(), process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT_S)
    assert (process.returncode, errors) == (0, "")
    assert "GB/s" not in first
    assert "GB/s from rank 0" in second
    assert "from rank 1" not in second  # nothing more came from it
    (rank,) = json.loads(document.read_text())["ranks"]
    assert rank["bytes_per_s_from_peer"]["0"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x.json", "--interval", "0"], "it must be at least"),
        (["x.json", "--old", "a.json"], "go together"),
        ([], "SOURCE"),
    ],
)
def test_what_cannot_be_watched_is_refused(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, said in result.output) == (2, True), result.output
