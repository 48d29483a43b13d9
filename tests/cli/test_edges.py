"""The `eplb` command where streams are closed or full, the environment is odd, or something foreign is raised."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import click
import psutil
import pytest
from click.testing import CliRunner
from rich.console import Console

from eplb_core.cli import EplbGroup, main
from eplb_core.cli.progress import StageBars
from eplb_core.contract.quantities import LONGEST_S

REPOSITORY = Path(__file__).parents[2]
LOADS = REPOSITORY / "examples" / "published-loads.json"
SHELL_S = 100


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which `$EPLB` is the command."""
    command = f"{sys.executable} -m eplb_core"
    return subprocess.run(
        ["sh", "-c", line],
        cwd=folder,
        env=os.environ | {"EPLB": command, "LOADS": str(LOADS)} | environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=SHELL_S,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("edges")
    assert shell("$EPLB make-checkpoint mödel --style qwen3", made).returncode == 0
    return made


JOB = "$EPLB rebalance $LOADS --checkpoint mödel --ranks 2 --backend torch_gloo"


def test_output_that_cannot_show_a_character_still_reports_and_writes_the_files(folder: Path) -> None:
    done = shell(f"{JOB} --out ascii.json --json report.json", folder, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "m\\xf6del" in done.stdout
    assert (folder / "ascii.json").exists()
    assert json.loads((folder / "report.json").read_text())["verified"]


def test_closed_output_costs_neither_the_work_nor_its_files(folder: Path) -> None:
    done = shell(f"{JOB} --json closed.json >&-", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((folder / "closed.json").read_text())["verified"]


def test_a_reader_that_goes_away_costs_no_file(folder: Path) -> None:
    done = shell(f"{JOB} --out piped.json | true", folder)
    assert "Traceback" not in done.stderr
    assert (folder / "piped.json").exists()


@pytest.mark.parametrize("line", ["$EPLB backends >&-", "$EPLB backends 2>&-", "$EPLB config explain nixl >&- 2>&-"])
def test_closed_streams_are_no_error(folder: Path, line: str) -> None:
    done = shell(line, folder)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


@pytest.mark.parametrize("line", ["$EPLB backends", "$EPLB config explain nixl", "$EPLB --help"])
def test_a_full_disk_under_standard_output_is_one_line_and_exit_1(folder: Path, line: str) -> None:
    done = shell(f"{line} > /dev/full", folder)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", str(LONGEST_S + 1), "1e300"])
@pytest.mark.parametrize("command", [("rebalance", str(LOADS)), ("bench",), ("doctor",)])
def test_a_timeout_that_nothing_can_wait_for_is_refused(command: tuple[str, ...], seconds: str) -> None:
    done = CliRunner().invoke(main, [*command, "--timeout", seconds])
    assert done.exit_code == 2
    assert f"it must be above 0 and at most {LONGEST_S} seconds" in done.stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR is not set, but RANK and WORLD_SIZE are"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
        ({"RANK": "x", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "is not a number"),
        ({"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK is 3 of WORLD_SIZE 2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "no store at"),
    ],
    ids=["no address", "no port", "no number", "out of range", "nobody there"],
)
@pytest.mark.parametrize("command", ["rebalance", "doctor"])
def test_ranks_of_a_platform_that_is_not_torchrun_are_one_line_and_exit_2(
    folder: Path, command: str, environment: dict[str, str], said: str
) -> None:
    checkpoint = str(folder / "mödel")
    job = [str(LOADS), "--checkpoint", checkpoint, "--ranks", "2", "--backend", "torch_gloo"]
    arguments = job if command == "rebalance" else []
    done = CliRunner().invoke(main, [command, *arguments, "--timeout", "2"], env=environment)
    assert done.exit_code == 2, done.stderr
    assert said in done.stderr
    assert "unset RANK and WORLD_SIZE" in done.stderr
    assert "Traceback" not in done.stderr


def test_process_1_ends_at_sigterm(folder: Path) -> None:
    unshare = ["unshare", "-fp", "--mount-proc"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("PID namespaces cannot be made here")
    wait = (
        "import time, click; from eplb_core.cli import EplbGroup\n"
        "sleep = lambda: (click.echo('here'), time.sleep(60))\n"
        "group, command = EplbGroup('eplb'), click.Command('sleep', callback=sleep)\n"
        "group.get_command = lambda context, name: command\n"
        "group.main(['sleep'])\n"
    )
    with subprocess.Popen([*unshare, sys.executable, "-c", wait], cwd=folder, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        children = Path("/proc", str(process.pid), "task", str(process.pid), "children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        assert process.wait(SHELL_S) != 0


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ZeroDivisionError("no\nsuch"), 1, "error: ZeroDivisionError: no such; run eplb --traceback COMMAND for the"),
        (MemoryError(), 1, "error: out of memory\n"),
        (OSError(28, "No space left on device", "p.json"), 1, "error: No space left on device: p.json\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_foreign_error_is_one_line_and_shows_its_place_when_asked(error: BaseException, code: int, said: str) -> None:
    @click.group(cls=EplbGroup)
    @click.option("--traceback", is_flag=True)
    def group(traceback: bool) -> None: ...

    @click.command()
    def fails() -> None:
        raise error

    group.get_command = lambda ctx, name: fails  # type: ignore[method-assign, assignment]
    done = CliRunner().invoke(group, ["fails"])
    assert done.exit_code == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    if said:
        assert "in fails" in CliRunner().invoke(group, ["--traceback", "fails"]).stderr


def test_a_config_string_of_any_bytes_is_one_line_that_can_be_printed(folder: Path) -> None:
    done = shell("$EPLB config explain \"$(printf 'nixl?mode=\\377')\"", folder)
    assert done.returncode == 2
    assert "the config string is not UTF-8 (column 11" in done.stderr
    long = shell('$EPLB config explain "nixl?window=$(yes 9 | head -5000 | tr -d "\\n")MiB"', folder)
    assert long.returncode == 2
    assert "has 5015 characters" in long.stderr
    assert len(long.stderr) < 300


def test_ctrl_c_in_the_middle_ends_all_ranks_and_says_how_far_it_came(folder: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "eplb_core", "rebalance", str(LOADS), "--checkpoint", "mödel", "--ranks", "2"]
    command += ["--backend", "torch_gloo", "--pace", "10kB/s", "--out", "never.json"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    shown = b""
    with subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        while b"move experts" not in shown:
            assert select.select([ours], [], [], SHELL_S)[0], shown
            shown += os.read(ours, 1 << 16)
        ranks = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        code = process.wait(SHELL_S)
        with contextlib.suppress(OSError):  # the terminal is gone with the process
            while chunk := os.read(ours, 1 << 16):
                shown += chunk
        os.close(ours)
    assert code == 130, shown
    assert re.search(rb"interrupted: (.* had been received|no expert had been moved); the ranks have ended", shown)
    assert b"Traceback" not in shown
    assert ranks
    assert [rank for rank in psutil.wait_procs(ranks, SHELL_S)[1] if rank.status() != psutil.STATUS_ZOMBIE] == []
    assert not (folder / "never.json").exists()


def test_bars_add_up_what_is_done_by_all_ranks() -> None:
    bars = StageBars(Console(file=io.StringIO()), {"move": "move experts"}, num_ranks=4, heard_ranks=2)
    bars.update(0, "move", 10, 100)
    bars.update(1, "move", 5, 100)
    bars.update(0, "move", 20, 100)
    assert (bars.done("move"), bars.done("read")) == (50, 0)  # two ranks stand for four


@pytest.mark.parametrize("option", ["--out", "--json", "--plot"])
def test_a_folder_that_takes_no_files_is_found_out_before_anything_moves(folder: Path, option: str) -> None:
    done = shell(f"{JOB} {option} /proc/never.{'png' if option == '--plot' else 'json'}", folder)
    assert done.returncode == 2
    assert f"error: {option} cannot be written (/proc/never" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "limits",
    [
        "ulimit -n 16",
        "ulimit -f 1",
        "export LC_ALL=xx_YY.bogus LANG=tlh HOME=/nonexistent TMPDIR=/nonexistent COLUMNS=x LINES=-1 TERM=bogus",
        "export OMP_NUM_THREADS=x EPLB_BACKEND='?!' EPLB_START_METHOD=zz EPLB_BACKEND__NIXL__WINDOW=x COLUMNS=0",
        "exec <&- >&- 2>&-",
        "exec >/dev/full 2>/dev/full",
    ],
)
def test_small_limits_and_a_hostile_environment_end_with_0_1_or_2_and_no_traceback(folder: Path, limits: str) -> None:
    commands = ("backends", "plugins", "config explain nixl", "placement show nosuch.json", "rebalance nosuch.json")
    lines = "; ".join(f"$EPLB {command}; echo $? >>codes" for command in commands)
    (folder / "codes").unlink(missing_ok=True)
    done = shell(f"({limits}; {lines})", folder)
    codes = (folder / "codes").read_text().split()
    assert len(codes) == len(commands)
    assert set(codes) <= {"0", "1", "2"}
    assert "Traceback" not in done.stdout + done.stderr


def test_a_current_directory_that_is_gone_is_one_line_and_exit_2(folder: Path) -> None:
    done = shell("mkdir gone; cd gone; rmdir ../gone; $EPLB conformance --list", folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the current directory does not exist" in done.stderr


def test_left_over_metadata_earlier_on_the_path_hides_no_backend(folder: Path) -> None:
    (folder / "left" / "eplb-0.0.9.dist-info").mkdir(parents=True, exist_ok=True)
    done = shell("$EPLB backends --json -", folder, PYTHONPATH="left")
    document = json.loads(done.stdout)
    rows = {row["name"]: row for row in document["backends"]}
    assert rows["nixl"]["state"] == rows["torch_gloo"]["state"] == "ready"
    assert any("left-over metadata" in note for note in rows["nixl"]["notes"])
    explained = shell("$EPLB config explain nixl", folder, PYTHONPATH="left")
    assert explained.returncode == 0, explained.stderr


def test_an_interface_that_gloo_cannot_use_is_one_line_that_names_the_variable(folder: Path) -> None:
    done = shell(f"{JOB} --timeout 30", folder, GLOO_SOCKET_IFNAME="eth99")
    assert done.returncode in (1, 2)
    assert "GLOO_SOCKET_IFNAME is 'eth99'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_loopback_interface_that_is_down_is_one_line_and_exit_2(folder: Path) -> None:
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        pytest.skip("network namespaces cannot be made here")
    done = shell(f"unshare -n {JOB} --timeout 30", folder)
    assert done.returncode == 2
    assert "set the loopback interface up" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_network_device_that_this_machine_lacks_is_one_line_that_names_the_variable(folder: Path) -> None:
    job = JOB.replace("torch_gloo", "nixl")
    done = shell(f"{job} --timeout 60", folder, UCX_NET_DEVICES="mlx5_99:1", UCX_LOG_LEVEL="fatal")
    assert done.returncode == 1
    assert "UCX_NET_DEVICES=mlx5_99:1" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_full_disk_under_a_checkpoint_is_one_line_and_exit_2(folder: Path) -> None:
    mount = "mkdir small; mount -t tmpfs -o size=200k none small"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounts cannot be made here")
    done = shell(f"unshare -m sh -c '{mount}; $EPLB make-checkpoint small/x --style qwen3'", folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "error: cannot write (small/x/" in done.stderr
    assert "No space left on device" in done.stderr


def test_a_workload_that_is_another_file_of_numpy_is_one_line_and_exit_2(folder: Path) -> None:
    import numpy as np

    np.save(folder / "ok.npy", np.ones((2, 4)))
    done = shell("$EPLB bench --workload ok.npy", folder)
    assert done.returncode == 2
    assert "the workload is not an .npz file" in done.stderr


def test_an_option_that_only_the_chosen_backend_can_refuse_is_a_usage_error(folder: Path) -> None:
    done = shell(f"{JOB.replace('torch_gloo', chr(39) + 'auto?windowx=64MiB' + chr(39))} --timeout 60", folder)
    assert done.returncode == 2
    assert "has no option 'windowx'" in done.stderr
    assert "Traceback" not in done.stderr
