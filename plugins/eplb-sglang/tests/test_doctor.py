"""`eplb doctor` looks at the SGLang that is installed without importing it; here a package that only looks like one."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from eplb_sglang import doctor, signatures
from made_up_sglang import write_package

from eplb_core.doctor import Severity

OK, WARNING, PROBLEM = Severity.OK, Severity.WARNING, Severity.PROBLEM
VARIABLES = ("EPLB_BACKEND", "EPLB_POLICY", "EPLB_SGLANG_ON_FAILURE", "EPLB_SGLANG_ON_UNKNOWN", "SGLANG_PLUGINS")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `sglang` that can be found, and must not be imported."""
    made = write_package(tmp_path)
    (made / "__init__.py").write_text("raise RuntimeError('SGLang was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    importlib.invalidate_caches()
    yield made
    assert "sglang" not in sys.modules


def severities() -> list[Severity]:
    return [finding.severity for finding in doctor.sglang()]


def test_an_sglang_that_is_as_expected_is_fine(package: Path) -> None:
    findings = list(doctor.sglang())
    assert [finding.severity for finding in findings] == [OK, OK, OK]
    assert "has all that this plugin hooks" in findings[1].detail
    assert "SGLang is left as it is" in findings[2].detail


def test_another_signature_is_named(package: Path) -> None:
    file = package / "srt/eplb/expert_location_updater.py"
    file.write_text(file.read_text().replace("nnodes, ", "nnodes, tenant, ", 1))
    known = list(doctor.sglang())[1]
    assert known.severity is WARNING
    assert "_update_expert_weights_raw has (routed_experts_weights_of_layer, " in known.detail


def test_another_field_of_the_metadata_is_named(package: Path) -> None:
    file = package / "srt/eplb/expert_location.py"
    file.write_text(file.read_text().replace("    ep_size: int\n", "    ep_size: int\n    tenant: int\n"))
    assert "ExpertLocationMetadata has (physical_to_logical_map, " in list(doctor.sglang())[1].detail


def test_a_missing_module_is_named(package: Path) -> None:
    (package / "srt/eplb/eplb_manager.py").unlink()
    assert "sglang.srt.eplb.eplb_manager is not there" in list(doctor.sglang())[1].detail


def test_a_list_of_plugins_without_this_one_is_a_warning(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "profiler")
    assert severities() == [WARNING, OK, OK]
    monkeypatch.setenv("SGLANG_PLUGINS", "profiler, eplb")
    assert severities() == [OK, OK, OK]


@pytest.mark.parametrize(
    ("variable", "wrong", "right"),
    [("EPLB_BACKEND", "torch_glo", "torch_gloo"), ("EPLB_POLICY", "incrementl", "incremental")],
)
def test_the_variables_are_checked(
    package: Path, monkeypatch: pytest.MonkeyPatch, variable: str, wrong: str, right: str
) -> None:
    monkeypatch.setenv(variable, wrong)
    assert severities() == [OK, OK, PROBLEM]
    assert variable in list(doctor.sglang())[2].detail
    monkeypatch.setenv(variable, right)
    findings = list(doctor.sglang())
    assert findings[2].detail == f"{variable} is {right}, in the place of SGLang's own"


def test_where_there_is_no_sglang_it_says_so_and_no_more() -> None:
    if importlib.util.find_spec("sglang") is not None:
        pytest.skip("SGLang is installed here")
    assert [finding.detail for finding in doctor.sglang()] == ["not installed in this environment"]


def test_the_plugin_was_tried_with_the_version_that_its_tests_run() -> None:
    import engine_env

    assert engine_env.SGLANG in signatures.TRIED
