"""Plugins hear of every transfer, with the right numbers, and cannot harm one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from eplb_core.contract.communicator import EplbCommunicator, PendingTransfer
from eplb_core.contract.context import Binding
from eplb_core.contract.stats import TransferStats
from eplb_core.hooks import PluginHost, hookimpl
from eplb_core.hooks.observed import ObservedCommunicator, about_group, plugins_of
from eplb_core.rearrange.rearranger import Rearranger
from tests.support.ranks import Member, Report, Scenario, Sent, error_of, exchange, ring, run_scenarios

FLUSH_S = 20.0
BACKENDS = ("torch_gloo", "nixl?window=1MiB")


class Recorder:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def _write(self, what: str, event: Any, *more: Any) -> None:
        about = (event.backend, event.rank, event.world_size, event.bytes_sent, event.bytes_received, event.messages)
        self.heard.append((what, *about, *more))

    @hookimpl
    def eplb_transfer_started(self, event: Any) -> None:
        self._write("started", event)

    @hookimpl
    def eplb_transfer_finished(self, event: Any) -> None:
        self._write("finished", event, event.stats.bytes_sent, event.stats.bytes_received)

    @hookimpl
    def eplb_transfer_failed(self, event: Any) -> None:
        self._write("failed", event, type(event.error).__name__)


class Keeps:
    """Keeps the events of transfers that finished."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events

    @hookimpl
    def eplb_transfer_finished(self, event: Any) -> None:
        self.events.append(event)


class Blocks:
    """A plugin whose hook does not return before it is let."""

    def __init__(self) -> None:
        self.let = threading.Event()
        self.heard = 0

    @hookimpl
    def eplb_transfer_finished(self) -> None:
        assert self.let.wait(FLUSH_S)
        self.heard += 1


class Fails:
    """A plugin whose every hook raises."""

    @hookimpl
    def eplb_transfer_started(self) -> None:
        raise OSError("the metrics server is gone")

    eplb_transfer_finished = eplb_transfer_failed = eplb_transfer_started


def told(host: PluginHost) -> None:
    """Wait until the hooks have heard of everything."""
    assert host.flush(FLUSH_S)


def host_with(*plugins: object) -> PluginHost:
    host = PluginHost()
    for number, plugin in enumerate(plugins):
        host.register(plugin, f"plugin {number}")
    return host


def a_transfer_that_ends_well(member: Member, config: str) -> list[tuple[Any, ...]]:
    recorder = Recorder()
    host = host_with(recorder)
    with member.communicator(config, plugins=host) as communicator:
        exchange(member, communicator, [Sent(0, 1, 1000), Sent(0, 1, 24), Sent(1, 0, 7), Sent(0, 1, 0)])
        communicator.execute()
    told(host)
    return recorder.heard


def a_transfer_that_fails(member: Member, config: str) -> list[tuple[Any, ...]]:
    recorder = Recorder()
    host = host_with(recorder)
    with member.communicator(config, plugins=host) as communicator:
        if member.rank == 0:
            communicator.add_send(torch.zeros(10), 1)
        assert error_of(communicator.execute)["type"] == "TransferMismatchError"
        refused = error_of(lambda: communicator.add_send(torch.zeros(10), member.rank))
        assert refused["type"] == "InvalidTransferError"
        exchange(member, communicator, ring(2, 5))
    told(host)
    return recorder.heard


def plugins_that_raise(member: Member, config: str) -> tuple[list[str], bool]:
    first, last = Recorder(), Recorder()
    host = host_with(first, Fails(), last)
    with member.communicator(config, plugins=host) as communicator:
        for epoch in range(3):
            exchange(member, communicator, ring(2, 50_000), epoch)
    told(host)
    return [entry[0] for entry in first.heard], first.heard == last.heard


def a_hook_that_does_not_return(member: Member, config: str) -> tuple[int, int, int]:
    blocks = Blocks()
    host = host_with(blocks)
    with member.communicator(config, plugins=host) as communicator:
        for epoch in range(20):
            exchange(member, communicator, ring(2, 5_000), epoch)
    heard_meanwhile = blocks.heard
    blocks.let.set()
    told(host)
    return heard_meanwhile, blocks.heard, host.events_dropped


def what_events_tell_beside_the_sums(member: Member, config: str) -> tuple[dict[int, int], dict[int, int], bool]:
    events: list[Any] = []
    host = host_with(Keeps(events))
    with member.communicator(config, plugins=host) as communicator:
        exchange(member, communicator, [Sent(0, 1, 1000), Sent(0, 1, 24), Sent(1, 0, 7)])
        staging_bytes = communicator.staging_bytes
        assert communicator.binding.plugins is plugins_of(communicator) is host
        assert about_group(communicator) == {
            "backend": config.partition("?")[0],
            "rank": member.rank,
            "world_size": 2,
        }
    told(host)
    return dict(events[0].bytes_sent_to), dict(events[0].bytes_received_from), events[0].staging_bytes == staging_bytes


