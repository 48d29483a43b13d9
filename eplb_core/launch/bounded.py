"""Runs a command with a deadline, and terminates it with all processes that it started."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_NAP_S = 0.01
_LONGEST_POLL_MS = 2**31 - 1  # 24 days
_REAP_S = 10.0  # a killed process is gone at once, unless the kernel or a driver holds it


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        exit_code: negative for a signal; None if it was terminated at its deadline.
        stdout: its standard output.
        stderr: its standard error.
        seconds: how long it took.
    """

    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float

    @property
    def last_line(self) -> str:
        """The last line that it wrote to standard error, or an empty text."""
        return next((line.strip() for line in reversed(self.stderr.split("\n")) if line.strip()), "")

    @property
    def reason(self) -> str:
        """Why it did not succeed, in a line; empty if it did."""
        if self.exit_code is None:
            return f"did not end within {self.seconds:.0f} s"
        return f"exit code {self.exit_code}: {self.last_line or 'it said nothing'}" if self.exit_code else ""


def run_bounded(
    command: Sequence[str], limit_s: float, environment: Mapping[str, str] | None = None, *, grace_s: float = 3.0
) -> Ended:
    """Run `command` for at most `limit_s` seconds; afterwards none of its processes runs.

    Its output goes to files, so that a surviving child cannot block the reader by holding a pipe open.

    Args:
        command: the program and its arguments. It leads a new process group.
        limit_s: total time limit, in seconds.
        environment: its environment; None for that of this process.
        grace_s: how long a late command may take to terminate its processes itself, as launchers do.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        written = [Path(folder, name) for name in ("stdout", "stderr")]
        with written[0].open("wb") as stdout, written[1].open("wb") as stderr:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=environment,
                start_new_session=True,
            )
            ended = False
            try:
                ended = _ends(process.pid, max(limit_s, 0.0))
            finally:
                _end(process, 0.0 if ended else grace_s)
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in written]
    return Ended(process.returncode if ended else None, texts[0], texts[1], time.monotonic() - began)


def descendants(pid: int) -> list[int]:
    """Return the ids of all child processes of `pid`, and of their descendants."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path("/proc", str(pid), "task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Terminate a process, its group, and its descendants in other groups.

    It is not reaped before its group is killed: until then no other process can get its id.
    """
    started = _handles(process.pid)
    try:
        if grace_s:
            os.kill(process.pid, signal.SIGTERM)
            _ends(process.pid, grace_s)
            started += _handles(process.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for handle in started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_REAP_S)
        for handle in started:
            _poll(handle, _REAP_S)
    finally:
        for handle in started:
            os.close(handle)


def _handles(pid: int) -> list[int]:
    return [handle for each in descendants(pid) if (handle := _handle(each)) is not None]


def _handle(pid: int) -> int | None:
    """Return a descriptor of a process, or None if it is gone or an older container runtime forbids it."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return None


def _poll(handle: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    return bool(poller.poll(min(timeout_s * 1000, _LONGEST_POLL_MS)))


def _ends(pid: int, timeout_s: float) -> bool:
    """Wait until a child has ended, without reaping it; return False if it has not in time."""
    handle = _handle(pid)
    if handle is not None:
        try:
            return _poll(handle, timeout_s)
        finally:
            os.close(handle)
    deadline = time.monotonic() + timeout_s
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(_NAP_S)
    return True
