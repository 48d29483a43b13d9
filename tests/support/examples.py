"""How many examples hypothesis draws: few by day, more by night.

`EPLB_TEST_EXAMPLES=20 pytest -m hypothesis` draws twenty times as many, with another limit of time.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("EPLB_TEST_EXAMPLES", "1"))


def examples(by_day: int, **more: Any) -> settings:
    """Return settings that draw `by_day` examples, or `EPLB_TEST_EXAMPLES` times as many, however long each takes."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(**{"max_examples": by_day * TIMES, "deadline": None, "suppress_health_check": slow, **more})
