"""Prometheus metrics of eplb. Installing this package is enough: it counts in prometheus-client's registry."""

from __future__ import annotations

from eplb_prometheus.metrics import Metrics
from eplb_prometheus.plugin import PrometheusPlugin

__version__ = "0.1.0"
__all__ = ["PLUGIN", "Metrics", "PrometheusPlugin", "__version__"]

PLUGIN = PrometheusPlugin()
"""The plugin that eplb loads: it counts in prometheus-client's default registry."""
