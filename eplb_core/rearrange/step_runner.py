"""One rank's part in a step of a schedule: what it sends and receives, and what it copies once all have received."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from eplb_core.contract.communicator import EplbCommunicator, PendingTransfer
from eplb_core.contract.payload import Payload, Payloads
from eplb_core.errors import IntegrityError
from eplb_core.rearrange.weights import ExpertWeights
from eplb_core.rearrange.window import StagedExperts
from eplb_core.scheduling.steps import SLOT, Copies, Step, Transfers
from eplb_core.transport.copies import CopyBatch, batches
from eplb_core.transport.streams import on_stream

_MOST_PARTS = 32
"""How many parts of the window, as it was cut before, are remembered."""

Slice = tuple[int, int, int]
"""A row of `Step.transfers`, and the bytes of that expert's payload to move: row, first, end."""


@dataclass(slots=True)
class PhaseTimes:
    """What the steps of one rearrangement took on this rank.

    Attributes:
        phases: phase name -> seconds.
        paths: peer rank -> what its bytes travelled over.
    """

    phases: dict[str, float] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=dict)

    def add(self, phase: str, seconds: float) -> None:
        """Add to a phase."""
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds


class PreparedStep:
    """What one rank does in a step, tensor by tensor: looked up when it is needed, or before in `look_up`.

    Args:
        step: the step.
        staged: the part of the window that it lands in.
        weights: the local slots.
        rank: this rank.
    """

    def __init__(self, step: Step, staged: StagedExperts, weights: ExpertWeights, rank: int) -> None:
        self.step = step
        self._staged = staged
        self._weights = weights
        self._rank = rank

    @functools.cached_property
    def sends(self) -> Payloads:
        """What is sent, and to whom."""
        rows = self.step.transfers
        sends: dict[int, list[Payload]] = {}
        mine = rows[:, Transfers.SRC_RANK] == self._rank
        columns = [Transfers.LAYER, Transfers.SRC_SLOT, Transfers.DST_RANK]
        for layer, slot, rank in rows[mine][:, columns].tolist():
            sends.setdefault(rank, []).extend(self._weights.payloads(layer, slot))
        return sends

    @functools.cached_property
    def recvs(self) -> Payloads:
        """What is received, and from whom."""
        rows = self.step.transfers
        recvs: dict[int, list[Payload]] = {}
        mine = rows[:, Transfers.DST_RANK] == self._rank
        columns = [Transfers.LAYER, Transfers.SRC_RANK, Transfers.KIND, Transfers.PLACE]
        for layer, source, kind, place in rows[mine][:, columns].tolist():
            recvs.setdefault(source, []).extend(self.payloads(layer, kind, place))
        return recvs

    @functools.cached_property
    def copies(self) -> list[CopyBatch]:
        """The copies, level by level."""
        rows = self.step.copies[self.step.copies[:, Copies.RANK] == self._rank]
        levels: list[CopyBatch] = []
        for level in np.unique(rows[:, Copies.LEVEL]):
            targets: list[torch.Tensor] = []
            sources: list[torch.Tensor] = []
            for _, layer, _, source_kind, source, target_kind, target in rows[rows[:, Copies.LEVEL] == level].tolist():
                targets += self._words(layer, target_kind, target)
                sources += self._words(layer, source_kind, source)
            levels += batches(targets, sources)
        return levels

    def look_up(self) -> Iterator[object]:
        """Look everything up, a piece for each item."""
        yield self.sends
        yield self.recvs
        yield self.copies

    def payloads(self, layer: int, kind: int, place: int) -> tuple[Payload, ...]:
        """Return the tensors of an expert that lies in a slot, or at an offset of the window, as uint8 `[bytes]`."""
        if kind == SLOT:
            return self._weights.payloads(layer, place)
        return self._staged.payloads(layer, place)

    def _words(self, layer: int, kind: int, place: int) -> tuple[torch.Tensor, ...]:
        if kind == SLOT:
            return self._weights.slot_words(layer, place)
        return self._staged.words(layer, place)


