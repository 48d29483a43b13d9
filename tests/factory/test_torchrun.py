"""A script of an engine's, started by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.programs import run_program

SCRIPT = """
    import sys
    from pathlib import Path

    import torch
    import torch.distributed as dist

    from eplb_core import create_eplb_communicator
    from eplb_core.control.groups import TorchGroups

    dist.init_process_group("gloo")
    rank, other = dist.get_rank(), 1 - dist.get_rank()
    weights = [torch.full((4, 1000), float(rank))]
    with create_eplb_communicator(TorchGroups(), sys.argv[1], weights) as communicator:
        landing = torch.zeros(1000)
        communicator.add_send(weights[0][2], other)
        communicator.add_recv(landing, other)
        communicator.execute()
    assert (landing == other).all()
    Path(sys.argv[2], f"rank {rank}").write_text(f"{landing.mean().item():g}")
    dist.destroy_process_group()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "engine.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


def received(folder: Path) -> list[str]:
    return [(folder / f"rank {rank}").read_text() for rank in range(2)]


def test_ranks_of_torchrun_make_a_communicator_and_use_it(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EPLB_")}
    ended = subprocess.run(
        [*command, str(script), "nixl?window=1MiB", str(tmp_path)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert received(tmp_path) == ["1", "0"]


@pytest.mark.parametrize("config", ["torch_gloo", "nixl?window=1MiB"])
def test_so_do_ranks_that_have_its_environment(config: str, script: Path, tmp_path: Path) -> None:
    ended = run_program(script, 2, [config, str(tmp_path)])
    assert all(outcome.succeeded and outcome.exit_code == 0 for outcome in ended), ended
    assert received(tmp_path) == ["1", "0"]
