"""Runs a backend's probe in a child process, where a crash or a hang is harmless.

The child reports one line of JSON on its standard output; all output of the probe and of native libraries goes to
standard error. The child leads a new process group, and the whole group ends with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO, TYPE_CHECKING

from eplb_core.contract.backend import ProbeResult
from eplb_core.registry.registry import BackendEntry, import_dotted
from eplb_core.words import signal_name

if TYPE_CHECKING:
    import torch

_MODULE = "eplb_core.registry.probe"
_TAIL_BYTES = 4000  # of what a failed child printed; its last line is quoted
_NAP_S = 0.01
_LONGEST_POLL_MS = 2**31 - 1  # 24 days
_REAP_S = 10.0  # a killed process is gone at once, unless the kernel holds it
_JOB_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_probe(entry: BackendEntry, device: str | torch.device, *, timeout_s: float = 30.0) -> ProbeResult:
    """Try one backend for real, in a child process.

    Args:
        entry: a backend whose spec could be read.
        device: the device of the tensors to move, such as `cpu` or `cuda:1`; `cuda` is the first one. The probe is
            called with the device's type, and that device is current.
        timeout_s: after this, the child and all processes it started are killed.

    Returns:
        The probe's answer, or `available=False` with what happened to the child. A backend without a probe is
        available if it declares the device type.
    """
    if entry.spec is None:
        return ProbeResult(False, entry.why)
    device_type, _, number = str(device).partition(":")
    if device_type not in entry.spec.capabilities.device_types:
        return ProbeResult(False, f"it does not move {device_type} tensors")
    if entry.spec.probe is None:
        return ProbeResult(True, "it has no probe; its requirements are installed")
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as printed:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE, entry.spec.probe, device_type, number],
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=printed,
            env=_child_environment(),
            start_new_session=True,
        )
        ended = _wait_and_kill_group(child, timeout_s)
        if not ended:
            return ProbeResult(False, f"the probe did not end within {timeout_s:g} s")
        result = _read_answer(answer)
        if result is None:
            return ProbeResult(False, _how_it_died(child.returncode, printed))
        if child.returncode < 0 and not result.warning:
            crash = f"a process that used it was killed by {signal_name(-child.returncode)} at exit"
            result = dataclasses.replace(result, warning=crash)
        return result


def _child_environment() -> dict[str, str]:
    """Return an environment with this process's import path, without the variables of a job it may belong to."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    for variable in _JOB_VARIABLES:
        environment.pop(variable, None)
    path = [os.fspath(entry) for entry in sys.path if isinstance(entry, str | os.PathLike)]  # others are ignored
    environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in path)
    return environment


def _wait_and_kill_group(child: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait for the child, then kill the rest of its group; return whether the child ended by itself.

    The child is not reaped before its group is killed: until then no other process can get its id.
    """
    try:
        ended = _ends(child.pid, timeout_s)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait(_REAP_S)
    return ended


def _ends(pid: int, timeout_s: float) -> bool:
    """Wait until a child has ended, without reaping it; return False if it has not in time."""
    try:
        handle = os.pidfd_open(pid)
    except (OSError, AttributeError):  # an older container runtime forbids it
        deadline = time.monotonic() + timeout_s
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(_NAP_S)
        return True
    try:
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        return bool(poller.poll(min(timeout_s * 1000, _LONGEST_POLL_MS)))
    finally:
        os.close(handle)


def _read_answer(answer: IO[bytes]) -> ProbeResult | None:
    answer.seek(0)
    try:
        document = json.loads(answer.read(_TAIL_BYTES))
        return ProbeResult(bool(document["available"]), str(document["reason"]), str(document["warning"]))
    except (ValueError, KeyError, TypeError):
        return None


def _how_it_died(code: int, printed: IO[bytes]) -> str:
    if code < 0:
        return f"the probe was killed by {signal_name(-code)}"
    printed.seek(max(0, printed.seek(0, os.SEEK_END) - _TAIL_BYTES))
    lines = printed.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return f"the probe exited with code {code} and no answer: {last}"


def _probe_here(dotted: str, device_type: str, number: str) -> ProbeResult:
    """Run the probe in this process, which is the child."""
    try:
        probe = import_dotted(dotted)
        if number:
            import torch

            torch.cuda.set_device(int(number))
        result = probe(device_type)
    except Exception as error:  # noqa: BLE001 - whatever a probe raises is the reason why its backend does not work
        return ProbeResult(False, f"{type(error).__name__}: {error}")
    if not isinstance(result, ProbeResult):
        return ProbeResult(False, f"the probe {dotted} returned {type(result).__name__} instead of a ProbeResult")
    return result


def _child(arguments: list[str]) -> None:
    dotted, device_type, number = arguments
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        result = _probe_here(dotted, device_type, number)
        reason, warning = (" ".join(text.split())[:1000] for text in (result.reason, result.warning))
        json.dump({"available": result.available, "reason": reason, "warning": warning}, answer)


if __name__ == "__main__":
    _child(sys.argv[1:])
