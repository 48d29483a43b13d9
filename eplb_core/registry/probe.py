"""Runs a backend's probe in a child process, where a crash or a hang is harmless.

The child reports one line of JSON on its standard output; all output of the probe and of native libraries goes to
standard error. The child leads a new process group, and the whole group ends with it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING

from eplb_core.contract.backend import ProbeResult
from eplb_core.launch.bounded import run_bounded
from eplb_core.registry.registry import BackendEntry, import_dotted
from eplb_core.words import signal_name

if TYPE_CHECKING:
    import torch

_MODULE = "eplb_core.registry.probe"
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
    command = [sys.executable, "-P", "-m", _MODULE, entry.spec.probe, device_type, number]
    ended = run_bounded(command, timeout_s, _child_environment(), grace_s=0.0)
    if ended.exit_code is None:
        return ProbeResult(False, f"the probe did not end within {timeout_s:g} s")
    result = _read_answer(ended.stdout)
    if result is None:
        return ProbeResult(False, _how_it_died(ended.exit_code, ended.last_line))
    if ended.exit_code < 0 and not result.warning:
        crash = f"a process that used it was killed by {signal_name(-ended.exit_code)} at exit"
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


def _read_answer(answer: str) -> ProbeResult | None:
    try:
        document = json.loads(answer)
        return ProbeResult(bool(document["available"]), str(document["reason"]), str(document["warning"]))
    except (ValueError, KeyError, TypeError):
        return None


def _how_it_died(code: int, last_line: str) -> str:
    if code < 0:
        return f"the probe was killed by {signal_name(-code)}"
    return f"the probe exited with code {code} and no answer: {last_line or 'it printed nothing'}"


def _probe_here(dotted: str, device_type: str, number: str) -> ProbeResult:
    """Run the probe in this process, which is the child."""
    try:
        probe = import_dotted(dotted)
        if number:
            import torch

            torch.cuda.set_device(int(number))
        result = probe(device_type)
    except Exception as error:  # noqa: BLE001 - any exception of a probe is the reason why its backend does not work
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
