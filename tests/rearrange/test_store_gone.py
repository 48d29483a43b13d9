"""The store has died with its host, or its host does not answer any more: nobody waits for it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_core.control.groups import TorchGroups
from eplb_core.errors import EplbError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment, collect_local_ranks
from eplb_core.rearrange.rearranger import Rearranger

TIMEOUT_S = 2.0
BOUND_S = 20.0  # far above the timeout, for a busy machine, and far below what torch waits: 300 s or without an end
OLD = np.array([[0, 1, 2, 3, 4, 5]])
NEW = OLD[:, ::-1].copy()


def survive(environment: RankEnvironment, config: str, end: str) -> dict[str, tuple[str, float]]:
    """Rank 0 hosts the store, as with `init_process_group("gloo")`, and ends; return what the calls of others did."""
    where = environment.store
    if environment.rank == 0:
        host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        where.set("port", str(host.port))
        where.set("pid", str(os.getpid()))
    store = dist.TCPStore("127.0.0.1", int(where.get("port")), is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=environment.rank, world_size=environment.world_size)
    weights = [[torch.arange(2, dtype=torch.float32).add(2 * environment.rank)[:, None].repeat(1, 64)]]
    communicator = create_eplb_communicator(TorchGroups(), config, weights[0])
    rearranger = Rearranger(communicator, weights)
    rearranger.run(OLD, OLD)
    where.add("here", 1)
    if environment.rank == 0:
        while where.add("here", 0) < environment.world_size:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL if end == "killed" else signal.SIGSTOP)
    _wait_for_the_end_of(int(where.get("pid")))
    calls: dict[str, Callable[[], Any]] = {
        "create": lambda: create_eplb_communicator(TorchGroups(), config, weights[0]),
        "start": lambda: rearranger.start(OLD, NEW).wait(),
        "run": lambda: rearranger.run(OLD, NEW),
        "close": communicator.close,
    }
    answers = {}
    for name, call in calls.items():
        began = time.monotonic()
        try:
            call()
            answers[name] = "nothing", time.monotonic() - began
        except EplbError as error:
            answers[name] = f"{type(error).__name__}: {error}", time.monotonic() - began
    where.add("done", 1)
    while where.add("done", 0) < environment.world_size - 1:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(where.get("pid")), signal.SIGKILL)
    return answers


def _wait_for_the_end_of(pid: int) -> None:
    """Return once all threads of a process are stopped or dead."""
    tasks = Path("/proc", str(pid), "task")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while any(stat.read_text().rpartition(")")[2].split()[0] not in "TZX" for stat in tasks.glob("*/stat")):
            time.sleep(0.01)


@pytest.mark.parametrize("end", ["killed", "stopped"])
@pytest.mark.parametrize("config", ["torch_gloo", "nixl?window=1MiB"])
def test_survivors_get_a_named_error_in_time_once_the_stores_host_is_gone(config: str, end: str) -> None:
    joined = "&" if "?" in config else "?"
    _, *survivors = collect_local_ranks(
        survive, 3, (f"{config}{joined}timeout={TIMEOUT_S:g}s", end), timeout_s=100.0, grace_s=90.0
    )
    for outcome in survivors:
        assert outcome.error is None, outcome.trace
        assert outcome.result is not None, outcome.message
        for call in ("create", "start", "run"):
            said, seconds = outcome.result[call]
            assert said.startswith(("HandshakeError", "DecisionUnknownError")), (call, said)
            assert seconds < BOUND_S, (call, seconds)
        said, seconds = outcome.result["close"]
        assert (said, seconds < BOUND_S) == ("nothing", True), (said, seconds)
        assert "the store" in outcome.result["create"][0]
        assert "gone" in outcome.result["create"][0]
