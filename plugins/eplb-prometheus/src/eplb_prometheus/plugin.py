"""The hooks: each passes its event to the metrics. The first one also starts the exporter, if configured."""

from __future__ import annotations

import logging
import os
from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server

from eplb_core.hooks import (
    RearrangeFailed,
    RearrangeFinished,
    RearrangeStarted,
    StepCommitted,
    TransferFailed,
    TransferFinished,
    TransferStarted,
    hookimpl,
)
from eplb_prometheus.metrics import MOST_PEERS, Metrics

PORT: Final = "EPLB_PROMETHEUS_PORT"
"""The environment variable with the port of local rank 0; rank 1 takes the next one. Unset or 0: no exporter."""

ADDRESS: Final = "EPLB_PROMETHEUS_ADDRESS"
"""The environment variable with the address that exporters listen at; the default is 127.0.0.1."""

PEERS: Final = "EPLB_PROMETHEUS_MOST_PEERS"
"""The environment variable with the size of the largest group whose peers are distinguished."""

_log = logging.getLogger(__name__)


class PrometheusPlugin:
    """Counts events in a registry. An engine with a separate registry registers one of these with its `PluginHost`.

    Args:
        registry: where the metrics are registered.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.metrics = Metrics(registry, most_peers=_number(PEERS, MOST_PEERS))
        self._registry = registry
        self._asked_for_exporter = False

    @hookimpl
    def eplb_transfer_started(self, event: TransferStarted) -> None:
        """Count it."""
        self._export(event.rank)
        self.metrics.transfer_started(event)

    @hookimpl
    def eplb_transfer_finished(self, event: TransferFinished) -> None:
        """Count it."""
        self.metrics.transfer_finished(event)

    @hookimpl
    def eplb_transfer_failed(self, event: TransferFailed) -> None:
        """Count it."""
        self.metrics.transfer_failed(event)

    @hookimpl
    def eplb_rearrange_started(self, event: RearrangeStarted) -> None:
        """Count it."""
        self._export(event.rank)
        self.metrics.rearrange_started(event)

    @hookimpl
    def eplb_step_committed(self, event: StepCommitted) -> None:
        """Count it."""
        self.metrics.step_committed(event)

    @hookimpl
    def eplb_rearrange_finished(self, event: RearrangeFinished) -> None:
        """Count it."""
        self.metrics.rearrange_finished(event)

    @hookimpl
    def eplb_rearrange_failed(self, event: RearrangeFailed) -> None:
        """Count it."""
        self.metrics.rearrange_failed(event)

    def _export(self, rank: int) -> None:
        """Start the exporter once. Not at import: `eplb` commands import plugins too, and the rank is unknown then."""
        if self._asked_for_exporter:
            return
        self._asked_for_exporter = True
        first = _number(PORT, 0)
        if first:
            port = first + _number("LOCAL_RANK", rank)
            address = os.environ.get(ADDRESS, "127.0.0.1")
            try:
                start_http_server(port, address, self._registry)
            except OSError as error:
                _log.warning("rank %d exports no metrics at %s:%d: %s; set %s", rank, address, port, error, PORT)


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not text.isdecimal():
        raise ValueError(f"{variable} must be a whole number, not {text!r}")
    return int(text)
