"""What all tests share."""

from __future__ import annotations

import os

# torch looks up the name of every address that a store connects to. Where a name server drops one question in a
# hundred, that costs five seconds each time, and more than the timeouts that are tested.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
