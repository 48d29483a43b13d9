"""The metrics, and what each event adds to them.

Every metric has the labels `backend` and `rank`. Ranks are group ranks: even if several processes are scraped as one
(prometheus-client's multiprocess mode), they distinguish the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from eplb_core.hooks import (
    RearrangeEvent,
    RearrangeFailed,
    RearrangeFinished,
    RearrangeStarted,
    StepCommitted,
    TransferEvent,
    TransferFailed,
    TransferFinished,
    TransferStarted,
)

MOST_PEERS: Final = 64
"""In groups with more ranks than this, bytes are counted for all peers together: every pair would be a series."""

ALL_PEERS: Final = "all"
"""The label of all peers together."""

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PHASE_SECONDS: Final = (0.0001, 0.001, 0.01, 0.1, 1, 10, 60)
_WHO: Final = ("backend", "rank")


class Metrics:
    """Counters, histograms and gauges of one registry.

    Args:
        registry: where they are registered.
        most_peers: in groups with more ranks, peers are not distinguished.

    Raises:
        ValueError: the registry already has them.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY, *, most_peers: int = MOST_PEERS) -> None:
        self._most_peers = most_peers

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"eplb_{name}", text, (*_WHO, *labels), registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"eplb_{name}", text, (*_WHO, *labels), buckets=buckets, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"eplb_{name}", text, _WHO, registry=registry, multiprocess_mode="livemax")

        self.transfers_started = counter("transfers_started", "Transfers started.")
        self.transfers = counter("transfers", "Transfers that finished.")
        self.transfer_failures = counter("transfer_failures", "Transfers that failed.", "error", "phase")
        self.peer_failures = counter("peer_failures", "Failed transfers that blame this peer.", "peer")
        self.messages = counter("transfer_messages", "Tensors sent and received.")
        self.bytes_sent = counter("transfer_sent_bytes", "Payload bytes that left this rank.", "peer")
        self.bytes_received = counter("transfer_received_bytes", "Payload bytes that reached this rank.", "peer")
        self.transfer_seconds = histogram("transfer_seconds", "Wall time of a transfer.")
        self.transfer_phase_seconds = histogram(
            "transfer_phase_seconds", "Wall time of a phase of a transfer.", "phase", buckets=_PHASE_SECONDS
        )
        self.transfer_staging = gauge("transfer_staging_bytes", "Staging memory of the transport.")

        self.rearrangements = counter("rearrangements", "Rearrangements that finished.")
        self.rearrangement_failures = counter("rearrangement_failures", "Rearrangements that failed.", "error", "phase")
        self.rearranging = gauge("rearrangement_in_progress", "1 while a rearrangement runs, else 0.")
        self.steps = counter("rearrangement_steps", "Steps committed.")
        self.step_seconds = histogram("rearrangement_step_seconds", "Wall time of a step with its commit.")
        self.rearranged_bytes = counter("rearrangement_received_bytes", "Payload bytes that this rank has committed.")
        self.bytes_planned = gauge("rearrangement_bytes_planned", "Payload bytes that this rank receives in all.")
        self.bytes_ahead = gauge("rearrangement_bytes_ahead", "Payload bytes that this rank has yet to receive.")
        self.steps_planned = gauge("rearrangement_steps_planned", "Steps of the rearrangement in all.")
        self.steps_ahead = gauge("rearrangement_steps_ahead", "Steps that are not yet committed.")
        self.experts_moved = counter(
            "rearrangement_experts_moved", "Experts that crossed between ranks, all ranks together; counted by rank 0."
        )
        self.rearrangement_seconds = histogram("rearrangement_seconds", "Wall time of a rearrangement.")
        self.rearrangement_phase_seconds = histogram(
            "rearrangement_phase_seconds", "Wall time of a phase of a rearrangement.", "phase", buckets=_PHASE_SECONDS
        )
        self.rearrangement_staging = gauge(
            "rearrangement_staging_bytes", "Staging memory of the last rearrangement, including its window."
        )

    # --- transfers --------------------------------------------------------------------------------------------------

    def transfer_started(self, event: TransferStarted) -> None:
        """Count a transfer that starts."""
        self.transfers_started.labels(*_who(event)).inc()

    def transfer_finished(self, event: TransferFinished) -> None:
        """Count a transfer that finished, its bytes by peer and its time by phase."""
        who = _who(event)
        self.transfers.labels(*who).inc()
        self.messages.labels(*who).inc(event.messages)
        for counter, by_peer in (
            (self.bytes_sent, event.bytes_sent_to),
            (self.bytes_received, event.bytes_received_from),
        ):
            for peer, nbytes in self._by_peer(event, by_peer).items():
                counter.labels(*who, peer).inc(nbytes)
        self.transfer_seconds.labels(*who).observe(event.stats.seconds)
        for phase, seconds in event.stats.phases.items():
            self.transfer_phase_seconds.labels(*who, phase).observe(seconds)
        self.transfer_staging.labels(*who).set(event.staging_bytes)

    def transfer_failed(self, event: TransferFailed) -> None:
        """Count a failure by its class, its phase and the peers that it blames."""
        who = _who(event)
        self.transfer_failures.labels(*who, *_class_and_phase(event.error)).inc()
        for peer in self._by_peer(event, dict.fromkeys(getattr(event.error, "peers", ()), 1)):
            self.peer_failures.labels(*who, peer).inc()

    # --- rearrangements ---------------------------------------------------------------------------------------------

    def rearrange_started(self, event: RearrangeStarted) -> None:
        """Record that a rearrangement runs, and how much it will receive."""
        who = _who(event)
        self.rearranging.labels(*who).set(1)
        for gauge, number in (
            (self.bytes_planned, event.bytes_to_receive),
            (self.bytes_ahead, event.bytes_to_receive),
            (self.steps_planned, event.steps),
            (self.steps_ahead, event.steps),
        ):
            gauge.labels(*who).set(number)

    def step_committed(self, event: StepCommitted) -> None:
        """Count a step."""
        who = _who(event)
        self.steps.labels(*who).inc()
        self.step_seconds.labels(*who).observe(event.seconds)
        self.rearranged_bytes.labels(*who).inc(event.bytes_received)
        self.bytes_ahead.labels(*who).dec(event.bytes_received)
        self.steps_ahead.labels(*who).dec()

    def rearrange_finished(self, event: RearrangeFinished) -> None:
        """Count a rearrangement that finished, and its time by phase."""
        who = _who(event)
        self._ended(event)
        self.rearrangements.labels(*who).inc()
        self.rearrangement_seconds.labels(*who).observe(event.seconds)
        for phase, seconds in event.phases.items():
            self.rearrangement_phase_seconds.labels(*who, phase).observe(seconds)
        self.rearrangement_staging.labels(*who).set(event.staging_bytes)
        if event.rank == 0:
            self.experts_moved.labels(*who).inc(event.moved)

    def rearrange_failed(self, event: RearrangeFailed) -> None:
        """Count a failure by its class and its phase."""
        self._ended(event)
        self.rearrangement_failures.labels(*_who(event), *_class_and_phase(event.error)).inc()

    def _ended(self, event: RearrangeEvent) -> None:
        for gauge in (self.rearranging, self.bytes_planned, self.bytes_ahead, self.steps_planned, self.steps_ahead):
            gauge.labels(*_who(event)).set(0)

    def _by_peer(self, event: TransferEvent, amounts: Mapping[int, int]) -> dict[str, int]:
        """Return label -> amount."""
        if event.world_size <= self._most_peers:
            return {str(peer): amount for peer, amount in amounts.items()}
        return {ALL_PEERS: sum(amounts.values())} if amounts else {}


def _who(event: TransferEvent | RearrangeEvent) -> tuple[str, str]:
    return event.backend, str(event.rank)


def _class_and_phase(error: BaseException) -> tuple[str, str]:
    return type(error).__name__, str(getattr(error, "phase", ""))
