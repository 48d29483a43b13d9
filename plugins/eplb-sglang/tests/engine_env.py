"""An environment with a real SGLang for CPU ranks: made once, kept in a cache folder, given the packages under test.

    python plugins/eplb-sglang/tests/engine_env.py        # makes it now, e.g. in a step of CI that caches the folder

The folder is `$EPLB_SGLANG_ENGINE`, or `~/.cache/eplb/sglang-cpu-VERSION` (2.9 GB). Without `$EPLB_SGLANG_ENGINE=make`,
the tests make nothing: they use what is there, or skip with the reason.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SGLANG = "0.5.23"
VARIABLE = "EPLB_SGLANG_ENGINE"
REQUIREMENTS = Path(__file__).parent / "engine-requirements.txt"
_LIMIT_S = 900.0
_STAMP = "complete"


class NoEngineError(Exception):
    """There is no environment, and why."""


def folder() -> Path:
    """Return where the environment is, or would be."""
    chosen = os.environ.get(VARIABLE, "")
    return Path(chosen) if chosen not in ("", "make") else Path.home() / ".cache" / "eplb" / f"sglang-cpu-{SGLANG}"


def python() -> Path:
    """Return the interpreter of the environment; make it first where `$EPLB_SGLANG_ENGINE` is `make`.

    Raises:
        NoEngineError: there is none, or it could not be made.
    """
    if os.environ.get(VARIABLE) == "make":
        make()
    found = folder() / "bin" / "python"
    if not (folder() / _STAMP).exists() and not (os.environ.get(VARIABLE) and found.exists()):
        raise NoEngineError(
            f"no SGLang for CPUs in {folder()}; python {Path(__file__).name} makes it (2.9 GB), or set {VARIABLE}"
        )
    return found


def make() -> Path:
    """Make the environment, unless it is complete; one process at a time. Return its folder.

    Raises:
        NoEngineError: a package could not be had, within 15 minutes.
    """
    target = folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f"{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (target / _STAMP).exists():
            return target
        shutil.rmtree(target, ignore_errors=True)
        try:
            _run([sys.executable, "-m", "venv", str(target)])
            pip = [str(target / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps"]
            _run([*pip, "--disable-pip-version-check", "-r", str(REQUIREMENTS)])
        except (OSError, subprocess.SubprocessError) as error:
            detail = getattr(error, "stderr", "") or str(error)
            raise NoEngineError(f"sglang {SGLANG} cannot be installed: {detail.strip()[-400:]}") from error
        (target / _STAMP).touch()
    return target


def with_packages_under_test(site: Path, distributions: list[str]) -> None:
    """Make a folder for `PYTHONPATH`: links to packages that are installed here, with their entry points.

    Args:
        site: an empty folder.
        distributions: names of distributions, installed in the interpreter that runs the tests.
    """
    for name in distributions:
        distribution = importlib.metadata.distribution(name)
        metadata = site / f"{name.replace('-', '_')}-{distribution.version}.dist-info"
        metadata.mkdir()
        for file in ("METADATA", "entry_points.txt"):
            (metadata / file).write_text(distribution.read_text(file) or "")
        for package in _packages(distribution):
            spec = importlib.util.find_spec(package)
            if spec is not None and spec.submodule_search_locations:
                (site / package).symlink_to(spec.submodule_search_locations[0])


def add_distribution(site: Path, name: str, entry_points: str) -> None:
    """Add a distribution that is nothing but its entry points."""
    metadata = site / f"{name.replace('-', '_')}-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(entry_points)


def _packages(distribution: importlib.metadata.Distribution) -> set[str]:
    name = str(distribution.metadata["Name"])
    return {"eplb_core", "eplb_backends"} if name == "eplb" else {name.replace("-", "_")}


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, timeout=_LIMIT_S, capture_output=True, text=True)


if __name__ == "__main__":
    try:
        print(make())
    except NoEngineError as error:
        sys.exit(str(error))
