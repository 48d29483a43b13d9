"""Findings of `eplb doctor`, and the checks that plugins add.

A plugin adds checks with the hook `eplb_doctor_checks`. A check is called without arguments and returns its findings:

    from eplb_core.doctor import Finding, Severity
    from eplb_core.hooks import hookimpl

    def firmware():
        return Finding("NIC firmware", Severity.WARNING, "version 3 of 4", remedy="update it with acme-flash")

    @hookimpl
    def eplb_doctor_checks():
        return [firmware]
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding of a check.

    Attributes:
        name: what was checked, in a few words.
        severity: `PROBLEM` if experts cannot be moved, `WARNING` if that is slower or riskier than necessary.
        detail: what was found, one line.
        remedy: the command, setting or change that fixes it; empty if nothing must be fixed.
    """

    name: str
    severity: Severity = Severity.OK
    detail: str = ""
    remedy: str = ""


Check = Callable[[], "Finding | Iterable[Finding] | None"]
"""A check that a plugin adds to `eplb doctor`. None stands for a single finding that all is well."""


def run_checks(checks: Sequence[Callable[[], object]], timeout_s: float) -> list[Finding]:
    """Call each check and return all findings. A check that raises, hangs or returns anything else becomes a warning.

    Args:
        checks: the checks of all plugins; each should be a `Check`.
        timeout_s: for each check, in seconds. A check that takes longer is abandoned in its thread.
    """
    return [finding for check in checks for finding in _run(check, timeout_s)]


def worst(findings: Iterable[Finding]) -> Severity:
    """Return the severity of the worst finding; `OK` if there are none."""
    order = list(Severity)
    return max((finding.severity for finding in findings), key=order.index, default=Severity.OK)


def _run(check: Callable[[], object], timeout_s: float) -> list[Finding]:
    name = _name_of(check)
    answer: list[list[Finding]] = []

    def call() -> None:
        try:
            answer.append(_findings(name, check()))
        except BaseException as error:  # noqa: BLE001 - a plugin's fault must not end the doctor
            text = " ".join(str(error).split())
            answer.append([Finding(name, Severity.WARNING, f"the check failed: {type(error).__name__}: {text}")])

    thread = threading.Thread(target=call, name=f"check {name}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answer[0] if answer else [Finding(name, Severity.WARNING, f"the check did not end within {timeout_s:g} s")]


def _findings(name: str, returned: object) -> list[Finding]:
    if returned is None:
        return [Finding(name)]
    if isinstance(returned, Finding):
        return [returned]
    found = list(returned) if isinstance(returned, Iterable) and not isinstance(returned, str | bytes) else [returned]
    stranger = next((each for each in found if not isinstance(each, Finding)), None)
    if stranger is not None:
        raise TypeError(f"it returned {type(stranger).__name__} where a Finding is expected")
    return [each for each in found if isinstance(each, Finding)]


def _name_of(check: object) -> str:
    return str(getattr(check, "__qualname__", type(check).__qualname__)).rpartition(".")[2].replace("_", " ").strip()
