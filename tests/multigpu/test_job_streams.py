"""Each order that a background job sets between its stream and the engine's is needed, on real streams.

    python -m pytest -m gpu tests/multigpu/test_job_streams.py

The ranks are threads of one process, one on each GPU, or all on one. What moves the bytes copies between the GPUs in
the order that the contract promises, and in no other: nothing waits on the host. Large kernels are queued wherever
something could be read or overwritten too early. With all orders the bytes are right; where one is removed, they are
not. `tests/rearrange/test_job_order.py` plays the same on a CPU, in all orders.
"""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.contract.context import BackendContext, Binding
from eplb_core.control.plane import ControlPlane
from eplb_core.rearrange import job, job_receiver, step_runner
from eplb_core.rearrange.rearranger import Rearranger

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(GPUS < 1, reason="torch sees no CUDA device"),
    pytest.mark.skipif("RANK" in os.environ, reason="it starts its own ranks"),
]

RANKS, SLOTS, LAYERS, ROW = 2, 2, 6, 1 << 20
POISON = 255
WAIT_S = 60.0


class Busy:
    """Keeps a stream of one device busy for some milliseconds a time."""

    def __init__(self, device: torch.device) -> None:
        self._matrix = torch.randn(4096, 4096, device=device)
        self._product = torch.empty_like(self._matrix)

    def __call__(self, times: int) -> None:
        for _ in range(4 * times):
            torch.matmul(self._matrix, self._matrix, out=self._product)


@dataclass
class Message:
    tensor: torch.Tensor
    filled: torch.cuda.Event
    taken: queue.Queue[torch.cuda.Event] = field(default_factory=queue.Queue)


class QueuedTransport(EplbCommunicator):
    """Copies on the communicator's stream, behind kernels, and never waits on the host for what is queued."""

    def __init__(self, wire: dict[tuple[int, int], queue.Queue[Message]], busy: Callable[[], None]) -> None:
        self._wire = wire
        self._busy = busy
        self._sends: list[tuple[torch.Tensor, int]] = []
        self._recvs: list[tuple[torch.Tensor, int]] = []

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        self._sends.append((tensor, dst_rank))

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        self._recvs.append((tensor, src_rank))

    def execute(self) -> None:
        rank, stream = self.binding.context.rank, self._stream
        assert stream is not None
        sent = []
        for tensor, peer in self._sends:
            sent.append(Message(tensor, stream.record_event()))
            self._wire[rank, peer].put(sent[-1])
        with torch.cuda.stream(stream):
            self._busy()
            for tensor, peer in self._recvs:
                message = self._wire[peer, rank].get(timeout=WAIT_S)
                stream.wait_event(message.filled)
                tensor.copy_(message.tensor, non_blocking=True)
                message.taken.put(stream.record_event())
        for message in sent:
            stream.wait_event(message.taken.get(timeout=WAIT_S))
        self._sends, self._recvs = [], []


@dataclass(frozen=True)
class Load:
    """How many times each stream is kept busy: before the weights are filled, before a copy, before commits."""

    filling: int = 0
    receiving: int = 0
    committing: int = 0


@contextlib.contextmanager
def on_another_stream(device: torch.device, stream: torch.cuda.Stream | None) -> Iterator[None]:
    """What `on_stream` would be, if it did not care which stream it is given, and that one had much to do."""
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        Busy(device)(4)
        yield


REMOVALS: dict[str, tuple[Load, Callable[[], contextlib.AbstractContextManager[Any]]]] = {
    "receiving begins behind the engine": (
        Load(filling=8),
        lambda: mock.patch.object(torch.cuda.Stream, "wait_stream", return_value=None),
    ),
    "a commit waits for the bytes": (
        Load(receiving=4),
        lambda: mock.patch.object(job_receiver, "mark", return_value=None),
    ),
    "receiving waits for copies out of the window": (
        Load(committing=40),
        lambda: mock.patch.object(job, "mark", return_value=None),
    ),
    "a commit is on the engine's stream": (
        Load(),
        lambda: mock.patch.object(step_runner, "on_stream", on_another_stream),
    ),
}

OLD = np.tile(np.arange(RANKS * SLOTS), (LAYERS, 1))
NEW = OLD[:, ::-1].copy()
CONTENT = np.arange(OLD.size).reshape(OLD.shape)  # of each expert: another one in every layer


def wrong_slots(load: Load, removal: Callable[[], contextlib.AbstractContextManager[Any]]) -> int:
    """Move all experts beside an engine that has queued work before and after; count the slots that it saw wrong."""
    store = dist.HashStore()
    wire: dict[tuple[int, int], queue.Queue[Message]] = {
        (a, b): queue.Queue() for a in range(RANKS) for b in range(RANKS)
    }
    expected = np.take_along_axis(CONTENT, NEW, axis=1)

    def serve(rank: int) -> int:
        device = torch.device("cuda", rank % GPUS)
        torch.cuda.set_device(device)
        busy, engine = Busy(device), torch.cuda.Stream(device)
        weights = [[torch.full((SLOTS, ROW), POISON, dtype=torch.uint8, device=device)] for _ in range(LAYERS)]
        mine = [torch.from_numpy(row[rank * SLOTS : (rank + 1) * SLOTS]).to(device) for row in CONTENT]
        busy(1)
        torch.cuda.synchronize(device)
        communicator = QueuedTransport(wire, lambda: busy(load.receiving))
        context = BackendContext(rank=rank, world_size=RANKS, device=device, control=ControlPlane(store, rank, RANKS))
        communicator.bind(Binding("queued", context, timeout_s=WAIT_S, background=True))
        rearranger = Rearranger(communicator, weights, window_bytes=2 * SLOTS * ROW)
        with torch.cuda.stream(engine):
            rearranger.set_stream(engine)
            busy(load.filling)
            for (tensor,), numbers in zip(weights, mine, strict=True):
                tensor.copy_(numbers[:, None].expand(SLOTS, ROW))
            moving = rearranger.start(OLD, NEW, max_inflight_layers=2)
            busy(load.committing)
            moving.wait(WAIT_S)
            seen = [tensor.clone() for (tensor,) in weights]
        torch.cuda.synchronize(device)
        return sum(
            not bool((tensor[slot] == int(expected[layer, rank * SLOTS + slot])).all())
            for layer, tensor in enumerate(seen)
            for slot in range(SLOTS)
        )

    with removal(), ThreadPoolExecutor(RANKS) as threads:
        return sum(served.result(WAIT_S) for served in [threads.submit(serve, rank) for rank in range(RANKS)])


@pytest.mark.parametrize("name", REMOVALS)
def test_with_every_order_the_engine_sees_what_was_committed(name: str) -> None:
    assert wrong_slots(REMOVALS[name][0], contextlib.nullcontext) == 0


@pytest.mark.parametrize("name", REMOVALS)
def test_without_one_order_between_the_streams_bytes_are_wrong(name: str) -> None:
    assert wrong_slots(*REMOVALS[name]) > 0
