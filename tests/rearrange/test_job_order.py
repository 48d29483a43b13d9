"""Each order that a background job sets between its stream and the engine's is needed: without it, bytes are wrong.

There are no streams on a CPU. So this plays them: what would be queued on a stream is noted, and carried out at the
end, in any order that the streams' waits allow. With all of them every such order gives the right bytes; where one is
removed, some order does not.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
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
from eplb_core.transport.copies import CopyBatch

RANKS, SLOTS, LAYERS, ROW = 2, 2, 6, 256
POISON = 255
WAIT_S = 60.0
ORDERS = ("engines first", "jobs first", *range(12))

# --- streams that are played -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Event:
    done: bool = False

    def set(self) -> None:
        self.done = True


@dataclass(eq=False)
class Stream:
    """What is queued: functions, and events to wait for."""

    name: str
    queued: deque[Event | Callable[[], object]] = field(default_factory=deque)

    def do(self, work: Callable[[], object]) -> None:
        self.queued.append(work)

    def wait_event(self, event: Event) -> None:
        self.queued.append(event)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record())

    def record(self) -> Event:
        event = Event()
        self.do(event.set)
        return event


class Streams:
    """The streams of all ranks. Each rank is a thread; its job has another one."""

    def __init__(self) -> None:
        self.all: list[Stream] = []
        self._current = threading.local()

    def make(self, name: str) -> Stream:
        stream = Stream(name)
        self.all.append(stream)
        return stream

    def current(self, device: object = None) -> Stream:
        return self._current.stream  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def on(self, device: object, stream: Stream | None) -> Iterator[None]:
        before = getattr(self._current, "stream", None)
        self._current.stream = stream or before
        try:
            yield
        finally:
            self._current.stream = before

    def carry_out(self, order: str | int) -> None:
        """Do all that is queued, step by step: of the streams that can go on, the first one in `order`."""
        chance = random.Random(order)
        while any(stream.queued for stream in self.all):
            can = [stream for stream in self.all if stream.queued and not self._waits(stream)]
            assert can, "the streams wait for one another"
            if isinstance(order, int):
                stream = chance.choice(can)
            else:
                stream = min(can, key=lambda each: not each.name.startswith(order.split("s ")[0]))
            work = stream.queued.popleft()
            if not isinstance(work, Event):
                work()

    @staticmethod
    def _waits(stream: Stream) -> bool:
        first = stream.queued[0]
        return isinstance(first, Event) and not first.done


@dataclass
class Message:
    tensor: torch.Tensor
    filled: Event
    taken: Event = field(default_factory=Event)


class PlayedTransport(EplbCommunicator):
    """Copies on the streams, in the order that the contract promises and in no other."""

    def __init__(self, wire: dict[tuple[int, int], queue.Queue[Message]]) -> None:
        self._wire = wire
        self._sends: list[tuple[torch.Tensor, int]] = []
        self._recvs: list[tuple[torch.Tensor, int]] = []

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        self._sends.append((tensor, dst_rank))

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        self._recvs.append((tensor, src_rank))

    def execute(self) -> None:
        rank, stream = self.binding.context.rank, self._stream
        assert isinstance(stream, Stream)
        sent = []
        for tensor, peer in self._sends:
            sent.append(Message(tensor, stream.record()))
            self._wire[rank, peer].put(sent[-1])
        for tensor, peer in self._recvs:
            message = self._wire[peer, rank].get(timeout=WAIT_S)
            stream.wait_event(message.filled)
            stream.do(lambda tensor=tensor, message=message: tensor.copy_(message.tensor))
            stream.do(message.taken.set)
        for message in sent:
            stream.wait_event(message.taken)
        self._sends, self._recvs = [], []


# --- a job on two ranks ----------------------------------------------------------------------------------------------

OLD = np.tile(np.arange(RANKS * SLOTS), (LAYERS, 1))
NEW = OLD[:, ::-1].copy()
CONTENT = np.arange(OLD.size).reshape(OLD.shape)  # of each expert: another one in every layer
Removal = Callable[[Streams], contextlib.AbstractContextManager[object]]


def nothing_is_removed(streams: Streams) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext()


def receiving_begins_behind_the_engine(streams: Streams) -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(Stream, "wait_stream")


def a_commit_waits_for_the_bytes(streams: Streams) -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(job_receiver, "mark", return_value=None)


def receiving_waits_for_copies_out_of_the_window(streams: Streams) -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(job, "mark", return_value=None)


def a_commit_is_on_the_engines_stream(streams: Streams) -> contextlib.AbstractContextManager[object]:
    other = streams.make("another one")
    return mock.patch.object(step_runner, "on_stream", lambda device, stream: streams.on(device, other))


REMOVALS: tuple[Removal, ...] = (
    receiving_begins_behind_the_engine,
    a_commit_waits_for_the_bytes,
    receiving_waits_for_copies_out_of_the_window,
    a_commit_is_on_the_engines_stream,
)


def wrong_slots(removal: Removal, order: str | int) -> int:
    """Move all experts beside an engine that has queued work before and after; count the slots that it saw wrong."""
    streams, store = Streams(), dist.HashStore()
    wire: dict[tuple[int, int], queue.Queue[Message]] = {
        (a, b): queue.Queue() for a in range(RANKS) for b in range(RANKS)
    }
    seen: list[list[torch.Tensor]] = [[] for _ in range(RANKS)]

    def mark(device: object, stream: Stream | None) -> Event:
        return (stream or streams.current()).record()

    def enqueue(copies: CopyBatch) -> None:
        both = list(zip(copies.targets, copies.sources, strict=True))
        streams.current().do(lambda: [target.copy_(source) for target, source in both])

    cuda = SimpleNamespace(
        Stream=lambda device: streams.make("job"), current_stream=streams.current, set_device=lambda device: None
    )

    def serve(rank: int) -> None:
        engine = streams.make("engine")
        weights = [[torch.full((SLOTS, ROW), POISON, dtype=torch.uint8)] for _ in range(LAYERS)]
        communicator = PlayedTransport(wire)
        context = BackendContext(
            rank=rank, world_size=RANKS, device=torch.device("cpu"), control=ControlPlane(store, rank, RANKS)
        )
        communicator.bind(Binding("played", context, timeout_s=WAIT_S, background=True))
        rearranger = Rearranger(communicator, weights, window_bytes=2 * SLOTS * ROW)
        rearranger._weights.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
        with streams.on(None, engine):
            rearranger.set_stream(engine)  # type: ignore[arg-type]
            for layer, (tensor,) in enumerate(weights):
                mine = torch.from_numpy(CONTENT[layer, OLD[layer, rank * SLOTS : (rank + 1) * SLOTS]])
                engine.do(lambda tensor=tensor, mine=mine: tensor.copy_(mine[:, None].expand(SLOTS, ROW)))
            rearranger.start(OLD, NEW, max_inflight_layers=2).wait(WAIT_S)
            for (tensor,) in weights:
                engine.do(lambda tensor=tensor: seen[rank].append(tensor.clone()))

    with (
        mock.patch.object(job_receiver, "torch", SimpleNamespace(cuda=cuda)),
        mock.patch.object(job, "torch", SimpleNamespace(cuda=cuda)),
        mock.patch.object(job_receiver, "mark", mark),
        mock.patch.object(job, "mark", mark),
        mock.patch.object(step_runner, "on_stream", streams.on),
        mock.patch.object(CopyBatch, "enqueue", enqueue),
        removal(streams),
        ThreadPoolExecutor(RANKS) as threads,
    ):
        for served in [threads.submit(serve, rank) for rank in range(RANKS)]:
            served.result(WAIT_S)
    streams.carry_out(order)
    expected = np.take_along_axis(CONTENT, NEW, axis=1)
    return sum(
        not torch.equal(tensor[slot], torch.full_like(tensor[slot], int(expected[layer, rank * SLOTS + slot])))
        for rank in range(RANKS)
        for layer, tensor in enumerate(seen[rank])
        for slot in range(SLOTS)
    )


@pytest.mark.parametrize("order", ORDERS)
def test_in_whatever_order_streams_run_the_engine_sees_what_was_committed(order: str | int) -> None:
    assert wrong_slots(nothing_is_removed, order) == 0


@pytest.mark.parametrize("removal", REMOVALS, ids=lambda removal: removal.__name__)
def test_without_one_order_between_the_streams_bytes_are_wrong(removal: Any) -> None:
    assert any(wrong_slots(removal, order) for order in ORDERS)
