"""Installs the stand-in as a backend for these tests, as pip would leave it behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def standin_is_installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ranks have the `sys.path` of whoever starts them."""
    folder = tmp_path_factory.mktemp("installed")
    metadata = folder / "cuda_ipc_standin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cuda-ipc-standin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[eplb.backends]\ncuda_ipc_standin = standin_spec:BACKEND\n")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
