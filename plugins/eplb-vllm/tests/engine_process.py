"""Processes with a real vLLM, this plugin and the stand-ins for a GPU."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import engine_env

_SHIM = "[vllm.general_plugins]\na_cpu_shim = cpu_engine.cpu_shim:register\n"
_SABOTAGED = "[eplb.backends]\nsabotaged = sabotaged:BACKEND\n"


def engine_environment(site: Path) -> dict[str, str]:
    """Return the environment of a process with vLLM, this plugin and the stand-ins for a GPU."""
    site.mkdir()
    engine_env.with_packages_under_test(site, ["eplb", "eplb-shm", "eplb-vllm"])
    engine_env.add_distribution(site, "eplb-cpu-shim", _SHIM)
    engine_env.add_distribution(site, "eplb-sabotaged", _SABOTAGED)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("EPLB_", "VLLM_", "PYTHON"))}
    return inherited | {
        "PYTHONPATH": f"{site}{os.pathsep}{Path(__file__).parent}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "UCX_DEBUG_SIGNO": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }


def run(
    command: list[str], environment: dict[str, str], timeout_s: float, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process group of its own, and end all of the group."""
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, "")
