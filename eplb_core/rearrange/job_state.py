"""What a background job's thread and the engine's thread share."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eplb_core.arrays import IntArray
from eplb_core.errors import TransferError
from eplb_core.planning.placement import EMPTY
from eplb_core.rearrange.step_runner import PhaseTimes
from eplb_core.scheduling.schedule import Step

CANCEL = "cancel"
"""The flag at the store that ends a job on all ranks."""


@dataclass(slots=True, eq=False)
class Ready:
    """A step that every rank has received and that is not committed here.

    Attributes:
        number: which step.
        part: the part of the window that holds its bytes.
        received: done when the bytes are there, as far as the job's stream knows; None on a CPU.
        began: when its transfer began.
    """

    number: int
    part: torch.Tensor
    received: torch.cuda.Event | None
    began: float


class JobState:
    """How far a job is on this rank. Everything but the steps and parts is touched with `changed` held.

    Args:
        steps: the schedule; every step touches one layer.
        parts: the parts of the window, one for each step in flight.
        placement: what the slots hold at first.
    """

    def __init__(self, steps: Sequence[Step], parts: Sequence[torch.Tensor], placement: IntArray) -> None:
        self.steps = list(steps)
        self.parts = list(parts)
        self.changed = threading.Condition()
        self.placement = placement
        self.ready: list[Ready] = []
        self.committed: set[int] = set()
        self.last_commit: dict[int, torch.cuda.Event | None] = {}  # part -> the copies out of it
        self.received_bytes = 0
        self.times = PhaseTimes()
        self.cancelling = False  # said on this rank
        self.stopped = False  # on all ranks
        self.abandoned: TransferError | None = None  # why this rank does not serve the job any more
        self.error: BaseException | None = None
        self.unknown: set[int] = set()  # steps that other ranks may have committed: the store died before it told

    def layer(self, number: int) -> int:
        """Return the layer that a step touches."""
        return int(self.steps[number].layers[0])

    def may_be_committed(self) -> set[int]:
        """Return the steps that other ranks may commit though this one has not: their bytes may be on all ranks."""
        room = len(self.parts)
        return {
            number
            for number in range(len(self.steps))
            if number not in self.committed and (number < room or number - room in self.committed)
        }

    def forget_unknown(self) -> None:
        """Take the slots of `unknown` for empty, which is what the placement says of slots that nobody knows."""
        for number in self.unknown:
            changes = self.steps[number].changes
            self.placement[changes[:, 0], changes[:, 1]] = EMPTY

    def abandon(self, reason: TransferError) -> None:
        """Have the thread give up, and tell the other ranks, as soon as it can."""
        with self.changed:
            self.abandoned = self.abandoned or reason
            self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Keep an error for the engine's thread."""
        with self.changed:
            self.error = error
            self.changed.notify_all()