class StepRunner:
    """Runs steps over one communicator and one set of weights.

    Args:
        communicator: what moves the bytes.
        weights: the local slots.
        rank: this rank.
    """

    def __init__(self, communicator: EplbCommunicator, weights: ExpertWeights, rank: int) -> None:
        self._communicator = communicator
        self._weights = weights
        self._rank = rank
        self._parts: dict[tuple[int, int], StagedExperts] = {}

    def check_places(self) -> None:
        """Raise `InputError` if a tensor has other memory than at first."""
        self._weights.check_places()

    def prepare(self, step: Step, part: torch.Tensor) -> PreparedStep:
        """Return what this rank does in a step that lands in `part` of its window."""
        place = part.data_ptr(), len(part)
        if place not in self._parts:
            if len(self._parts) >= _MOST_PARTS:
                self._parts.clear()
            self._parts[place] = StagedExperts(self._weights, part)
        return PreparedStep(step, self._parts[place], self._weights, self._rank)

    def transfer(self, prepared: PreparedStep, times: PhaseTimes) -> PendingTransfer:
        """Begin to move all of a step's experts, into this rank's slots or its window."""
        if not len(prepared.step.transfers):
            return PendingTransfer(None)
        began = time.perf_counter()
        self._communicator.add_payloads(prepared.sends, prepared.recvs)
        times.add("queue", time.perf_counter() - began)
        return self._communicator.start()

    def transfer_slices(self, step: Step, slices: Sequence[Slice], part: torch.Tensor) -> PendingTransfer:
        """Begin to move some bytes of a step's experts, as `bursts` has cut them."""
        prepared = self.prepare(step, part)
        for row, first, end in slices:
            layer, _, source, slot, rank, kind, destination = step.transfers[row].tolist()
            if source == self._rank:
                for tensor in _cut(self._weights.slot(layer, slot), first, end):
                    self._communicator.add_send(tensor, rank)
            elif rank == self._rank:
                tensors = [payload.tensor for payload in prepared.payloads(layer, kind, destination)]
                for tensor in _cut(tensors, first, end):
                    self._communicator.add_recv(tensor, source)
        return self._communicator.start()

    def bursts(self, step: Step, limit_bytes: int) -> list[list[Slice]]:
        """Cut a step's transfers so that no rank receives more than `limit_bytes` in a burst; the same on all ranks."""
        received: dict[int, int] = {}
        cut: dict[int, list[Slice]] = {}
        for row, (layer, destination) in enumerate(step.transfers[:, [Transfers.LAYER, Transfers.DST_RANK]].tolist()):
            begin = received.get(destination, 0)
            end = received[destination] = begin + int(self._weights.payload_bytes[layer])
            for number in range(begin // limit_bytes, -(-end // limit_bytes)):
                first = max(begin, number * limit_bytes) - begin
                last = min(end, (number + 1) * limit_bytes) - begin
                cut.setdefault(number, []).append((row, first, last))
        return [cut[number] for number in sorted(cut)]

    def incoming_slices(self, step: Step, slices: Sequence[Slice]) -> int:
        """Return the payload bytes that this rank receives in a burst."""
        return sum(end - first for row, first, end in slices if step.transfers[row, Transfers.DST_RANK] == self._rank)

    def largest_share(self, step: Step) -> int:
        """Return the most payload bytes that any one rank receives in a step."""
        rows = step.transfers
        nbytes = self._weights.payload_bytes[rows[:, Transfers.LAYER]]
        shares = np.bincount(rows[:, Transfers.DST_RANK], weights=nbytes)
        return int(shares.max(initial=0))

    def commit(self, prepared: PreparedStep, stream: torch.cuda.Stream | None) -> None:
        """Copy from the window, and between slots, in the order that the schedule says, on `stream`."""
        with on_stream(self._weights.device, stream):
            for batch in prepared.copies:
                batch.enqueue()

    def depends(self, step: Step, earlier: Step) -> bool:
        """Return whether `step` reads from or receives into a slot of this rank that `earlier`, under way, changes."""
        slots = self._weights.num_slots
        rows = step.transfers
        sent = rows[rows[:, Transfers.SRC_RANK] == self._rank]
        landing = rows[(rows[:, Transfers.DST_RANK] == self._rank) & (rows[:, Transfers.KIND] == SLOT)]
        read = sent[:, Transfers.LAYER] * slots + sent[:, Transfers.SRC_SLOT]
        written = landing[:, Transfers.LAYER] * slots + landing[:, Transfers.PLACE]
        changed = earlier.changes[earlier.changes[:, 1] // slots == self._rank]
        return bool(np.isin(np.concatenate([read, written]), changed[:, 0] * slots + changed[:, 1] % slots).any())

    def incoming_bytes(self, step: Step) -> int:
        """Return the payload bytes that this rank receives in a step."""
        return self._bytes(step, Transfers.DST_RANK)

    def outgoing_bytes(self, step: Step) -> int:
        """Return the payload bytes that this rank sends in a step."""
        return self._bytes(step, Transfers.SRC_RANK)

    def peers(self, step: Step) -> tuple[int, ...]:
        """Return the ranks that this rank exchanges experts with in a step, sorted."""
        ends = step.transfers[:, [Transfers.SRC_RANK, Transfers.DST_RANK]]
        mine = ends[(ends == self._rank).any(axis=1)]
        return tuple(sorted(set(mine.ravel().tolist()) - {self._rank}))

    def name_experts(self, error: IntegrityError, step: Step) -> None:
        """Put into `error` which experts of `step` arrived wrong; it counts receives with bytes, peer by peer."""
        received: dict[int, list[tuple[int, int, int]]] = {}
        for layer, expert, source, _, destination, *_ in step.transfers.tolist():
            if destination == self._rank:
                tensors = [rows for rows in self._weights.layers[layer].rows if rows.shape[1]]
                received.setdefault(source, []).extend([(layer, expert, source)] * len(tensors))
        found = {
            received[peer][index]
            for peer, index in error.wrong
            if peer in received and 0 <= index < len(received[peer])
        }
        if found:
            error.experts = tuple(sorted(found))
            error.add_note(", ".join(f"layer {la}, expert {ex}, from rank {peer}" for la, ex, peer in error.experts))

    def _bytes(self, step: Step, column: int) -> int:
        mine = step.transfers[step.transfers[:, column] == self._rank]
        return int(self._weights.payload_bytes[mine[:, Transfers.LAYER]].sum())


def _cut(tensors: Sequence[torch.Tensor], first: int, end: int) -> Iterator[torch.Tensor]:
    """Yield the bytes `first` to `end` of tensors (uint8 `[bytes]`) that follow one another, as views."""
    begin = 0
    for tensor in tensors:
        low, high = max(first - begin, 0), min(end - begin, len(tensor))
        if low < high:
            yield tensor[low:high]
        begin += len(tensor)
