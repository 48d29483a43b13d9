"""What each event adds to the metrics, seen through a plugin host as eplb calls it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from eplb_prometheus import Metrics, PrometheusPlugin
from prometheus_client import CollectorRegistry, start_http_server

from eplb_core import TransferStats
from eplb_core.cli.watch.endpoint import Endpoint
from eplb_core.errors import PeerLostError, TransferTimeoutError
from eplb_core.hooks import (
    PluginHost,
    RearrangeFailed,
    RearrangeFinished,
    RearrangeStarted,
    StepCommitted,
    TransferFailed,
    TransferFinished,
    TransferStarted,
)

WAIT_S = 20.0
WHO: dict[str, Any] = {"backend": "shm", "rank": 1, "world_size": 4}
TRAFFIC: dict[str, Any] = {
    **WHO,
    "bytes_sent": 30,
    "bytes_received": 7,
    "messages": 3,
    "bytes_sent_to": {0: 10, 2: 20},
    "bytes_received_from": {3: 7},
}


class Told:
    """A host with the plugin, and the registry that it counts in."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.host = PluginHost("eplb.plugins.of-nobody")
        self.host.register(PrometheusPlugin(self.registry), "prometheus")

    def tell(self, *events: Any) -> Told:
        for event in events:
            self.host.notify(event)
        assert self.host.flush(WAIT_S)
        return self

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"eplb_{name}", {"backend": "shm", "rank": "1", **labels})


@pytest.fixture
def told() -> Told:
    return Told()


def finished(**more: Any) -> TransferFinished:
    stats = TransferStats(seconds=0.3, phases={"pack": 0.1, "read": 0.2})
    return TransferFinished(**{**TRAFFIC, **more}, stats=stats, staging_bytes=4096)


# --- transfers -------------------------------------------------------------------------------------------------------


def test_a_transfer_that_starts_is_counted_before_it_ends(told: Told) -> None:
    told.tell(TransferStarted(**TRAFFIC))
    assert (told.value("transfers_started_total"), told.value("transfers_total")) == (1, None)


def test_a_transfer_counts_its_tensors_and_its_bytes_by_peer(told: Told) -> None:
    told.tell(finished(), finished())
    assert told.value("transfers_total") == 2
    assert told.value("transfer_messages_total") == 6
    assert told.value("transfer_sent_bytes_total", peer="0") == 20
    assert told.value("transfer_sent_bytes_total", peer="2") == 40
    assert told.value("transfer_received_bytes_total", peer="3") == 14
    assert told.value("transfer_received_bytes_total", peer="0") is None


def test_seconds_go_into_histograms_of_the_whole_and_of_each_phase(told: Told) -> None:
    told.tell(finished())
    assert told.value("transfer_seconds_sum") == pytest.approx(0.3)
    assert told.value("transfer_seconds_bucket", le="0.25") == 0
    assert told.value("transfer_seconds_bucket", le="0.5") == 1
    assert told.value("transfer_phase_seconds_sum", phase="pack") == pytest.approx(0.1)
    assert told.value("transfer_phase_seconds_sum", phase="read") == pytest.approx(0.2)


def test_staging_is_what_the_last_transfer_told(told: Told) -> None:
    told.tell(finished(), finished())
    assert told.value("transfer_staging_bytes") == 4096


def test_failures_are_counted_by_class_phase_and_the_peers_they_blame(told: Told) -> None:
    told.tell(
        TransferFailed(**TRAFFIC, error=PeerLostError("gone", peers=[0, 2], phase="read")),
        TransferFailed(**TRAFFIC, error=TransferTimeoutError("late", peers=[2], phase="agree")),
        TransferFailed(**TRAFFIC, error=RuntimeError("a library's own")),
    )
    assert told.value("transfer_failures_total", error="PeerLostError", phase="read") == 1
    assert told.value("transfer_failures_total", error="TransferTimeoutError", phase="agree") == 1
    assert told.value("transfer_failures_total", error="RuntimeError", phase="") == 1
    assert (told.value("peer_failures_total", peer="0"), told.value("peer_failures_total", peer="2")) == (1, 2)
    assert told.value("transfer_sent_bytes_total", peer="0") is None


def test_in_groups_that_are_too_large_peers_are_counted_together() -> None:
    registry = CollectorRegistry()
    Metrics(registry, most_peers=3).transfer_finished(finished())
    labels = {"backend": "shm", "rank": "1", "peer": "all"}
    assert registry.get_sample_value("eplb_transfer_sent_bytes_total", labels) == 30
    assert registry.get_sample_value("eplb_transfer_received_bytes_total", labels) == 7


