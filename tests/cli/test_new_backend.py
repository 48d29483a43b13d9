"""`eplb new-backend` writes a project that works: from a wheel of eplb, in an environment of its own, by the kit.

The environment has nothing but the two wheels; torch and pytest come from the one that the tests run in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import eplb_core
from eplb_core.cli import main
from eplb_core.cli.new_backend_project import ProjectNames, render_project
from eplb_core.contract.backend import PLUGIN_API_VERSION
from tests.support.fake_distributions import install_backend, run_eplb

REPOSITORY = Path(__file__).parents[2]
CHILD_S = 60
NAMES = ("a", "acme", "acme-rail_fabric-of-thirty-ab")


def new_backend(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["new-backend", *map(str, arguments)])


def run(*command: object, cwd: Path, timeout_s: float = CHILD_S) -> str:
    """Run a command in `cwd`, without what this environment says to Python; return what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("EPLB_", "PYTHON"))}
    child = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_project_is_clean_by_its_own_linter_whatever_its_name(tmp_path: Path, name: str) -> None:
    assert new_backend(name, "--into", tmp_path).exit_code == 0
    (project,) = tmp_path.iterdir()
    ruff = Path(sys.executable).with_name("ruff")
    run(ruff, "check", "--no-cache", ".", cwd=project)
    run(ruff, "format", "--check", "--no-cache", ".", cwd=project)


def test_one_name_gives_all_others() -> None:
    names = ProjectNames.of("acme-rail")
    assert names == ProjectNames("acme_rail", "eplb-acme-rail", "eplb_acme_rail", "AcmeRail")


def test_a_complete_project_is_written() -> None:
    assert set(render_project(ProjectNames.of("acme"))) == {
        ".github/workflows/ci.yml",
        ".gitignore",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "src/eplb_acme/__init__.py",
        "src/eplb_acme/communicator.py",
        "src/eplb_acme/fabric.py",
        "src/eplb_acme/options.py",
        "src/eplb_acme/py.typed",
        "src/eplb_acme/spec.py",
        "tests/test_conformance.py",
        "tests/test_plugin.py",
    }


def test_it_depends_on_the_eplb_that_wrote_it_and_registers_the_name() -> None:
    project = tomllib.loads(render_project(ProjectNames.of("acme-rail"))["pyproject.toml"])["project"]
    major, minor, *_ = eplb_core.__version__.split(".")
    assert project["name"] == "eplb-acme-rail"
    assert f"eplb>={major}.{minor},<{int(major) + 1}" in project["dependencies"]
    assert project["entry-points"]["eplb.backends"] == {"acme_rail": "eplb_acme_rail.spec:BACKEND"}


def test_the_api_version_that_it_was_written_for_is_a_literal() -> None:
    spec = render_project(ProjectNames.of("acme"))["src/eplb_acme/spec.py"]
    assert f"api_version={PLUGIN_API_VERSION!r}," in spec


def test_its_licence_is_that_of_eplb() -> None:
    assert render_project(ProjectNames.of("acme"))["LICENSE"] == (REPOSITORY / "LICENSE").read_text()


def test_the_workflow_keeps_the_expressions_of_its_own_language() -> None:
    workflow = render_project(ProjectNames.of("acme"))[".github/workflows/ci.yml"]
    assert "python-version: ${{ matrix.python }}" in workflow


def test_it_says_what_it_wrote_and_what_comes_next(tmp_path: Path) -> None:
    said = new_backend("acme", "--into", tmp_path).output
    for path in (tmp_path / "eplb-acme").rglob("*.py"):
        assert str(path) in said
    assert f"cd {tmp_path / 'eplb-acme'}" in said


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Acme", "'A' is not a lower-case letter"),
        ("9lives", "it must start with a lower-case letter"),
        ("acme_", "it ends with '_'"),
        ("", "it is empty"),
        ("../acme", "'.' is not a lower-case letter"),
        ("a" * 31, "it has 31 letters, but at most 30 are allowed"),
        ("auto", "it makes eplb choose a backend"),
        ("core", "its package would be eplb_core, which is eplb's own"),
        ("torch-gloo", "the installed distribution eplb registers it"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path, name: str, why: str) -> None:
    result = new_backend(name, "--into", tmp_path)
    assert result.exit_code == 2
    assert f"{name!r} cannot be the name of a" in result.output
    assert why in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_another_package_has_is_refused_and_its_own_is_not(tmp_path: Path) -> None:
    install_backend(tmp_path / "site", "rail", distribution="rail-of-somebody")
    install_backend(tmp_path / "site", "beam", distribution="eplb-beam")
    taken = run_eplb("new-backend", "rail", path=[tmp_path / "site"], cwd=tmp_path)
    assert taken.returncode == 2
    assert "the installed distribution rail-of-somebody registers it" in taken.stderr
    assert run_eplb("new-backend", "beam", path=[tmp_path / "site"], cwd=tmp_path).returncode == 0


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    kept = tmp_path / "eplb-acme" / "mine"
    kept.parent.mkdir()
    kept.write_text("mine")
    result = new_backend("acme", "--into", tmp_path)
    assert result.exit_code == 2
    assert "already exists: nothing is overwritten" in result.output
    assert [path.name for path in kept.parent.iterdir()] == ["mine"]


