"""The pytest front: a test class whose tests are the checks of the contract.

class TestMyBackend(BackendConformance):
    config = "mine"
    ranks = (2, 3)
    stateless = True
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from eplb_core.testing.catalogue import all_checks, checks_named
from eplb_core.testing.check import Check
from eplb_core.testing.report import Report, Status
from eplb_core.testing.runner import run_conformance
from eplb_core.testing.subject import Subject

_TIMEOUT_S = 600  # the first test of a class waits for the processes that all of its tests share


@dataclass(frozen=True, slots=True)
class Case:
    """One test: one check of one subject with so many ranks."""

    subject: Subject
    ranks: int
    check: Check

    @property
    def id(self) -> str:
        """The part of the test's name in brackets."""
        return f"{self.subject.device}-{self.ranks} ranks-{self.check.name}"


class _Runs:
    """The reports of one class, made when the first of their results is asked for."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases = cases
        self._reports: dict[tuple[str, int], Report] = {}

    def report(self, case: Case) -> Report:
        key = (case.subject.device, case.ranks)
        if key not in self._reports:
            checks = [each.check for each in self._cases if (each.subject.device, each.ranks) == key]
            self._reports[key] = run_conformance([case.subject], case.ranks, checks)
        return self._reports[key]


class BackendConformance:
    """Derive from it and name a config string; pytest then runs the whole contract against that backend.

    Whatever the class is called, it is collected. A class that would check nothing cannot be defined.

    Attributes:
        config: the config string.
        devices: torch device types; where a machine has none of a type, its tests are skipped with that reason.
        ranks: the numbers of ranks; each is one set of processes.
        dtypes: names of the dtypes that it moves; empty means every dtype of torch.
        max_ranks: the most ranks that it connects, or None.
        stateless: it works in a group that has no process group.
        background: it works on a thread of its own.
        must_register: it moves nothing that was not registered before.
        thorough: also run the checks that are too long for every day.
        checks: names of the only checks to run; empty means all.
        extra_checks: checks of the backend's own, run like all others.
    """

    __test__: ClassVar[bool] = False
    pytestmark: ClassVar[list[pytest.MarkDecorator]] = [pytest.mark.timeout(_TIMEOUT_S)]

    config: ClassVar[str] = ""
    devices: ClassVar[Sequence[str]] = ("cpu",)
    ranks: ClassVar[Sequence[int]] = (2, 3)
    dtypes: ClassVar[Sequence[str]] = ()
    max_ranks: ClassVar[int | None] = None
    stateless: ClassVar[bool] = False
    background: ClassVar[bool] = False
    must_register: ClassVar[bool] = False
    thorough: ClassVar[bool] = False
    checks: ClassVar[Sequence[str]] = ()
    extra_checks: ClassVar[Sequence[Check]] = ()

    def __init_subclass__(cls, *, abstract: bool = False, **more: Any) -> None:
        """Have pytest collect the class, unless it is `abstract`, a base of others.

        Raises:
            TypeError: the class would check nothing, or pytest could not collect it.
        """
        super().__init_subclass__(**more)
        cls.__test__ = not abstract
        if abstract:
            return
        if not cls.config:
            raise TypeError(f"{cls.__name__} names no config: set the class attribute, such as config = 'nixl'")
        if "__init__" in vars(cls):
            raise TypeError(f"{cls.__name__} has an __init__, and pytest collects no such class")
        if isinstance(cls.devices, str) or isinstance(cls.dtypes, str) or isinstance(cls.checks, str):
            raise TypeError(f"{cls.__name__}: devices, dtypes and checks are sequences of names, not a text")
        if not cls.conformance_cases():
            raise TypeError(f"{cls.__name__} checks nothing: devices, ranks and checks must not be empty")

    @classmethod
    def conformance_cases(cls) -> list[Case]:
        """Return its tests."""
        chosen = checks_named(*cls.checks) if cls.checks else all_checks(thorough=cls.thorough)
        subjects = [
            Subject(
                config=cls.config,
                device=device,
                dtypes=tuple(cls.dtypes),
                max_ranks=cls.max_ranks,
                stateless=cls.stateless,
                background=cls.background,
                must_register=cls.must_register,
            )
            for device in cls.devices
        ]
        everything = (*chosen, *cls.extra_checks)
        return [Case(subject, ranks, check) for subject in subjects for ranks in cls.ranks for check in everything]

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        """Make one test of each case."""
        if "conformance_case" in metafunc.fixturenames:
            cases = cls.conformance_cases()
            metafunc.parametrize("conformance_case", cases, ids=[case.id for case in cases])

    @pytest.fixture(scope="class")
    @classmethod
    def conformance_runs(cls, request: pytest.FixtureRequest) -> _Runs:
        """The reports of those tests of this class that were selected."""
        selected = []
        for item in request.session.items:
            if getattr(item, "cls", None) is cls and hasattr(item, "callspec"):
                case = item.callspec.params.get("conformance_case")
                if case is not None:
                    selected.append(case)
        return _Runs(selected)

    def test_contract(self, conformance_case: Case, conformance_runs: _Runs) -> None:
        """Fail with what the ranks say if the check failed."""
        __tracebackhide__ = True
        result = conformance_runs.report(conformance_case).of(conformance_case.check.name)
        if result.status is Status.SKIPPED:
            pytest.skip(result.detail)
        if result.status is not Status.PASSED:
            text = inspect.cleandoc(f"{result.promise}\n\n{result.status}: {result.detail}")
            if result.page:
                text += f"\n\ncontract: {result.page}"
            pytest.fail(text, pytrace=False)