# --- rearrangements --------------------------------------------------------------------------------------------------


def started() -> RearrangeStarted:
    return RearrangeStarted(**WHO, bytes_to_receive=100, bytes_to_send=50, steps=2, layers=3)


def step(number: int, nbytes: int) -> StepCommitted:
    return StepCommitted(**WHO, step=number, steps=2, layers=(number,), bytes_received=nbytes, peers=(0,), seconds=0.5)


def test_while_a_rearrangement_runs_its_bytes_ahead_shrink(told: Told) -> None:
    told.tell(started(), step(0, 60))
    assert told.value("rearrangement_in_progress") == 1
    assert told.value("rearrangement_bytes_ahead") == 40
    assert told.value("rearrangement_bytes_planned") == 100
    assert (told.value("rearrangement_steps_ahead"), told.value("rearrangement_steps_planned")) == (1, 2)
    assert told.value("rearrangement_received_bytes_total") == 60
    assert told.value("rearrangement_steps_total") == 1
    assert told.value("rearrangement_step_seconds_sum") == 0.5


def test_a_rearrangement_that_finishes_is_counted_with_its_phases_and_staging(told: Told) -> None:
    end = RearrangeFinished(
        **WHO, seconds=2.0, moved=5, bytes_received=100, steps=2, phases={"commit": 0.5}, staging_bytes=8192
    )
    told.tell(started(), step(0, 60), step(1, 40), end)
    assert told.value("rearrangements_total") == 1
    assert told.value("rearrangement_seconds_sum") == 2.0
    assert told.value("rearrangement_phase_seconds_sum", phase="commit") == 0.5
    assert told.value("rearrangement_staging_bytes") == 8192
    assert (told.value("rearrangement_in_progress"), told.value("rearrangement_bytes_ahead")) == (0, 0)


def test_experts_that_moved_are_counted_by_rank_0_alone(told: Told) -> None:
    told.tell(
        *(
            RearrangeFinished(**{**WHO, "rank": rank}, seconds=2.0, moved=5, bytes_received=100, steps=2)
            for rank in range(4)
        )
    )
    assert told.value("rearrangement_experts_moved_total") is None
    assert told.value("rearrangement_experts_moved_total", rank="0") == 5


def test_a_rearrangement_that_fails_is_counted_by_class_and_is_over(told: Told) -> None:
    error = PeerLostError("gone", peers=[0], phase="commit")
    told.tell(started(), RearrangeFailed(**WHO, error=error, seconds=1.0, step=0))
    assert told.value("rearrangement_failures_total", error="PeerLostError", phase="commit") == 1
    assert (told.value("rearrangement_in_progress"), told.value("rearrangement_bytes_ahead")) == (0, 0)
    assert told.value("rearrangements_total") is None


# --- what is written about them --------------------------------------------------------------------------------------


def test_the_readme_lists_exactly_the_metrics_that_there_are() -> None:
    page = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(eplb_\w+)` \|", page, re.MULTILINE))
    registry = CollectorRegistry()
    Metrics(registry)
    kinds = {metric.name: metric.type for metric in registry.collect()}
    assert listed == {name + "_total" * (kind == "counter") for name, kind in kinds.items()}


def test_a_number_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPLB_PROMETHEUS_MOST_PEERS", "many")
    with pytest.raises(ValueError, match="EPLB_PROMETHEUS_MOST_PEERS must be a whole number, not 'many'"):
        PrometheusPlugin(CollectorRegistry())


def test_eplb_watch_reads_what_is_exported_while_a_rearrangement_runs_and_after(told: Told) -> None:
    traffic = {**TRAFFIC, "bytes_sent": 0, "bytes_received": 60, "bytes_sent_to": {}, "bytes_received_from": {3: 60}}
    told.tell(started(), TransferFinished(**traffic, stats=TransferStats(seconds=0.1, phases={})), step(0, 60))
    server, _ = start_http_server(0, "127.0.0.1", told.registry)
    try:
        endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/metrics")
        (during,) = endpoint.look()
        told.tell(RearrangeFinished(**WHO, seconds=2.0, moved=5, bytes_received=100, steps=2))
        (after,) = endpoint.look()
    finally:
        server.shutdown()
        server.server_close()

    assert (during.rank, during.backend, during.phase) == (1, "shm", "rearranging")
    assert (during.bytes_received, during.bytes_to_receive) == (60, 100)
    assert (during.steps_committed, during.steps, during.rearrangements) == (1, 2, 0)
    assert (after.phase, after.bytes_to_receive, after.rearrangements) == ("idle", None, 1)
    assert after.links == {"3": 0.0}
