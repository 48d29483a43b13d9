"""Where Mooncake cannot be loaded, every test is skipped, with the reason."""

from __future__ import annotations

import pytest
from eplb_mooncake.engine import load

from eplb_core.errors import BackendUnavailableError


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        load()
    except BackendUnavailableError as error:
        reason = f"{error.what}: {error.why}; {error.remedy}"
        for item in items:
            if "/eplb-mooncake/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=reason))
