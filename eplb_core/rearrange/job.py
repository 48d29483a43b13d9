"""A rearrangement beside inference: received by a thread of its own, committed by the engine when it likes.

Each step of the schedule touches one layer. For each of them the ranks settle three keys, in this order:

1. `go`: every rank has room in its window and has committed what the step reads from. A rank that is asked to cancel
   makes this the end, for all ranks at the same step.
2. `have`: every rank has received its bytes. From then on the step is ready, on all ranks.
3. `outcome`: committed, or dropped. The first rank that commits it decides for all; so does, at the end of a job that
   was cancelled or failed, the first rank that drops it.

So at every moment the placement is that of the steps whose outcome is a commit, on every rank alike.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import time
import weakref
from collections.abc import Callable
from multiprocessing.util import Finalize
from typing import Any

import torch

from eplb_core.arrays import IntArray
from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.control.commit_record import COMMIT, CommitRecord, Decision, error_of
from eplb_core.errors import ControlPlaneError, DecisionUnknownError, InputError, TransferError
from eplb_core.planning.plan import RearrangementPlan
from eplb_core.rearrange.job_receiver import Receiver
from eplb_core.rearrange.job_state import CANCEL, JobState, Ready
from eplb_core.rearrange.reporter import Reporter
from eplb_core.rearrange.result import RearrangeResult
from eplb_core.rearrange.step_runner import PhaseTimes, StepRunner
from eplb_core.transport.streams import mark

DROP = "drop"
_JOIN_S = 2.0  # more than any wait of the thread takes

logger = logging.getLogger(__name__)
_under_way: weakref.WeakSet[RearrangeJob] = weakref.WeakSet()
_told: set[int] = set()  # the processes that end their jobs


class RearrangeJob:
    """A rearrangement that runs beside inference; made by `Rearranger.start`.

    Live weights change only inside `commit` and `wait`, on the thread that calls them, in the order of its stream. Call
    both from one thread. Every rank must commit every layer that becomes ready. Ranks see that at different moments,
    and a token must find its expert where it is sent: let one rank say what all commit before the next batch::

        job = rearranger.start(old, new, pace="20GB/s")
        received = False
        while not received:
            serve_a_batch()
            # `received` is asked first: the layers that are ready then are all there will be
            received, layers = from_rank_0(lambda: (job.received, job.ready_layers()))
            for layer in layers:
                routing[layer] = job.commit(layer)
        result = job.wait()
    """

    def __init__(
        self,
        plan: RearrangementPlan,
        state: JobState,
        receiver: Receiver,
        runner: StepRunner,
        communicator: EplbCommunicator,
        record: CommitRecord,
        *,
        timeout_s: float,
        epoch: int,
        device: torch.device,
        engine_stream: torch.cuda.Stream | None,
        summarize: Callable[[PhaseTimes, float], RearrangeResult],
    ) -> None:
        """Made by `Rearranger.start`, which begins it."""
        self._state = state
        self._receiver = receiver
        self._runner = runner
        self._communicator = communicator
        self._rank, self._world_size = communicator.binding.context.rank, communicator.binding.context.world_size
        self._record = record
        self._timeout_s = timeout_s
        self._epoch = epoch
        self._requested = plan.new
        self._device = device
        self._engine_stream = engine_stream
        self._summarize = summarize
        self._reporter = Reporter(communicator, runner, state.steps, plan.num_layers, background=True)
        self._began = time.perf_counter()
        self._total_bytes = sum(map(runner.incoming_bytes, state.steps))
        self._result: RearrangeResult | None = None
        self._settled = False
        self._forget_closing: Callable[[], None] = lambda: None
        self._dropped: weakref.finalize[..., RearrangeJob] | None = None

    # --- for the engine ---------------------------------------------------------------------------------------------

    @property
    def received(self) -> bool:
        """Whether the thread has ended: everything is received, or the job was cancelled or has failed."""
        return not self._receiver.working

    @property
    def ended(self) -> bool:
        """Whether `wait` has ended the job, and the rearranger can be used again."""
        return self._settled

    @property
    def progress(self) -> tuple[int, int]:
        """The payload bytes that this rank has received, and those that it will."""
        with self._state.changed:
            return self._state.received_bytes, self._total_bytes

    @property
    def placement(self) -> IntArray:
        """What the slots hold as far as this rank has committed, int64 `[layers, slots]`: what routing may use now."""
        with self._state.changed:
            return self._state.placement.copy()

    def status(self) -> dict[str, Any]:
        """Return where the job stands, as plain data that JSON can hold. It changes nothing; ask as often as you like.

        `epoch` counts the rearrangements of the rearranger, the same on every rank. `phase` is `receiving`, `received`
        (all bytes are here, not all is committed), `cancelling`, `finished`, `cancelled` or `failed`; the last three
        are final. `requested` is the placement that was asked for, `effective` the one that routing may use now, both
        `[layers][slots]`. `ready_layers` can be committed now. `error` is None, or the `type` and `message` of what
        ended the job.
        """
        with self._state.changed:
            error = self._state.error
            cancelled = len(self._state.committed) < len(self._state.steps)
            if error is not None:
                phase = "failed"
            elif self._settled:
                phase = "cancelled" if cancelled else "finished"
            elif self._state.cancelling or self._state.stopped:
                phase = "cancelling"
            else:
                phase = "receiving" if self._receiver.working else "received"
            return {
                "rank": self._rank,
                "ranks": self._world_size,
                "epoch": self._epoch,
                "phase": phase,
                "requested": self._requested.tolist(),
                "effective": self._state.placement.tolist(),
                "steps": len(self._state.steps),
                "steps_committed": len(self._state.committed),
                "ready_layers": sorted({self._state.layer(ready.number) for ready in self._state.ready}),
                "bytes_received": self._state.received_bytes,
                "bytes_to_receive": self._total_bytes,
                "error": None if error is None else {"type": type(error).__name__, "message": str(error)},
            }

    def ready_layers(self) -> list[int]:
        """Return the layers that can be committed now, sorted. All ranks have their bytes, or will see so in a moment.

        A layer that is larger than the window comes in parts, and is ready once for each.
        """
        with self._state.changed:
            return (
                []
                if self._state.error is not None
                else sorted({self._state.layer(ready.number) for ready in self._state.ready})
            )

    @torch.inference_mode(False)
    def commit(self, layer: int) -> IntArray:
        """Copy what was received of `layer` into its slots, and return the layer's placement, int64 `[slots]`.

        The copies are enqueued on the engine's stream (the rearranger's, or the current one), behind what is there:
        later work sees the new weights, earlier work the old ones. Takes one message to the store and local copies.

        Raises:
            InputError: the layer is not ready on this rank, and does not become so in time; or a tensor got other
                memory since the job was started, which ends the job on all ranks.
            TransferError: the job has failed, or was cancelled before this commit; nothing was copied.
        """
        ready = self._await_ready(layer)
        self._check_places()
        decision = self._settle(ready.number, COMMIT)
        if decision.outcome != COMMIT:
            self._note_given_up(decision)
            raise TransferError(
                f"layer {layer} was given up before it could be committed",
                peers=[] if decision.rank == self._rank else [decision.rank],
                phase="commit",
                usable=True,
                remedy="call wait(), which tells why and gives the placement",
            )
        return self._copy(ready)

    def cancel(self) -> None:
        """Stop receiving, on all ranks, at the next step. One rank's word is enough; `wait` tells where it ended."""
        self._record.raise_flag(CANCEL)  # first: what this rank says next is taken as a word of one that has cancelled
        with self._state.changed:
            self._state.cancelling = True
            self._state.changed.notify_all()

    @torch.inference_mode(False)
    def wait(self, timeout: float | None = None) -> RearrangeResult:
        """Commit all that is left as it becomes ready, and return what the job did. Every rank has to call it.

        After `cancel`, the layers that no rank has committed stay as they were.

        Args:
            timeout: the longest to wait, in seconds; None waits as long as the job's own deadlines allow.

        Raises:
            TimeoutError: the job goes on; call it again, or cancel.
            TransferError: the job failed. `error.placement` is what the slots hold, the same on every rank that
                survives.
        """
        if self._result is not None:
            return self._result
        deadline = None if timeout is None else time.monotonic() + timeout
        while (ready := self._next_or_end(deadline)) is not None:
            try:
                self._check_places()
            except InputError:
                continue  # the job has failed with it
            decision = self._settle(ready.number, COMMIT)
            if decision.outcome == COMMIT:
                self._copy(ready)
            else:
                self._note_given_up(decision)
                self._drop(ready)
        self._receiver.join()
        return self._end()

    def forget(self) -> None:
        """Have the store forget what the ranks have decided in this job, which has ended on all of them."""
        for question in (*self._receiver.records(), *map(_outcome, range(len(self._state.steps)))):
            self._record.forget(question)
        self._record.forget_flags(CANCEL)

    # --- engine's thread --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start receiving."""
        self._reporter.started()
        _under_way.add(self)
        itself = weakref.ref(self)

        def abandon() -> None:
            if (job := itself()) is not None:
                job.abandon("closed its communicator")

        self._forget_closing = self._communicator.binding.before_closing(abandon)
        reason = _given_up(self._rank, "dropped a background job that had not ended")
        self._dropped = weakref.finalize(self, self._state.abandon, reason)
        self._dropped.atexit = False
        _end_with_this_process()
        self._receiver.begin(self._engine_stream)

    def abandon(self, why: str) -> None:
        """Stop serving the job, if it has not ended, and tell the other ranks; `wait` tells how far it came.

        Args:
            why: what this rank did, for the error that all ranks raise.
        """
        if self._settled:
            return
        reason = _given_up(self._rank, f"{why} while a background job was under way")
        self._state.abandon(reason)
        self._receiver.join(self._timeout_s + _JOIN_S)
        with self._state.changed:
            left = list(self._state.ready)
            if self._state.error is None and len(self._state.committed) < len(self._state.steps):
                self._state.error = reason
        given_up = Decision(DROP, self._rank, type(reason).__name__, reason.what, phase=reason.phase)
        with contextlib.suppress(ControlPlaneError):  # the store is gone, as all ranks see
            for ready in left:
                self._record.settle(_outcome(ready.number), given_up)

    def _check_places(self) -> None:
        """Give the job up if what is copied now would end up in memory that the engine does not read any more."""
        try:
            self._runner.check_places()
        except InputError:
            self.abandon("gave a tensor other memory")
            raise

    def _await_ready(self, layer: int) -> Ready:
        """Return the first step of `layer` that is ready. Another rank may have seen a moment earlier that it is."""
        deadline = time.monotonic() + self._timeout_s
        with self._state.changed:
            while True:
                if self._state.error is not None:
                    raise TransferError(
                        f"layer {layer} cannot be committed: the job has failed",
                        phase="commit",
                        why=str(self._state.error),
                        remedy="call wait(), which raises the cause with the placement of all ranks",
                    ) from self._state.error
                for ready in self._state.ready:
                    if self._state.layer(ready.number) == layer:
                        return ready
                left = deadline - time.monotonic()
                expected = any(
                    self._state.layer(number) == layer
                    for number in range(len(self._state.steps))
                    if number not in self._state.committed
                )
                if left <= 0 or not expected or self._state.stopped or not self._receiver.working:
                    raise InputError(
                        f"layer {layer} is not ready",
                        why="it does not change" if not expected else "its bytes have not arrived on all ranks",
                        remedy="commit what ready_layers() returns",
                    )
                self._state.changed.wait(min(left, 0.1))

    def _next_or_end(self, deadline: float | None) -> Ready | None:
        """Return the next ready step to commit, or None when there will be none."""
        with self._state.changed:
            while True:
                if self._state.cancelling or self._state.stopped or self._state.error is not None:
                    ready = None
                else:
                    ready = self._state.ready[0] if self._state.ready else None
                if ready is not None:
                    return ready
                if not self._receiver.working:
                    return None
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    here = self._state.received_bytes
                    raise TimeoutError(f"the rearrangement has not ended; {here} of {self._total_bytes} bytes are here")
                self._state.changed.wait(0.05 if left is None else min(left, 0.05))

    def _settle(self, number: int, outcome: str) -> Decision:
        try:
            return self._record.settle(_outcome(number), Decision(outcome, self._rank))
        except ControlPlaneError as gone:
            raise self._undecided(number, gone) from gone

    def _copy(self, ready: Ready) -> IntArray:
        """Commit a step here, after it was settled that it is committed."""
        began = time.perf_counter()
        stream = self._engine_stream
        if ready.received is not None:
            (stream or torch.cuda.current_stream(self._device)).wait_event(ready.received)
        self._runner.commit(self._runner.prepare(self._state.steps[ready.number], ready.part), stream)
        done = mark(self._device, stream)
        with self._state.changed:
            self._state.placement = self._state.steps[ready.number].apply(self._state.placement)
            self._state.committed.add(ready.number)
            self._state.last_commit[ready.number % len(self._state.parts)] = done
            self._state.ready.remove(ready)
            self._state.times.add("commit", time.perf_counter() - began)
            self._state.changed.notify_all()
            placement: IntArray = self._state.placement[self._state.layer(ready.number)].copy()
        self._reporter.committed(ready.number, self._state.steps[ready.number], time.perf_counter() - ready.began)
        return placement

    def _note_given_up(self, decision: Decision) -> None:
        """Fail if another rank dropped a step because it does not serve the job any more; a cancelled job does not."""
        if decision.error and decision.rank != self._rank:
            with self._state.changed:
                self._state.error = self._state.error or error_of(decision, self._rank, usable=False)
                self._state.changed.notify_all()

    def _drop(self, ready: Ready) -> None:
        with self._state.changed:
            self._state.ready.remove(ready)
            self._state.stopped = True
            self._state.changed.notify_all()

    def _end(self) -> RearrangeResult:
        """Settle what was received and not committed, then return or raise."""
        self._settled = True
        _under_way.discard(self)
        self._forget_closing()
        if self._dropped is not None:
            self._dropped.detach()
        self._communicator.set_stream(self._engine_stream)
        try:
            with self._record.last_words(0.0 if self._state.error is None else self._timeout_s):
                self._settle_rest()
        except DecisionUnknownError as error:
            self._state.error = error
        with self._state.changed:
            self._state.forget_unknown()
        if self._state.error is not None:
            if isinstance(self._state.error, TransferError):
                self._state.error.placement = self._state.placement.copy()
            self._reporter.failed(self._state.error, self._first_missing())
            raise self._state.error
        result = self._summarize(self._state.times, time.perf_counter() - self._began)
        self._result = result.at(self._state.placement, cancelled=len(self._state.committed) < len(self._state.steps))
        self._reporter.finished(self._result)
        return self._result

    def _settle_rest(self) -> None:
        dropped: set[int] = set()  # layers; a later part of one must not be committed without the earlier
        for ready in sorted(self._state.ready, key=lambda ready: ready.number):
            layer = self._state.layer(ready.number)
            if layer not in dropped and self._settle(ready.number, DROP).outcome == COMMIT:
                self._copy(ready)
            else:
                dropped.add(layer)
        self._state.ready.clear()

    def _first_missing(self) -> int | None:
        return next((n for n in range(len(self._state.steps)) if n not in self._state.committed), None)

    def _undecided(self, number: int, gone: ControlPlaneError) -> DecisionUnknownError:
        error = DecisionUnknownError(
            f"nobody can tell whether layer {self._state.layer(number)} is committed",
            phase="commit",
            why=gone.what,
            remedy="load the experts with -1 in error.placement anew; let torchrun, or another process that outlives "
            "the ranks, host the store",
        )
        with self._state.changed:
            # The thread goes on meanwhile, as far as it has room; once it has ended, it knows what it has left open.
            open_ones = self._state.may_be_committed() if self._receiver.working else set()
            self._state.unknown |= open_ones | {ready.number for ready in self._state.ready}
            self._state.forget_unknown()
            error.placement = self._state.placement.copy()
            self._state.error = error
            self._state.ready.clear()
            self._state.changed.notify_all()
        return error


def _outcome(number: int) -> str:
    return f"outcome of step {number}"


def _given_up(rank: int, why: str) -> TransferError:
    return TransferError(f"rank {rank} {why}", phase="commit", remedy="call wait(), or cancel() and then wait(), first")


def _end_with_this_process() -> None:
    """Have jobs end before the process does: a child that multiprocessing has forked does not call `atexit`."""
    if os.getpid() not in _told:
        _told.add(os.getpid())
        atexit.register(_end_all)
        Finalize(None, _end_all, exitpriority=100)


def _end_all() -> None:
    """End the threads of jobs that nobody waits for: Python would end them in the middle, and the process with them."""
    for job in list(_under_way):
        if not job.ended:
            logger.warning("a background job was not waited for; it is given up on all ranks")
            job.abandon("came to its end")
