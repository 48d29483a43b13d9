"""The dashboard asks for metrics and labels that exist, and leaves none out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from eplb_prometheus import Metrics
from prometheus_client import CollectorRegistry

_GRAFANA = {"backend", "rank", "datasource", "__rate_interval", "__range"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    printed = subprocess.run(
        [sys.executable, "-m", "eplb_prometheus", "dashboard"], capture_output=True, text=True, timeout=60, check=True
    )
    document: dict[str, Any] = json.loads(printed.stdout)
    return document


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """The names that an exporter writes -> their labels."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    found: dict[str, set[str]] = {}
    for metric in vars(metrics).values():
        if hasattr(metric, "labels"):
            metric.labels(*["x"] * len(metric._labelnames))
    for family in registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def queries(document: dict[str, Any]) -> Iterator[str]:
    for panel in document["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in document["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def asked_for(document: dict[str, Any]) -> set[str]:
    return {name for query in queries(document) for name in re.findall(r"\beplb_\w+", query)}


def test_every_metric_that_it_asks_for_exists(dashboard: dict[str, Any], series: dict[str, set[str]]) -> None:
    assert asked_for(dashboard) - set(series) == set()


def test_it_asks_for_every_metric_that_exists(dashboard: dict[str, Any], series: dict[str, set[str]]) -> None:
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name).removesuffix("_total") for name in series}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name).removesuffix("_total") for name in asked_for(dashboard)}
    assert shown == families


def test_every_label_that_it_groups_by_is_one_of_the_metric(
    dashboard: dict[str, Any], series: dict[str, set[str]]
) -> None:
    for query in queries(dashboard):
        groups = re.findall(r"\bby \(([^)]*)\)\s*\((?:\w+\()?(eplb_\w+)", query)
        assert groups or "label_values" in query, query
        for labels, name in groups:
            assert set(re.split(r",\s*", labels)) <= series[name], query


def test_every_legend_and_variable_is_one_that_grafana_can_fill(dashboard: dict[str, Any]) -> None:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            kept = set(re.split(r",\s*", ", ".join(re.findall(r"\bby \(([^)]*)\)", target["expr"]))))
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, target
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= _GRAFANA, target


def test_panels_have_numbers_of_their_own_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert all(x < 24 for x, _ in cells)
