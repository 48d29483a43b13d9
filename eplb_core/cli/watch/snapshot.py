"""What is seen of one rank at one moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FINAL = ("finished", "cancelled", "failed")
"""Phases after which nothing more happens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSnapshot:
    """One rank of one source.

    Attributes:
        source: the file or the address that it was read from.
        rank: the group rank; None if the source cannot be read.
        backend: the backend's name, if the source tells.
        phase: a phase of `RearrangeJob.status()`; of an endpoint `rearranging` or `idle`; `unreadable` if there is
            nothing to read.
        bytes_received: payload bytes of this rearrangement that are here (of an endpoint: that are committed).
        bytes_to_receive: all that it will receive, if the source tells.
        steps_committed: steps that are committed.
        steps: all steps, if the source tells.
        ready_layers: layers that can be committed, if the source tells.
        bytes_per_s: payload bytes that arrived, a second, since the last look; None at the first one.
        links: peer -> the same from this peer alone, if the source tells.
        rearrangements: finished ones, since the process started, if the source tells.
        failures: failed ones.
        problem: what went wrong, or nothing.
        placements: `requested` and `effective`, if the source tells.
        num_ranks: ranks of the group, if the source tells.
    """

    source: str
    rank: int | None
    backend: str = ""
    phase: str
    bytes_received: int = 0
    bytes_to_receive: int | None = None
    steps_committed: int = 0
    steps: int | None = None
    ready_layers: tuple[int, ...] | None = None
    bytes_per_s: float | None = None
    links: dict[str, float] = field(default_factory=dict)
    rearrangements: int | None = None
    failures: int | None = None
    problem: str = ""
    placements: dict[str, list[list[int]]] = field(default_factory=dict)
    num_ranks: int | None = None

    def document(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "source": self.source,
            "rank": self.rank,
            "backend": self.backend,
            "phase": self.phase,
            "bytes_received": self.bytes_received,
            "bytes_to_receive": self.bytes_to_receive,
            "steps_committed": self.steps_committed,
            "steps": self.steps,
            "ready_layers": None if self.ready_layers is None else list(self.ready_layers),
            "bytes_per_s": self.bytes_per_s,
            "bytes_per_s_from_peer": self.links,
            "rearrangements": self.rearrangements,
            "failures": self.failures,
            "problem": self.problem,
        }
