"""Nothing keeps a tensor that was moved, or a window that was closed: on a GPU that would be device memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from eplb_core import TorchGroups, create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment, run_local_ranks

BACKENDS = ("torch_gloo", "torch_nccl", "nixl?window=1MiB", "nixl?mode=packed&window=1MiB", "nixl?verify=full")


def what_is_still_alive(environment: RankEnvironment) -> dict[str, list[bool]]:
    """Move a tensor each way, without the garbage collector, which would hide cycles of references."""
    environment.init_process_group()
    gc.disable()
    alive = {}
    for config in BACKENDS:
        communicator = create_eplb_communicator(TorchGroups(), config, [torch.zeros(1)])
        sent, received = torch.ones(100_000), torch.zeros(100_000)
        watched = [weakref.ref(sent), weakref.ref(received)]
        communicator.add_send(sent, 1 - environment.rank)
        communicator.add_recv(received, 1 - environment.rank)
        communicator.execute()
        del sent, received
        moved = [reference() is not None for reference in watched]
        shared = getattr(communicator, "_shared", None)
        windows = [] if shared is None else [shared.send_window.buffer, shared.receive_window.buffer]
        watched = [weakref.ref(window) for window in windows]
        del windows, shared
        communicator.close()
        alive[config] = moved + [reference() is not None for reference in watched]
    return alive


@pytest.fixture(scope="module")
def alive() -> list[dict[str, list[bool]]]:
    """What each of two ranks found."""
    return run_local_ranks(what_is_still_alive, 2, timeout_s=90)


@pytest.mark.parametrize("config", BACKENDS)
def test_moved_tensors_and_closed_windows_are_let_go_at_once(alive: list[dict[str, list[bool]]], config: str) -> None:
    for rank in alive:
        assert not any(rank[config])
