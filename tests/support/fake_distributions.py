"""Distributions as pip would leave them behind, written into a temporary folder, and Python children that see them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CHILD_TIMEOUT_S = 60


def install(
    folder: Path,
    name: str,
    *,
    version: str = "1.0",
    backends: Mapping[str, str] | None = None,
    plugins: Mapping[str, str] | None = None,
    modules: Mapping[str, str] | None = None,
    metadata: str = "dist-info",
) -> Path:
    """Write one distribution's metadata and modules into `folder` and return that folder.

    Args:
        folder: stands for a site-packages folder.
        name: the distribution's name.
        version: its version.
        backends: entry points of the group `eplb.backends`.
        plugins: entry points of the group `eplb.plugins`.
        modules: module name -> source.
        metadata: `dist-info` or `egg-info`.
    """
    stem = f"{name.replace('-', '_')}-{version}.{metadata}"
    where = folder / stem
    where.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (where / ("METADATA" if metadata == "dist-info" else "PKG-INFO")).write_text(text)
    sections = []
    for group, points in (("eplb.backends", backends), ("eplb.plugins", plugins)):
        if points:
            sections.append(f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items()))
    if sections:
        (where / "entry_points.txt").write_text("\n".join(sections))
    for module, source in (modules or {}).items():
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
    return folder


def spec_source(name: str, *, api: str = "PLUGIN_API_VERSION", **fields: object) -> str:
    """Return the source of a module that holds a `BackendSpec` named BACKEND."""
    arguments = {"summary": "a fake", "factory": "fake_impl:create", **fields}
    return (
        "from eplb_core.contract.backend import PLUGIN_API_VERSION, BackendSpec, Capabilities\n"
        f"BACKEND = BackendSpec(name={name!r}, api_version={api}, "
        + ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        + ")\n"
    )


def install_backend(folder: Path, name: str, *, distribution: str | None = None, **options: Any) -> Path:
    """Install a distribution with one healthy backend, in the module `<distribution>_spec`."""
    distribution = distribution or f"{name.replace('_', '-')}-eplb"
    module = f"{distribution.replace('-', '_')}_spec"
    version = options.pop("version", "1.0")
    return install(
        folder,
        distribution,
        version=version,
        backends={name: f"{module}:BACKEND"},
        modules={module: spec_source(name, **options)},
    )


def run_child(
    arguments: Sequence[str],
    path: Sequence[Path] = (),
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = CHILD_TIMEOUT_S,
) -> subprocess.CompletedProcess[str]:
    """Run this Python with `path` before its own site-packages; `EPLB_*` variables come from `environment` alone."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("EPLB_", "PYTHON", "COLUMNS", "NIXL_", "UCX_"))
    }
    inherited["PYTHONPATH"] = os.pathsep.join(map(str, path))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd or (path[0] if path else None),
        env={**inherited, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def run_python(
    source: str, path: Sequence[Path] = (), *, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> Any:
    """Run `source` in a child; return what it assigned to `answer`, by way of JSON."""
    source = textwrap.dedent(source) + "\nimport json, sys\nsys.__stdout__.write('\\n' + json.dumps(answer))\n"
    child = run_child(["-c", source], path, cwd=cwd, environment=environment)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def run_eplb(
    *arguments: str,
    path: Sequence[Path] = (),
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = CHILD_TIMEOUT_S,
) -> subprocess.CompletedProcess[str]:
    """Run the `eplb` command in a child."""
    starter = "import sys; sys.argv[0] = 'eplb'; from eplb_core.cli import main; main()"
    return run_child(["-c", starter, *arguments], path, cwd=cwd, environment=environment, timeout_s=timeout_s)
