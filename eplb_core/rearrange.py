"""From two placements to moved weights: runs a schedule, step by step, over any communicator."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from eplb_core.agreement import not_all_answered
from eplb_core.communicator import EplbCommunicator, PendingTransfer
from eplb_core.control import ControlPlane
from eplb_core.copies import copy_all
from eplb_core.errors import ControlPlaneError, EplbError, HandshakeError, InputError, TransferError
from eplb_core.placement import IntArray
from eplb_core.plan import RearrangementPlan, plan_rearrangement
from eplb_core.schedule import ALIGNMENT, SLOT, Step, schedule_steps
from eplb_core.streams import on_stream
from eplb_core.weights import ExpertWeights

AGREE_TIMEOUT_S = 60.0
"""How long a rank waits for the others to begin the same rearrangement, in seconds."""

STEPS_UNDER_WAY = 1
"""Into how many parts a `Rearranger` cuts its window unless it is told otherwise. Four parts took twice as long as one
where 2 or 4 ranks shared an H200, and made no difference on a CPU: every step costs a round of messages."""


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


@dataclass(frozen=True, slots=True, eq=False)
class _UnderWay:
    """A step that was started, and the part of the window that it lands in."""

    step: Step
    part: torch.Tensor
    pending: PendingTransfer


class Rearranger:
    """Moves the experts of one model between the ranks of a communicator's group. Keep it: its window is reused.

    Args:
        communicator: made by `create_eplb_communicator`; stays the caller's to close.
        weights: `weights[layer][tensor]`, first dimension = local slots. Layers may differ in shapes and dtypes.
        window_bytes: staging memory of this rank; None takes what the communicator's configuration allows.
        node_of_rank: node number of each rank, so that sources on the same node are preferred.
        steps_under_way: into how many parts the window is cut, so that one step is received while another is
            committed. More parts are smaller ones, and every step costs a round of messages.

    Raises:
        InputError: the weights, or the window, cannot be used.
    """

    def __init__(
        self,
        communicator: EplbCommunicator,
        weights: Sequence[Sequence[torch.Tensor]],
        *,
        window_bytes: int | None = None,
        node_of_rank: Sequence[int] | None = None,
        steps_under_way: int = STEPS_UNDER_WAY,
    ) -> None:
        context = communicator.binding.context
        self._communicator = communicator
        self._weights = ExpertWeights(weights)
        if self._weights.device != context.device:
            raise InputError(
                f"the weights lie on {self._weights.device}, the communicator moves tensors on {context.device}"
            )
        if steps_under_way < 1:
            raise InputError(f"steps_under_way has to be at least 1, not {steps_under_way}")
        self._steps_under_way = steps_under_way
        self._rank = context.rank
        self._world_size = context.world_size
        self._node_of_rank = None if node_of_rank is None else list(node_of_rank)
        self._control: ControlPlane = context.control.scoped(communicator.binding.next_scope("rearranger"))
        self._stream: torch.cuda.Stream | None = None
        self._window = self._allocate(communicator.staging_limit_bytes if window_bytes is None else window_bytes)
        communicator.register(self._weights.tensors)
        communicator.register([self._window], landing=True)

    @property
    def window_bytes(self) -> int:
        """Bytes of the window that received experts land in: what is allowed, or less if the weights are less."""
        return self._window.numel()

    def set_stream(self, stream: torch.cuda.Stream | None) -> None:
        """Run transfers and copies on `stream`; None means the current stream."""
        self._stream = stream
        self._communicator.set_stream(stream)

    def run(
        self,
        old: npt.ArrayLike,
        new: npt.ArrayLike,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> RearrangeResult:
        """Move the weights from placement `old` to placement `new`. Every rank calls it with the same two.

        On a GPU the last copies may still be under way on the stream when it returns.

        Args:
            old: int64 `[layers, slots]`, what every slot holds now; -1 for empty ones.
            new: int64 `[layers, slots]`, what every slot shall hold.
            progress: called after every step with the bytes that this rank has received and those that it will.

        Raises:
            PlacementError: a placement is not valid on any rank, or the window is too small for one expert.
            InputError: the placements do not fit the weights, on any rank.
            HandshakeError: the ranks were given different placements or weights, or one did not call. Nothing was
                moved.
            TransferError: a step failed. `error.placement` is what this rank's slots hold; other ranks may be one
                step ahead of it or behind.
        """
        began = time.perf_counter()
        plan = self._agreed_plan(old, new)
        sizes = self._weights.payload_bytes
        limit = self._communicator.transfer_limit_bytes
        parts = self._parts()
        steps = schedule_steps(
            plan,
            self._weights.expert_bytes,
            window_bytes=len(parts[0]),
            send_limit_bytes=limit,
            recv_limit_bytes=limit,
        )
        phases = {"plan": time.perf_counter() - began}
        paths: dict[int, str] = {}
        placement = plan.old.copy()
        done, total = 0, sum(self._incoming_bytes(step) for step in steps)
        under_way: deque[_UnderWay] = deque()

        def complete_oldest() -> None:
            nonlocal placement, done
            oldest = under_way.popleft()
            self._wait(oldest, phases, paths)
            self._commit(oldest.step, oldest.part, phases)
            placement = oldest.step.apply(placement)
            done += self._incoming_bytes(oldest.step)
            if progress is not None:
                progress(done, total)

        self._communicator.trust_matching(True)
        try:
            for number, step in enumerate(steps):
                while len(under_way) == len(parts) or any(self._depends(step, other.step) for other in under_way):
                    complete_oldest()
                under_way.append(self._start(step, parts[number % len(parts)], phases))
            while under_way:
                complete_oldest()
        except TransferError as error:
            error.placement = placement
            raise
        finally:
            self._communicator.trust_matching(False)
        return RearrangeResult(
            placement=placement,
            moved=plan.num_transfers,
            moved_locally=plan.num_local_moves,
            bytes_moved=int(plan.traffic(sizes).sum()),
            bytes_moved_locally=int(sizes[plan.move_layer[plan.move_source >= 0]].sum()),
            seconds=time.perf_counter() - began,
            steps=len(steps),
            staging_bytes=self.window_bytes + self._communicator.staging_bytes,
            phases=phases,
            paths=paths,
        )

    # --- one step ---------------------------------------------------------------------------------------------------

    def _parts(self) -> list[torch.Tensor]:
        """Cut the window into one part for each step that may be under way: one is read while another is committed."""
        largest = int((-(-self._weights.expert_bytes // ALIGNMENT) * ALIGNMENT).max())
        count = max(
            1, min(self._communicator.max_in_flight, self._steps_under_way, self.window_bytes // max(largest, 1))
        )
        part = self.window_bytes // count // ALIGNMENT * ALIGNMENT if count > 1 else self.window_bytes
        return [self._window[number * part : (number + 1) * part] for number in range(count)]

    def _start(self, step: Step, part: torch.Tensor, phases: dict[str, float]) -> _UnderWay:
        began = time.perf_counter()
        rows = step.transfers
        for layer, _, _, slot, destination, _ in rows[rows[:, 2] == self._rank].tolist():
            for tensor in self._weights.slot(layer, slot):
                self._communicator.add_send(tensor, destination)
        for layer, _, source, _, _, offset in rows[rows[:, 4] == self._rank].tolist():
            for tensor in self._weights.staged(part, layer, offset):
                self._communicator.add_recv(tensor, source)
        _add(phases, "queue", time.perf_counter() - began)
        return _UnderWay(step, part, self._communicator.start())

    def _depends(self, step: Step, earlier: Step) -> bool:
        """Return whether `step` sends from a slot of this rank that `earlier`, not committed yet, fills."""
        sent = step.transfers[step.transfers[:, 2] == self._rank]
        filled = earlier.copies[(earlier.copies[:, 0] == self._rank) & (earlier.copies[:, 5] == SLOT)]
        slots = self._weights.num_slots
        return bool(np.isin(sent[:, 0] * slots + sent[:, 3], filled[:, 1] * slots + filled[:, 6]).any())

    @staticmethod
    def _wait(under_way: _UnderWay, phases: dict[str, float], paths: dict[int, str]) -> None:
        began = time.perf_counter()
        stats = under_way.pending.wait()
        if stats is None:
            _add(phases, "execute", time.perf_counter() - began)
            return
        paths.update(stats.paths)
        for phase, seconds in stats.phases.items():
            _add(phases, phase, seconds)

    def _commit(self, step: Step, part: torch.Tensor, phases: dict[str, float]) -> None:
        """Copy from the window, and between slots, in the order that the schedule says."""
        began = time.perf_counter()
        rows = step.copies[step.copies[:, 0] == self._rank]
        with on_stream(self._weights.device, self._stream):
            for level in np.unique(rows[:, 2]):
                targets: list[torch.Tensor] = []
                sources: list[torch.Tensor] = []
                for _, layer, _, source_kind, source, target_kind, target in rows[rows[:, 2] == level].tolist():
                    targets += self._tensors(part, layer, target_kind, target)
                    sources += self._tensors(part, layer, source_kind, source)
                copy_all(targets, sources)
        _add(phases, "commit", time.perf_counter() - began)

    def _tensors(self, part: torch.Tensor, layer: int, kind: int, place: int) -> Sequence[torch.Tensor]:
        if kind == SLOT:
            return self._weights.slot(layer, place)
        return self._weights.staged(part, layer, place)

    def _incoming_bytes(self, step: Step) -> int:
        layers = step.transfers[step.transfers[:, 4] == self._rank, 0]
        return int(self._weights.payload_bytes[layers].sum())

    # --- checks -----------------------------------------------------------------------------------------------------

    def _allocate(self, allowed: int) -> torch.Tensor:
        one_each = -(-self._weights.expert_bytes // ALIGNMENT) * ALIGNMENT
        everything = int(one_each.sum()) * self._weights.num_slots
        return torch.empty(min(allowed, everything), dtype=torch.uint8, device=self._weights.device)

    def _agreed_plan(self, old: npt.ArrayLike, new: npt.ArrayLike) -> RearrangementPlan:
        """Return the plan, once all ranks have the same one. A rank that cannot make one does not let others wait."""
        plan: RearrangementPlan | None = None
        problem: EplbError | None = None
        try:
            plan = plan_rearrangement(old, new, self._world_size, self._node_of_rank)
            self._check_shape(plan)
        except EplbError as error:
            plan, problem = None, error
        asked = {
            "old placement": "-" if plan is None else hashlib.sha256(plan.old.tobytes()).hexdigest()[:16],
            "new placement": "-" if plan is None else hashlib.sha256(plan.new.tobytes()).hexdigest()[:16],
            "weights": self._weights.describe(),
            "window": f"{self.window_bytes} bytes",
            "nodes": str(self._node_of_rank),
            "problem": str(problem or "-"),
        }
        try:
            said = self._control.all_gather(
                "the placements to rearrange", msgspec.msgpack.encode(asked), AGREE_TIMEOUT_S
            )
            ranks = [msgspec.msgpack.decode(value, type=dict[str, str]) for value in said]
        except ControlPlaneError as error:
            raise not_all_answered(error, self._world_size) from error
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise HandshakeError("what a rank was asked for cannot be read", table={}, why=str(error)) from error
        table = {item: [rank.get(item, "?") for rank in ranks] for item in asked}
        table = {item: values for item, values in table.items() if len(set(values)) > 1}
        if table:
            raise HandshakeError(
                "the ranks were asked for different rearrangements", table=table, why="nothing was moved"
            ) from problem
        if plan is None:
            raise problem or EplbError("there is no plan")
        return plan

    def _check_shape(self, plan: RearrangementPlan) -> None:
        here = (len(self._weights.layers), self._weights.num_slots)
        there = (plan.num_layers, plan.slots_per_rank)
        if here != there:
            raise InputError(
                f"the placements have {there[0]} layers of {there[1]} slots a rank, "
                f"the weights {here[0]} layers of {here[1]} slots"
            )


def _add(phases: dict[str, float], phase: str, seconds: float) -> None:
    phases[phase] = phases.get(phase, 0.0) + seconds
