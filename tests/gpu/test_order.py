"""Each synchronisation with the device is needed: without any one of them, bytes are wrong in the scenarios below.

Large kernels are queued on the communicator's stream before a transfer, between its start and its end, and on another
stream, so that whatever is not waited for has not happened.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import eplb_backends.nixl.communicator as nixl_communicator
import eplb_backends.nixl.inbox as nixl_inbox
import eplb_backends.nixl.outbox as nixl_outbox
import eplb_backends.torch_gloo.communicator as gloo_communicator
import eplb_core.rearrange.step_runner as step_runner
from eplb_core.rearrange.rearranger import Rearranger
from tests.gpu.test_device_tensors import Busy, message, neighbours
from tests.rearrange import test_rearrange
from tests.support.ranks import Member, Report, Scenario, run_scenarios

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

ROUNDS = 3
PACKED = "nixl?mode=packed&window=64MiB"
DIRECT = "nixl?mode=direct&window=64MiB"
GLOO = "torch_gloo"
RANKS = 2

Patch = Callable[[], contextlib.AbstractContextManager[Any]]


class NeverRecorded:
    """An event that says it is done at once."""

    def record(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True


class TorchWithoutEvents:
    """torch, but for the events that copies are waited for by."""

    cuda = SimpleNamespace(Event=NeverRecorded)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def on_the_current_stream(device: torch.device, stream: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@contextlib.contextmanager
def every_other_call_left_out(module: Any, name: str, first: int) -> Iterator[None]:
    """Leave out call `first`, and every second one from there."""
    function, number = getattr(module, name), itertools.count()

    def maybe(*arguments: Any) -> None:
        if next(number) % 2 != first:
            function(*arguments)

    with mock.patch.object(module, name, maybe):
        yield


NOT_WAITED_FOR = functools.partial(mock.patch.object, nixl_communicator, "mark", lambda device, stream: None)
REMOVALS: dict[str, tuple[str, int, Patch]] = {
    "nothing is removed, packed": (PACKED, 9 << 20, contextlib.nullcontext),
    "nothing is removed, direct": (DIRECT, 9 << 20, contextlib.nullcontext),
    "nothing is removed, gloo": (GLOO, 9 << 20, contextlib.nullcontext),
    "reading in place waits for the stream": (DIRECT, 9 << 20, NOT_WAITED_FOR),
    "a slot is announced when it is packed": (
        PACKED,
        3 << 20,
        functools.partial(mock.patch.object, nixl_outbox, "torch", TorchWithoutEvents()),
    ),
    "a slot is read into again when it is unpacked": (
        PACKED,
        9 << 20,  # more than the slots hold
        functools.partial(mock.patch.object, nixl_inbox, "torch", TorchWithoutEvents()),
    ),
    "unpacking is on the communicator's stream": (
        PACKED,
        3 << 20,  # less than the slots hold: nobody waits for one of them
        functools.partial(mock.patch.object, nixl_inbox, "on_stream", on_the_current_stream),
    ),
    "what is sent is copied out behind the stream": (
        GLOO,
        9 << 20,
        functools.partial(every_other_call_left_out, gloo_communicator, "synchronize", 0),
    ),
}


def transfers_between_queued_work(member: Member, name: str) -> list[int]:
    """Return the rounds in which wrong bytes were seen by what was queued after the transfer."""
    config, nbytes, removal = REMOVALS[name]
    to, come_from = neighbours(member)
    busy, side, elsewhere = Busy(member.device), torch.cuda.Stream(), torch.cuda.current_stream()
    outgoing = [message(member.rank, to, epoch, member)[:nbytes] for epoch in range(ROUNDS)]
    expected = [message(come_from, member.rank, epoch, member)[:nbytes] for epoch in range(ROUNDS)]
    source, landing = torch.full_like(outgoing[0], 0xEE), torch.full_like(expected[0], 0xEE)
    kept = [torch.empty_like(landing) for _ in range(ROUNDS)]
    torch.cuda.synchronize()
    with member.communicator(config) as communicator:
        communicator.register([source])
        if config == DIRECT:  # what is packed is read through a slot unless it lands in declared memory
            communicator.register([landing], landing=True)
        communicator.set_stream(side)
        for epoch in range(ROUNDS):
            member.meet(f"{name} {epoch}", True)
            with torch.cuda.stream(side):
                busy()
                source.copy_(outgoing[epoch])
            communicator.add_send(source, to)
            communicator.add_recv(landing, come_from)
            with removal():
                pending = communicator.start()
                with torch.cuda.stream(side):
                    busy()
                with torch.cuda.stream(elsewhere):
                    for _ in range(8):
                        busy()
                pending.wait()
            with torch.cuda.stream(side):
                kept[epoch].copy_(landing)
                landing.fill_(0xEE)
                source.fill_(0xEE)
            torch.cuda.synchronize()
    return [epoch for epoch in range(ROUNDS) if not torch.equal(kept[epoch], expected[epoch])]


def commits_between_queued_work(member: Member, removal: Patch) -> int:
    """Return how many slots what was queued after a rearrangement saw wrong bytes in."""
    rng = np.random.default_rng(3)
    busy, side, elsewhere = Busy(member.device), torch.cuda.Stream(), torch.cuda.current_stream()
    weights = test_rearrange.mixed_layers(member.device)
    old, new = (test_rearrange.random_placement(rng, len(weights), member.world_size) for _ in range(2))
    test_rearrange.fill(weights, old, member.rank)
    torch.cuda.synchronize()
    with member.communicator("nixl?window=64MiB", weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights, in_place="never")
        rearranger.set_stream(side)
        with torch.cuda.stream(elsewhere):
            for _ in range(20):
                busy()
        with removal():
            rearranger.run(old, new)
        with torch.cuda.stream(side), torch.no_grad():
            seen = [[tensor.clone() for tensor in layer] for layer in weights]
        torch.cuda.synchronize()
    return len(test_rearrange.wrong_slots(seen, new, member.rank))


COMMITS: dict[str, Patch] = {
    "nothing is removed": contextlib.nullcontext,
    "a commit is on the rearranger's stream": functools.partial(
        mock.patch.object, step_runner, "on_stream", on_the_current_stream
    ),
}


def commit_by_name(member: Member, name: str) -> int:
    return commits_between_queued_work(member, COMMITS[name])


@pytest.fixture(scope="module")
def report() -> Report:
    scenarios = [Scenario(name, transfers_between_queued_work, (name,)) for name in REMOVALS]
    scenarios += [Scenario(f"commit: {name}", commit_by_name, (name,)) for name in COMMITS]
    return run_scenarios(RANKS, scenarios, device="cuda:0", timeout_s=270)


@pytest.mark.parametrize("name", [name for name in REMOVALS if name.startswith("nothing")])
def test_with_every_synchronisation_all_bytes_are_right(report: Report, name: str) -> None:
    assert report.returned(name) == [[]] * RANKS


@pytest.mark.parametrize("name", [name for name in REMOVALS if not name.startswith("nothing")])
def test_without_one_synchronisation_bytes_are_wrong(report: Report, name: str) -> None:
    assert any(report.returned(name))


def test_a_commit_is_seen_by_what_is_queued_after_it_and_would_not_be_on_another_stream(report: Report) -> None:
    right, wrong = (report.returned(f"commit: {name}") for name in COMMITS)
    assert right == [0] * RANKS
    assert any(wrong)
