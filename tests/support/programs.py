"""Programs that are written for torchrun, run by local ranks: forked, so that they start in milliseconds."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from eplb_core.launch.local_ranks import Outcome, RankEnvironment, collect_local_ranks

LIMIT_S = 60.0


def run_program(
    program: Path,
    num_ranks: int,
    arguments: Sequence[str] = (),
    disturb: Callable[[RankEnvironment], None] | None = None,
) -> list[Outcome]:
    """Return how each rank ended.

    Args:
        program: a Python file that calls `init_process_group` with torchrun's environment.
        num_ranks: how many ranks.
        arguments: of its command line.
        disturb: called on each rank before the program; at the top level of a module.
    """
    return collect_local_ranks(
        _run, num_ranks, (program, tuple(arguments), disturb), timeout_s=LIMIT_S, grace_s=LIMIT_S
    )


def _run(
    environment: RankEnvironment,
    program: Path,
    arguments: tuple[str, ...],
    disturb: Callable[[RankEnvironment], None] | None,
) -> None:
    store = environment.store
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, dist.TCPStore)  # the launcher's
    os.environ |= {
        "RANK": str(environment.rank),
        "LOCAL_RANK": str(environment.rank),
        "WORLD_SIZE": str(environment.world_size),
        "LOCAL_WORLD_SIZE": str(environment.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    torch.set_num_threads(1)
    sys.argv = [str(program), *arguments]
    if disturb is not None:
        disturb(environment)
    runpy.run_path(str(program), run_name="__main__")
