"""Reads the metrics that eplb-prometheus exports."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections import defaultdict

from eplb_core.cli.watch.snapshot import RankSnapshot

_ANSWER_WITHIN_S = 2.0
_LARGEST_ANSWER = 64 << 20
_RECEIVED = "eplb_transfer_received_bytes_total"
_Key = tuple[str, str]  # backend, rank


class Endpoint:
    """An address where eplb-prometheus exports the metrics of one rank or of several.

    Args:
        url: the address.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._last: tuple[float, dict[tuple[_Key, str], float]] | None = None

    def look(self) -> list[RankSnapshot]:
        """Return what it exports now, one for each rank and backend."""
        try:
            with urllib.request.urlopen(self._url, timeout=_ANSWER_WITHIN_S) as answer:
                text = answer.read(_LARGEST_ANSWER).decode("utf-8", "replace")
            samples = _samples(text)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            why = getattr(reason, "strerror", None) or str(reason)
            return [RankSnapshot(source=self._url, rank=None, phase="unreadable", problem=why)]
        if not samples:
            return [
                RankSnapshot(source=self._url, rank=None, phase="unreadable", problem="it exports no metrics of eplb")
            ]
        now = time.monotonic()
        received = {
            ((labels["backend"], labels["rank"]), labels["peer"]): value
            for labels, value in samples[_RECEIVED]
            if "peer" in labels
        }
        links = self._rates(now, received)
        self._last = now, received
        sums: dict[str, dict[_Key, float]] = defaultdict(lambda: defaultdict(float))
        for name, rows in samples.items():
            for labels, value in rows:
                sums[name][labels["backend"], labels["rank"]] += value
        keys = sorted({key for by_key in sums.values() for key in by_key}, key=lambda key: (int(key[1]), key[0]))
        return [self._snapshot(key, sums, links) for key in keys]

    def _rates(self, now: float, received: dict[tuple[_Key, str], float]) -> dict[_Key, dict[str, float]] | None:
        """Return for each rank the bytes a second from each peer since the last look; None at the first one."""
        if self._last is None or now <= self._last[0]:
            return None
        rates: dict[_Key, dict[str, float]] = defaultdict(dict)
        for (key, peer), total in received.items():
            new = max(0.0, total - self._last[1].get((key, peer), 0.0))
            rates[key][peer] = new / (now - self._last[0])
        return rates

    def _snapshot(
        self, key: _Key, sums: dict[str, dict[_Key, float]], links: dict[_Key, dict[str, float]] | None
    ) -> RankSnapshot:
        def number(name: str) -> int | None:
            return int(sums[name][key]) if key in sums[name] else None

        runs = bool(number("eplb_rearrangement_in_progress"))
        planned, steps = number("eplb_rearrangement_bytes_planned"), number("eplb_rearrangement_steps_planned")
        ahead, steps_ahead = number("eplb_rearrangement_bytes_ahead"), number("eplb_rearrangement_steps_ahead")
        from_peers = None if links is None else links.get(key, {})
        return RankSnapshot(
            source=self._url,
            rank=int(key[1]),
            backend=key[0],
            phase="rearranging" if runs else "idle",
            bytes_received=(planned or 0) - (ahead or 0) if runs else 0,
            bytes_to_receive=planned if runs else None,
            steps_committed=(steps or 0) - (steps_ahead or 0) if runs else 0,
            steps=steps if runs else None,
            bytes_per_s=None if from_peers is None else sum(from_peers.values()),
            links=from_peers or {},
            rearrangements=number("eplb_rearrangements_total") or 0,
            failures=number("eplb_rearrangement_failures_total") or 0,
        )


def _samples(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Return metric -> its labels and values, of the metrics of eplb that are about a rank."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith("eplb_") and "backend" in labels and labels.get("rank", "").isdecimal():
                found[sample.name].append((labels, float(sample.value)))
    return found
