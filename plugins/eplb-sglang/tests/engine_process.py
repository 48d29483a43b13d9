"""Processes with a real SGLang, this plugin and the stand-ins for a GPU."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import engine_env

_SHIM = "[sglang.srt.plugins]\na_cpu_shim = cpu_engine.cpu_shim:register\n"
_HARMFUL = "[eplb.backends]\nsabotaged = sabotaged:BACKEND\nfailing = sabotaged:FAILING\n"


def engine_environment(site: Path) -> dict[str, str]:
    """Return the environment of a process with SGLang, this plugin and the stand-ins for a GPU."""
    site.mkdir()
    engine_env.with_packages_under_test(site, ["eplb", "eplb-shm", "eplb-sglang"])
    engine_env.add_distribution(site, "eplb-cpu-shim", _SHIM)
    engine_env.add_distribution(site, "eplb-harmful", _HARMFUL)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("EPLB_", "SGLANG_", "PYTHON"))}
    cores = sorted(os.sched_getaffinity(0))
    return inherited | {
        "PYTHONPATH": f"{site}{os.pathsep}{Path(__file__).parent}",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "UCX_DEBUG_SIGNO": "0",
        "SGLANG_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}",
        "SGLANG_USE_CPU_ENGINE": "0",
    }


def run(
    command: list[str], environment: dict[str, str], timeout_s: float, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process group of its own, and end all of the group."""
    with open(cwd / "log", "w+") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=cwd, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            pass  # no result has been written, and the log says how far it came
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, log.read(), "")
