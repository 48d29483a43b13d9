"""The report of `eplb rebalance`: the same numbers as a table for people and as JSON for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eplb_core.cli.rebalance.rank import RankResult
from eplb_core.cli.rebalance.request import RebalanceTask
from eplb_core.planning.placement import EMPTY, imbalance, load_per_rank
from eplb_core.policies.base import plans_in_words
from eplb_core.policies.worth import WorthDecision
from eplb_core.words import count

if TYPE_CHECKING:
    from rich.console import Console

_SMALL_BYTES = 1_000_000
"""Bytes per rank that move in about a millisecond; connecting and agreeing take tens of them."""

_MOST_NAMED = 5  # wrong slots in the table; the document has as many for each rank


@dataclass(frozen=True, slots=True)
class LayerReport:
    """The report of one layer.

    Attributes:
        layer: its number in the model.
        imbalance_before: largest load of a rank divided by the mean, before.
        imbalance_after: the same, after.
        experts_remote: experts that crossed between ranks.
        experts_local: slots filled from another slot of their rank, or from an expert that crossed once for two slots.
        bytes_remote: bytes that crossed between ranks.
        bytes_local: bytes that were copied within ranks.
    """

    layer: int
    imbalance_before: float
    imbalance_after: float
    experts_remote: int
    experts_local: int
    bytes_remote: int
    bytes_local: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceReport:
    """The request, what was moved, how fast, and whether it is correct.

    Attributes:
        backend: the canonical config string of the backend.
        policy: the canonical config string of the policy.
        plan: which plan it made, in words.
        plans: for each layer, which plan it made.
        notes: remarks on the loads and the plan.
        worth: whether moving pays, by the given cost model or the default one.
        source: where the weights came from, in words.
        ranks: how many ranks.
        nodes: how many nodes they are spread over.
        experts: logical experts in each layer.
        slots: slots in each layer.
        layers: one report per layer.
        bytes_across_nodes: bytes that crossed between nodes; part of the bytes between ranks.
        seconds: of the rearrangement, on the slowest rank.
        staging_bytes_max: the most staging memory that any rank held.
        pace_bytes_per_s: the most bytes a second into a rank, of a background job; None if it ran at once.
        verify: how thoroughly the ranks compared checksums before and after: off, sample or full.
        phases: phase -> seconds, on the slowest rank of each.
        verified: whether every slot of every rank was compared and found correct.
        checked_slots: how many slots were compared.
        checked_bytes: how many bytes were compared.
        wrong_slots: how many slots were wrong.
        problems: what was wrong, in words.
        load_before: float64 `[layers, ranks]`, load of each rank divided by the layer's mean, before; layers
            without any load are left out.
        load_after: the same, after.
        second_copies: slots of the new placement whose expert is also in another slot of the rank.
        traffic: int64 `[ranks, ranks]`, bytes from each rank (row) to each other (column).
    """

    backend: str
    policy: str
    plan: str
    plans: tuple[str, ...]
    notes: tuple[str, ...]
    worth: WorthDecision
    source: str
    ranks: int
    nodes: int
    experts: int
    slots: int
    layers: tuple[LayerReport, ...]
    bytes_across_nodes: int
    seconds: float
    staging_bytes_max: int
    pace_bytes_per_s: float | None
    verify: str
    phases: dict[str, float]
    verified: bool
    checked_slots: int
    checked_bytes: int
    wrong_slots: int
    problems: tuple[str, ...]
    second_copies: int
    load_before: NDArray[np.float64] = field(repr=False)
    load_after: NDArray[np.float64] = field(repr=False)
    traffic: NDArray[np.int64] = field(repr=False)

    @property
    def bytes_remote(self) -> int:
        """Bytes that crossed between ranks."""
        return sum(layer.bytes_remote for layer in self.layers)

    @property
    def bytes_local(self) -> int:
        """Bytes that were copied within ranks."""
        return sum(layer.bytes_local for layer in self.layers)

    @property
    def gb_per_s(self) -> float:
        """Gigabytes (10^9) per second between ranks, all ranks together."""
        return self.bytes_remote / self.seconds / 1e9 if self.seconds > 0 else 0.0

    @property
    def is_small(self) -> bool:
        """Whether so few bytes crossed that start-up (connecting, agreeing) takes most of the time."""
        return self.bytes_remote < _SMALL_BYTES * self.ranks

    def imbalances(self, after: bool) -> list[float]:
        """Return the imbalance of every layer."""
        return [layer.imbalance_after if after else layer.imbalance_before for layer in self.layers]

    def document(self) -> dict[str, Any]:
        """Return all of it as plain lists, numbers and texts."""
        return {
            "backend": self.backend,
            "policy": self.policy,
            "plan": self.plan,
            "notes": list(self.notes),
            "worth": asdict(self.worth),
            "source": self.source,
            "ranks": self.ranks,
            "nodes": self.nodes,
            "layers": len(self.layers),
            "experts": self.experts,
            "slots": self.slots,
            "imbalance": {
                when: {"mean": float(np.mean(values)), "worst": max(values)}
                for when, values in (("before", self.imbalances(False)), ("after", self.imbalances(True)))
            },
            "experts_remote": sum(layer.experts_remote for layer in self.layers),
            "experts_local": sum(layer.experts_local for layer in self.layers),
            "bytes_remote": self.bytes_remote,
            "bytes_local": self.bytes_local,
            "bytes_across_nodes": self.bytes_across_nodes,
            "seconds": self.seconds,
            "gb_per_s": self.gb_per_s,
            "staging_bytes_max": self.staging_bytes_max,
            "pace_bytes_per_s": self.pace_bytes_per_s,
            "verify": self.verify,
            "phases": self.phases,
            "verified": self.verified,
            "checked_slots": self.checked_slots,
            "checked_bytes": self.checked_bytes,
            "wrong_slots": self.wrong_slots,
            "problems": list(self.problems),
            "per_layer": [
                {"plan": plan, **{name: getattr(layer, name) for name in LayerReport.__dataclass_fields__}}
                for plan, layer in zip(self.plans, self.layers, strict=True)
            ],
            "second_copies_on_a_rank": self.second_copies,
            "relative_load_of_ranks": {"before": self.load_before.tolist(), "after": self.load_after.tolist()},
            "traffic_bytes": self.traffic.tolist(),
        }


def make_report(job: RebalanceTask, results: Sequence[RankResult], *, source: str) -> RebalanceReport:
    """Combine the results of the ranks.

    Args:
        job: what they did.
        results: one per rank.
        source: where the weights came from, in words.
    """
    plan = job.plan()
    before, after = (imbalance(placement, job.loads, job.num_ranks) for placement in (job.old, job.new))
    sizes = np.array(job.expert_bytes, dtype=np.int64)
    remote = np.bincount(plan.transfer_layer, minlength=len(sizes))
    local = np.bincount(plan.move_layer, minlength=len(sizes)) - remote
    nodes = np.array(job.node_of_rank)
    traffic = plan.traffic(sizes)
    problems = [example for result in results for example in result.examples]
    for rank, result in enumerate(results):
        if not result.placement_reached:
            problems.append(f"rank {rank} did not reach the requested placement")
    expected_slots = int(np.count_nonzero(job.new >= 0))
    checked_slots = sum(result.checked_slots for result in results)
    if checked_slots != expected_slots:
        problems.append(f"{checked_slots} slots were compared instead of {expected_slots}")
    return RebalanceReport(
        backend=results[0].backend,
        policy=job.policy,
        plan=plans_in_words(job.plans),
        plans=job.plans,
        notes=job.notes,
        worth=job.worth,
        source=source,
        ranks=job.num_ranks,
        nodes=job.num_nodes,
        experts=job.loads.shape[1],
        slots=job.old.shape[1],
        layers=tuple(
            LayerReport(
                layer=name,
                imbalance_before=float(before[row]),
                imbalance_after=float(after[row]),
                experts_remote=int(remote[row]),
                experts_local=int(local[row]),
                bytes_remote=int(remote[row] * sizes[row]),
                bytes_local=int(local[row] * sizes[row]),
            )
            for row, name in enumerate(job.layer_names)
        ),
        bytes_across_nodes=int(traffic[nodes[:, None] != nodes[None, :]].sum()),
        seconds=max(result.seconds for result in results),
        staging_bytes_max=max(result.staging_bytes for result in results),
        pace_bytes_per_s=job.bytes_per_s,
        verify=job.verify,
        phases=_slowest(results),
        verified=not problems,
        checked_slots=checked_slots,
        checked_bytes=sum(result.checked_bytes for result in results),
        wrong_slots=sum(result.wrong_slots for result in results),
        problems=tuple(problems),
        second_copies=_second_copies(job.new, job.num_ranks),
        load_before=_relative_load(job.old, job),
        load_after=_relative_load(job.new, job),
        traffic=traffic,
    )


def print_report(report: RebalanceReport, console: Console) -> None:
    """Print the report as tables."""
    from rich import box
    from rich.table import Table

    console.print(
        f"{report.source}: {count(len(report.layers), 'layer')} of {count(report.experts, 'expert')} "
        f"in {count(report.slots, 'slot')}, {count(report.ranks, 'rank')} on {count(report.nodes, 'node')}, "
        f"policy {report.policy}, backend {report.backend}",
        markup=False,
    )
    balance = Table(box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    balance.add_column("largest load of a rank / mean load")
    balance.add_column("before", justify="right")
    balance.add_column("after", justify="right", style="bold")
    values = [report.imbalances(False), report.imbalances(True)]
    balance.add_row("mean over layers", *(f"{np.mean(each):.3f}" for each in values))
    balance.add_row("worst layer", *(f"{max(each):.3f}" for each in values))
    console.print(balance)

    moved = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    moved.add_column("moved")
    moved.add_column("experts", justify="right")
    moved.add_column("bytes", justify="right")
    remote, local = (sum(getattr(layer, f"experts_{kind}") for layer in report.layers) for kind in ("remote", "local"))
    moved.add_row("between ranks (remote)", f"{remote:,}", format_bytes(report.bytes_remote))
    if report.nodes > 1:
        moved.add_row("  of which between nodes", "", format_bytes(report.bytes_across_nodes))
    moved.add_row("within a rank (local)", f"{local:,}", format_bytes(report.bytes_local))
    console.print(moved)

    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim")
    facts.add_column()
    facts.add_row("plan", report.plan)
    if report.second_copies:
        facts.add_row("wasted", f"{count(report.second_copies, 'slot')}: a second copy on the same rank")
    facts.add_row("time", f"{report.seconds:.3f} s" + (", mostly start-up" if report.is_small else ""))
    facts.add_row("rate", _rate(report))
    if report.pace_bytes_per_s is not None:
        facts.add_row("pace", f"in the background, {format_bytes(int(report.pace_bytes_per_s))}/s into a rank at most")
    facts.add_row("peak staging", f"{format_bytes(report.staging_bytes_max)} on a rank")
    if report.verified:
        found = (
            f"[bold green]yes[/]: {count(report.checked_slots, 'slot')}, every one of {report.checked_bytes:,} bytes"
        )
    else:
        found = f"[bold red]NO[/]: {report.wrong_slots} of {count(report.checked_slots, 'slot')} hold wrong bytes"
    if report.verify != "off":
        facts.add_row("checksums", f"equal before and after ({report.verify})")
    facts.add_row("verified", found)
    console.print(facts)
    for problem in report.problems[:_MOST_NAMED]:
        console.print(f"  {problem}", style="red", markup=False)
    if len(report.problems) > _MOST_NAMED:
        console.print(f"  and {len(report.problems) - _MOST_NAMED} more", style="red")


def _rate(report: RebalanceReport) -> str:
    if not report.bytes_remote:
        return "nothing crossed"
    if report.is_small:
        return "too few bytes to measure; eplb bench measures rates"
    return f"{report.gb_per_s:.2f} GB/s between ranks, all together"


def format_bytes(number: int) -> str:
    """Return a human-readable number of bytes, in decimal units like GB/s."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number} B"


def _second_copies(placement: NDArray[np.int64], num_ranks: int) -> int:
    """Return how many slots hold an expert that an earlier slot of their rank already holds."""
    by_rank = np.sort(placement.reshape(len(placement) * num_ranks, -1), axis=1)
    return int(np.count_nonzero((by_rank[:, 1:] == by_rank[:, :-1]) & (by_rank[:, 1:] != EMPTY)))


def _slowest(results: Sequence[RankResult]) -> dict[str, float]:
    phases: dict[str, float] = {}
    for result in results:
        for name, seconds in result.phases.items():
            phases[name] = max(phases.get(name, 0.0), seconds)
    return phases


def _relative_load(placement: NDArray[np.int64], job: RebalanceTask) -> NDArray[np.float64]:
    load = load_per_rank(placement, job.loads, job.num_ranks)
    mean = load.mean(axis=1, keepdims=True)
    used = mean[:, 0] > 0
    relative: NDArray[np.float64] = load[used] / mean[used]
    return relative
