"""`eplb doctor` looks at the vLLM that is installed without importing it; here a package that only looks like one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from eplb_vllm import doctor, signatures

from eplb_core.doctor import Severity


def write_package(folder: Path) -> Path:
    """Write modules whose functions and methods have the parameters that are expected, and nothing else."""
    for module, names in signatures.EXPECTED.items():
        *parents, leaf = module.split(".")
        place = folder.joinpath(*parents)
        place.mkdir(parents=True, exist_ok=True)
        for parent in (place, *place.parents):
            if parent != folder and folder in parent.parents:
                (parent / "__init__.py").touch()
        lines: list[str] = []
        for name, parameters in names.items():
            *owner, function = name.split(".")
            if owner and f"class {owner[0]}:" not in lines:
                lines.append(f"class {owner[0]}:")
            lines.append(f"{'    ' if owner else ''}def {function}({', '.join(parameters)}): ...")
        (place / f"{leaf}.py").write_text("\n".join(lines) + "\n")
    return folder / "vllm"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `vllm` that can be found, and must not be imported."""
    made = write_package(tmp_path)
    (made / "__init__.py").write_text("raise RuntimeError('vLLM was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("EPLB_BACKEND", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    importlib.invalidate_caches()
    yield made
    assert "vllm" not in sys.modules


def severities() -> list[Severity]:
    return [finding.severity for finding in doctor.vllm()]


def test_a_vllm_that_is_as_expected_is_fine(package: Path) -> None:
    findings = list(doctor.vllm())
    assert [finding.severity for finding in findings] == [Severity.OK, Severity.OK]
    assert "has all that this plugin replaces" in findings[1].detail


def test_another_signature_is_named(package: Path) -> None:
    file = package / "distributed/eplb/eplb_communicator.py"
    file.write_text(file.read_text().replace("backend, ", "backend, tenant, ", 1))
    known = list(doctor.vllm())[1]
    assert known.severity is Severity.WARNING
    assert "create_eplb_communicator takes (group_coordinator, backend, tenant, " in known.detail


def test_a_missing_module_is_named(package: Path) -> None:
    (package / "v1/worker/gpu_worker.py").unlink()
    assert "vllm.v1.worker.gpu_worker is not there" in list(doctor.vllm())[1].detail


def test_a_list_of_plugins_without_this_one_is_a_warning(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_resolver")
    assert severities() == [Severity.WARNING, Severity.OK]
    monkeypatch.setenv("VLLM_PLUGINS", "lora_resolver,eplb")
    assert severities() == [Severity.OK, Severity.OK]


def test_the_variable_is_checked(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPLB_BACKEND", "torch_glo")
    assert severities() == [Severity.OK, Severity.OK, Severity.PROBLEM]
    monkeypatch.setenv("EPLB_BACKEND", "torch_gloo")
    assert severities() == [Severity.OK, Severity.OK, Severity.OK]


def test_where_there_is_no_vllm_it_says_so_and_no_more() -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    assert [finding.detail for finding in doctor.vllm()] == ["not installed in this environment"]
