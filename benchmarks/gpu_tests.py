"""Runs the tests that take several GPUs, and reads from pytest's own words how they ended."""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from findings import Row

from eplb_core.launch.bounded import Ended, run_bounded

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "multigpu"

_COUNT = re.compile(r"(\d+) (passed|failed|error|errors|skipped)")
_LAST = re.compile(r"^[=\s]*((?:\d+ [a-z]+(?:, )?)+) in [\d.]+s", re.MULTILINE)
_SKIPPED = re.compile(r"^SKIPPED \[(\d+)\] \S+: (.*)$", re.MULTILINE)
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.*)$", re.MULTILINE)
_LAST_LINES = 40


@dataclass(frozen=True)
class TestFile:
    """A file of tests, and whether its ranks are torchrun's or its own processes."""

    __test__ = False  # pytest would take it for a test

    name: str
    torchrun: bool


FILES = (
    TestFile("test_nccl_multi.py", torchrun=True),
    TestFile("test_killed_rank.py", torchrun=False),
    TestFile("test_job_streams.py", torchrun=False),
)


def run_tests(file: TestFile, device: str, ranks: int, limit_s: float) -> Row:
    """Run one file, unchanged, for `limit_s` seconds at most."""
    marks = "gpu" if device == "cuda" else "gpu or nightly"  # what needs a GPU then says so
    pytest = ["-m", "pytest", "-rfEs", "-m", marks, str(FOLDER / file.name)]
    with tempfile.TemporaryDirectory() as folder:
        if file.torchrun:
            # One log a rank: pytest's last line tells the counts of that rank.
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            ended = run_bounded([sys.executable, *launcher, "--redirects", "3", "--log-dir", folder, *pytest], limit_s)
            logs = sorted(Path(folder).rglob("stdout.log"))
            told = [log.read_text(errors="replace") for log in logs] or [ended.stderr]
        else:
            ended = run_bounded([sys.executable, *pytest], limit_s)
            told = [ended.stdout]
    return judge(file.name, ended, told)


def judge(name: str, ended: Ended, told: list[str]) -> Row:
    """Return the row of a file: failed if any rank has a failure, skipped if no rank ran anything.

    Args:
        name: of the file.
        ended: how the launcher ended.
        told: what pytest wrote on each rank.
    """
    counts = [_counts(text) for text in told]
    least = {kind: min(count[kind] for count in counts) for kind in ("passed", "skipped")}
    failures = list(dict.fromkeys(line for text in told for line in _FAILED.findall(text)))
    remark = f"{least['passed']} passed, {least['skipped']} skipped"
    details = {"seconds": ended.seconds, "counts": [dict(count) for count in counts]}
    skipped: Counter[str] = Counter()
    for number, reason in _SKIPPED.findall(told[0]):
        skipped[reason] += int(number)
    details["skipped"] = dict(skipped)
    if ended.exit_code == 0 and not failures:
        if least["passed"]:
            return Row(part="tests", what=name, remark=remark, details=details)
        reason = "; ".join(skipped) or "no test was run"
        return Row(part="tests", what=name, state="skipped", reason=reason, details=details)
    details |= {"failures": failures, "last_lines": [text.splitlines()[-_LAST_LINES:] for text in told]}
    reason = "; ".join(filter(None, [ended.reason if ended.exit_code is None else "", *failures])) or ended.reason
    return Row(part="tests", what=name, state="failed", reason=reason, remark=remark, details=details)


def _counts(text: str) -> Counter[str]:
    found = _LAST.findall(text)
    return Counter({kind: int(number) for number, kind in _COUNT.findall(found[-1])} if found else {})
