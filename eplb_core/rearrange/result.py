"""What a rearrangement did."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from eplb_core.arrays import IntArray


@dataclass(frozen=True, slots=True, eq=False)
class RearrangeResult:
    """What a rearrangement did.

    Attributes:
        placement: int64 `[layers, slots]`, what every slot of the group holds now.
        moved: experts that crossed from one rank to another, in all layers and all ranks together.
        moved_locally: slots that were filled from a slot of their own rank.
        bytes_moved: bytes of the experts that crossed, all ranks together.
        bytes_moved_locally: bytes that were copied between slots of one rank, all ranks together.
        seconds: wall time on this rank.
        steps: how many bounded steps it took.
        staging_bytes: bytes of staging memory of this rank, window and transport together.
        phases: phase name -> seconds on this rank.
        paths: peer rank -> what its bytes travelled over.
        cancelled: whether a background job was cancelled before its end; then the counts say what was planned.
    """

    placement: IntArray
    moved: int
    moved_locally: int
    bytes_moved: int
    bytes_moved_locally: int
    seconds: float
    steps: int
    staging_bytes: int
    phases: dict[str, float] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=dict)
    cancelled: bool = False

    @property
    def stats(self) -> dict[str, float]:
        """The numbers of this result and its phases, flat, for logs and metrics."""
        numbers: dict[str, float] = {
            name: getattr(self, name)
            for name in ("moved", "moved_locally", "bytes_moved", "bytes_moved_locally", "seconds", "steps")
        }
        return numbers | {"staging_bytes": self.staging_bytes} | {f"{k}_s": v for k, v in self.phases.items()}

    def at(self, placement: IntArray, *, cancelled: bool = False) -> RearrangeResult:
        """Return the same with another placement."""
        return replace(self, placement=placement.copy(), cancelled=cancelled)
