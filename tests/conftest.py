"""What all tests share."""

from __future__ import annotations

import os
from typing import Any

import pytest

# torch looks up the name of every address that a store connects to. Where a name server drops one question in a
# hundred, that costs five seconds each time, and more than the timeouts that are tested.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

_LOOK_AT_SHARED_MEMORY = ("tests/testing/", "tests/docs/test_pages.py", "tests/docs/test_tutorial.py")
"""Files that leave something in /dev/shm on purpose, or have the conformance kit look for what was left there."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers, give each whole files: most share ranks that a fixture of their module has started."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):  # type: ignore[misc, unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            alone = nodeid.startswith(_LOOK_AT_SHARED_MEMORY)
            return "shared memory" if alone else super()._split_scope(nodeid)

    return Files(config, log)
