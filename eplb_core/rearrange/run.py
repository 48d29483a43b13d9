"""The steps of one synchronous rearrangement: received, decided with the other ranks, committed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from eplb_core.arrays import IntArray
from eplb_core.contract.communicator import EplbCommunicator, PendingTransfer
from eplb_core.control.commit_record import Record, error_of, who_is_to_blame
from eplb_core.errors import ControlPlaneError, DecisionUnknownError, IntegrityError
from eplb_core.planning.placement import EMPTY
from eplb_core.rearrange.reporter import Reporter
from eplb_core.rearrange.step_runner import PhaseTimes, PreparedStep, StepRunner
from eplb_core.scheduling.schedule import Step


@dataclass(frozen=True, slots=True, eq=False)
class _UnderWay:
    """A step that was started."""

    prepared: PreparedStep
    pending: PendingTransfer
    began: float


class Run:
    """A rearrangement that is being made.

    Args:
        steps: what is to do.
        window: what received experts land in.
        placement: what the slots hold at first.
        record: where the ranks decide.
        communicator: what moves the bytes.
        runner: this rank's part in each step.
        reporter: who is told.
        stream: where copies go; None for the current stream.

    Attributes:
        placement: what the slots hold now.
        decided: how many steps are committed.
        times: seconds by phase, and paths.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        window: torch.Tensor,
        placement: IntArray,
        record: Record,
        communicator: EplbCommunicator,
        runner: StepRunner,
        reporter: Reporter,
        stream: torch.cuda.Stream | None,
    ) -> None:
        context = communicator.binding.context
        self.steps = list(steps)
        self.placement = placement
        self.decided = 0
        self.times = PhaseTimes()
        self.reporter = reporter
        self._record = record
        self._window = window
        self._communicator = communicator
        self._runner = runner
        self._stream = stream
        self._rank, self._world_size = context.rank, context.world_size
        self._began = time.perf_counter()  # the step that is made
        self._under_way: _UnderWay | None = None
        self._next: PreparedStep | None = None

    def perform(self, progress: Callable[[int, int], None] | None) -> None:
        """Run all steps, and tell the others if this rank cannot go on."""
        total = sum(map(self._runner.incoming_bytes, self.steps))
        done = 0
        with self._trusting(), self._giving_up():
            for step in self.steps:
                began = self._began = time.perf_counter()
                self._record.require_store()
                prepared = self._next_step()
                self._next = None
                with self._naming(step):
                    pending = self._runner.transfer(prepared, self.times)
                self._under_way = _UnderWay(prepared, pending, began)
                self._complete(self._under_way)
                done += self._runner.incoming_bytes(step)
                if progress is not None:
                    progress(done, total)

    def _complete(self, under_way: _UnderWay) -> None:
        """Wait for a step, decide it, and commit it."""
        self._receive(under_way)
        began = time.perf_counter()
        decision = self._record.decide(step_key(self.decided))
        self.times.add("decide", time.perf_counter() - began)
        if decision.aborted:
            raise error_of(decision, self._rank, usable=decision.usable)
        self._commit(under_way)

    def _commit(self, under_way: _UnderWay) -> None:
        began = time.perf_counter()
        step = under_way.prepared.step
        self._runner.commit(under_way.prepared, self._stream)
        self.times.add("commit", time.perf_counter() - began)
        self.placement = step.apply(self.placement)
        self.decided += 1
        self._under_way = None
        if self.decided > 1 and self.decided % self._world_size == self._rank:
            # Every rank has read the decision before, or this one would not stand.
            self._record.forget(step_key(self.decided - 2))
        self.reporter.committed(self.decided - 1, step, time.perf_counter() - under_way.began)

    def _receive(self, under_way: _UnderWay) -> None:
        began = time.perf_counter()
        under_way.pending.use_idle_time(self._look_ahead(under_way))
        with self._naming(under_way.prepared.step):
            stats = under_way.pending.wait()
        if stats is None:
            self.times.add("execute", time.perf_counter() - began)
            return
        self.times.paths.update(stats.paths)
        for phase, seconds in stats.phases.items():
            self.times.add(phase, seconds)

    def _look_ahead(self, under_way: _UnderWay) -> Iterator[object]:
        """Look up what the commit of a step copies, and then what the next step moves."""
        yield from under_way.prepared.look_up()
        if self.decided + 1 < len(self.steps):
            self._next = self._runner.prepare(self.steps[self.decided + 1], self._window)
            yield from self._next.look_up()

    def _next_step(self) -> PreparedStep:
        """Return the step to start now, as far as it is prepared."""
        return self._next or self._runner.prepare(self.steps[self.decided], self._window)

    @contextlib.contextmanager
    def _naming(self, step: Step) -> Iterator[None]:
        try:
            yield
        except IntegrityError as error:
            self._runner.name_experts(error, step)
            raise

    @contextlib.contextmanager
    def _trusting(self) -> Iterator[None]:
        self._communicator.trust_matching(True)
        try:
            yield
        finally:
            self._communicator.trust_matching(False)

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """On any error, settle with the other ranks which steps are committed, and commit those here too."""
        try:
            yield
        except BaseException as error:
            if self.decided == len(self.steps):
                raise
            try:
                with self._record.last_words(time.perf_counter() - self._began):
                    explained = self._settle(error)
            except ControlPlaneError as gone:
                raise self._undecided(gone) from error
            if explained is not error:
                raise explained from error
            raise

    def _settle(self, error: BaseException) -> BaseException:
        """Return what to raise: `error`, or one that names who is really to blame."""
        while self.decided < len(self.steps):
            decision = self._record.abort(step_key(self.decided), error)
            if decision.aborted:
                return who_is_to_blame(error, decision, self._rank)
            # All ranks had said that they have this step's bytes, this one too: it is committed everywhere.
            if self._under_way is None:
                raise error
            self._commit(self._under_way)
        return error

    def _undecided(self, gone: ControlPlaneError) -> DecisionUnknownError:
        error = DecisionUnknownError(
            f"nobody can tell whether {step_key(self.decided)} is committed",
            phase="commit",
            why=gone.what,
            remedy="load the experts with -1 in error.placement anew; let torchrun, or another process that outlives "
            "the ranks, host the store",
        )
        step = self.steps[self.decided]
        self.placement = self.placement.copy()
        self.placement[step.changes[:, 0], step.changes[:, 1]] = EMPTY
        error.placement = self.placement.copy()
        return error


def step_key(step: int) -> str:
    """Return the key that a step is decided under."""
    return f"step {step}"
