"""Runs a command with a deadline, and ends all of it when that has passed."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_GRACE_S = 3.0  # for launchers such as torchrun to end their workers themselves
_GONE_S = 10.0  # a killed process that is inside the driver may take a while


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or None if it had to be ended, and what it wrote."""

    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float

    @property
    def reason(self) -> str:
        """Why it did not succeed, in a line; empty if it did."""
        if self.exit_code is None:
            return f"did not end within {self.seconds:.0f} s"
        said = [line for line in self.stderr.splitlines() if line.strip()] or ["it said nothing"]
        return f"exit code {self.exit_code}: {said[-1].strip()}" if self.exit_code else ""


def run_bounded(command: Sequence[str], limit_s: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Run `command` for `limit_s` seconds at most.

    Its output goes to files: a process of it that outlives it cannot keep a pipe open for which somebody waits.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        written = [Path(folder) / name for name in ("stdout", "stderr")]
        with written[0].open("wb") as stdout, written[1].open("wb") as stderr:
            process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment
            )
            exit_code: int | None = None
            try:
                exit_code = process.wait(max(limit_s, 0.0))
            except subprocess.TimeoutExpired:
                pass
            finally:
                if exit_code is None:
                    end(process)
        texts = [path.read_text(errors="replace") for path in written]
    return Ended(exit_code, texts[0], texts[1], time.monotonic() - began)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, also what runs in sessions of its own."""
    started = descendants(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    started += [each for each in descendants(process.pid) if each not in started]
    process.kill()
    for each in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GONE_S)
    psutil.wait_procs(started, _GONE_S)


def descendants(pid: int) -> list[psutil.Process]:
    """Return all processes that `pid` started, and those that they did."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []
