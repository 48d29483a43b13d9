"""`benchmarks/fixed_costs.py` counts what a rearrangement costs that moves little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fixed_costs.py"


def test_the_script_counts_messages_and_calls_of_steps_that_move_nothing_or_a_little() -> None:
    sizes = ["--layers", "2", "--slots", "6", "--expert-bytes", "4096", "--steps", "9", "--swaps", "0", "1"]
    command = [sys.executable, str(SCRIPT), "--backend", "torch_gloo", *sizes]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 0, ended.stderr
    head, *lines = [line.split(" | ") for line in ended.stdout.splitlines()]
    assert head[:3] == ["backend", "swaps", "placements"]
    rows = {tuple(line[1:3]): dict(zip(head, line, strict=True)) for line in lines}
    assert list(rows) == [("0", "same"), ("1", "same"), ("1", "new")]
    # On one host neither what moves nothing nor a step that is decided asks the store anything.
    assert float(rows["0", "same"]["messages"]) == 0
    assert float(rows["1", "same"]["messages"]) < 1
    assert all(int(row["calls"]) > 0 for row in rows.values())