def test_a_folder_that_cannot_be_made_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = new_backend("acme", "--into", tmp_path / "file")
    assert result.exit_code == 2
    assert "Not a directory" in result.output


def test_a_project_that_could_not_be_written_whole_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_after_three(path: Path, text: str, encoding: str | None = None) -> int:
        written.append(path)
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        return original(path, text, encoding)

    written: list[Path] = []
    original = Path.write_text
    monkeypatch.setattr(Path, "write_text", full_after_three)
    result = new_backend("acme", "--into", tmp_path)
    assert result.exit_code == 2
    assert "No space left on device" in result.output
    assert list(tmp_path.iterdir()) == []


# --- from wheels, in an environment of its own -----------------------------------------------------------------------


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheels of eplb and of a project that this eplb wrote."""

    bin: Path
    project: Path

    def run(self, program: str, *arguments: str, timeout_s: float = CHILD_S) -> str:
        return run(self.bin / program, *arguments, cwd=self.project, timeout_s=timeout_s)


def build_wheel(source: Path, into: Path) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", into, cwd=source)
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("new-backend")
    venv.create(folder / "venv", symlinks=True)
    binaries = folder / "venv" / "bin"
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder / "venv")}))
    # A .pth file that names a folder does not run that folder's own: an editable eplb of there is not seen.
    (site / "beside.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", binaries / "python", "install", "-q", "--no-deps", "--no-index"]
    run(*pip, build_wheel(REPOSITORY, folder / "eplb"), cwd=folder)
    run(binaries / "eplb", "new-backend", "acme", cwd=folder)
    run(*pip, build_wheel(folder / "eplb-acme", folder / "acme"), cwd=folder)
    return Installed(binaries, folder / "eplb-acme")


def test_both_come_from_their_wheels(installed: Installed) -> None:
    code = "import eplb_core, eplb_acme; print(eplb_core.__file__, eplb_acme.__file__)"
    for file in installed.run("python", "-c", code).split():
        assert Path(file).is_relative_to(installed.bin.parent)


def test_eplb_lists_it_as_ready(installed: Installed) -> None:
    listed = json.loads(installed.run("eplb", "backends", "--json", "-"))["backends"]
    acme = next(entry for entry in listed if entry["name"] == "acme")
    assert (acme["distribution"], acme["state"]) == ("eplb-acme", "ready")


def test_its_own_tests_pass(installed: Installed) -> None:
    installed.run("python", "-m", "pytest", "-p", "no:cacheprovider", "tests/test_plugin.py")


# All of the kit takes half a minute; these are what a transport that only moves bytes gets wrong.
_CHECKS = (
    "every_dtype_arrives_bit_for_bit",
    "tensors_without_elements_are_sent",
    "received_data_is_there_on_return",
    "another_size_is_a_mismatch_everywhere",
    "a_closed_communicator_refuses_everything_else",
    "a_rank_that_does_not_execute_is_named_within_the_timeout",
)


def test_it_keeps_what_transports_most_often_break(installed: Installed) -> None:
    checks = [f"--check={check}" for check in _CHECKS]
    assert "conforms" in installed.run("eplb", "conformance", "acme?part=64KiB", "--ranks", "2", *checks)


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_all_of_its_tests_and_with_them_the_kit_pass(installed: Installed) -> None:
    installed.run("python", "-m", "pytest", "-p", "no:cacheprovider", timeout_s=300)


@pytest.mark.nightly
def test_its_types_are_right(installed: Installed) -> None:
    mypy = Path(sys.executable).with_name("mypy")
    cache = f"--cache-dir={installed.bin.parent.parent / 'mypy'}"
    run(mypy, cache, f"--python-executable={installed.bin / 'python'}", cwd=installed.project)