def an_observed_communicator_is_as_good_as_a_plain_one(member: Member, config: str) -> list[int]:
    """It rearranges weights, registered and in several steps, and tells the same about itself."""
    recorder = Recorder()
    host = host_with(recorder)
    old, new = np.array([[0, 1, 2, 3]]), np.array([[3, 2, 1, 0]])
    weights = [[torch.tensor([2.0 * member.rank, 2.0 * member.rank + 1]).unsqueeze(1).repeat(1, 5000)]]
    with (
        member.communicator(config, plugins=host) as communicator,
        member.communicator(config, plugins=host_with()) as plain,
    ):
        assert isinstance(communicator, ObservedCommunicator)
        assert not isinstance(plain, ObservedCommunicator)
        said = {name for name, what in vars(EplbCommunicator).items() if isinstance(what, property)}
        for name in sorted(said - {"binding", "last_stats"}):
            assert getattr(communicator, name) == getattr(plain, name), name
        Rearranger(communicator, weights, window_bytes=20_224).run(old, new)
        assert {name for name in vars(plain) if not hasattr(communicator, name)} == set()
        assert communicator.last_stats == communicator.inner.last_stats
    told(host)
    assert {entry[0] for entry in recorder.heard} == {"started", "finished"}
    assert sum(entry[4] for entry in recorder.heard if entry[0] == "finished") == 2 * 5000 * 4
    return weights[0][0][:, 0].int().tolist()


SCENARIOS = (
    a_transfer_that_ends_well,
    a_transfer_that_fails,
    plugins_that_raise,
    a_hook_that_does_not_return,
    what_events_tell_beside_the_sums,
    an_observed_communicator_is_as_good_as_a_plain_one,
)


@pytest.fixture(scope="module")
def report() -> Report:
    scenarios = [Scenario(f"{each.__name__} {config}", each, (config,)) for config in BACKENDS for each in SCENARIOS]
    return run_scenarios(2, scenarios)


@pytest.mark.parametrize("config", BACKENDS)
def test_start_and_end_are_told_with_the_payload_of_this_rank(report: Report, config: str) -> None:
    name = config.partition("?")[0]
    for rank, heard in enumerate(report.returned(f"a_transfer_that_ends_well {config}")):
        sent, received = ((1024, 7), (7, 1024))[rank]
        assert heard == [
            ("started", name, rank, 2, sent, received, 4),
            ("finished", name, rank, 2, sent, received, 4, sent, received),
            ("started", name, rank, 2, 0, 0, 0),
            ("finished", name, rank, 2, 0, 0, 0, 0, 0),
        ]


@pytest.mark.parametrize("config", BACKENDS)
def test_a_failure_is_told_with_its_error_and_not_counted_again(report: Report, config: str) -> None:
    for rank, heard in enumerate(report.returned(f"a_transfer_that_fails {config}")):
        assert [(entry[0], *entry[4:7]) for entry in heard] == [
            ("started", 40 * (rank == 0), 0, int(rank == 0)),
            ("failed", 40 * (rank == 0), 0, int(rank == 0)),
            ("started", 5, 5, 2),
            ("finished", 5, 5, 2),
        ]
        assert heard[1][-1] == "TransferMismatchError"


@pytest.mark.parametrize("config", BACKENDS)
def test_a_plugin_that_raises_harms_neither_the_transfer_nor_other_plugins(report: Report, config: str) -> None:
    assert report.returned(f"plugins_that_raise {config}") == [(["started", "finished"] * 3, True)] * 2


@pytest.mark.parametrize("config", BACKENDS)
def test_a_hook_that_does_not_return_keeps_no_transfer_waiting(report: Report, config: str) -> None:
    assert report.returned(f"a_hook_that_does_not_return {config}") == [(0, 20, 0)] * 2


@pytest.mark.parametrize("config", BACKENDS)
def test_bytes_are_told_peer_by_peer_and_staging_as_the_transport_says(report: Report, config: str) -> None:
    assert report.returned(f"what_events_tell_beside_the_sums {config}") == [
        ({1: 1024}, {1: 7}, True),
        ({0: 7}, {0: 1024}, True),
    ]


@pytest.mark.parametrize("config", BACKENDS)
def test_an_observed_communicator_does_all_that_a_plain_one_does(report: Report, config: str) -> None:
    assert report.returned(f"an_observed_communicator_is_as_good_as_a_plain_one {config}") == [[3, 2], [1, 0]]


def test_nothing_that_the_contract_names_is_left_to_its_default() -> None:
    names = {name for name in vars(EplbCommunicator) if not name.startswith("_")}
    assert names - vars(ObservedCommunicator).keys() == {"binding"}


class Idle(PendingTransfer):
    """It does in `wait()` what it was given for idle time."""

    def use_idle_time(self, work: Iterator[object]) -> None:
        self.work = work

    def wait(self) -> TransferStats | None:
        for _ in self.work:
            pass
        return None


class Idles(EplbCommunicator):
    """Its transfers are idle and nothing else."""

    def __init__(self) -> None:
        self.bind(Binding("idles", SimpleNamespace(rank=0, world_size=1)))  # type: ignore[arg-type]

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None: ...

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None: ...

    def execute(self) -> None: ...

    def start(self) -> Idle:
        return Idle(None)


def test_the_idle_time_of_an_observed_transfer_is_used() -> None:
    pending = ObservedCommunicator(Idles(), host_with()).start()
    done: list[int] = []
    pending.use_idle_time(done.append(number) for number in range(3))
    pending.wait()
    assert done == [0, 1, 2]


def test_every_rank_exits_in_order(report: Report) -> None:
    assert report.exit_codes == [0, 0]
