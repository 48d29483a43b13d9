"""What the tests with a real SGLang share."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import engine_env
import pytest
from engine_process import engine_environment


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter of an environment with SGLang."""
    try:
        return engine_env.python()
    except engine_env.NoEngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def environment(python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables of a process with SGLang and this plugin."""
    try:
        return engine_environment(tmp_path_factory.mktemp("site") / "packages")
    except importlib.metadata.PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed in this environment; it is one of the transports that are tried")
