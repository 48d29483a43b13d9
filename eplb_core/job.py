"""A rearrangement beside inference: received by a thread of its own, committed by the engine when it likes.

Each step of the schedule touches one layer. For each of them the ranks settle three questions, in this order:

1. `go`: every rank has room in its window and has committed what the step reads from. A rank that is asked to cancel
   makes this the end, for all ranks at the same step.
2. `have`: every rank has received its bytes. From then on the step is ready, on all ranks.
3. `outcome`: committed, or dropped. The first rank that commits it decides for all; so does, at the end of a job that
   was cancelled or failed, the first rank that drops it.

So at every moment the placement is that of the steps whose outcome is a commit, on every rank alike.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from eplb_core.communicator import EplbCommunicator
from eplb_core.control import ControlPlane
from eplb_core.errors import ControlPlaneError, DecisionUnknownError, InputError, TransferError, TransferTimeoutError
from eplb_core.ledger import COMMIT, Ledger, Verdict, error_of
from eplb_core.pace import Pace
from eplb_core.placement import EMPTY, IntArray
from eplb_core.plan import RearrangementPlan
from eplb_core.rearrange_events import Narrator
from eplb_core.rearrange_result import RearrangeResult
from eplb_core.schedule import Step
from eplb_core.step_runner import Account, Slice, StepRunner
from eplb_core.streams import mark

STOP, DROP = "stop", "drop"
_CANCEL = "cancel"
_BEAT_S = 0.5
_CANCEL_WITHIN_S = 0.25  # how often a paced transfer asks whether it was cancelled


@dataclass(slots=True, eq=False)
class _Ready:
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


class RearrangeJob:
    """A rearrangement that runs beside inference; made by `Rearranger.start`.

    Live weights change only inside `commit` and `wait`, on the thread that calls them, in the order of its stream. Call
    both from one thread. Every rank has to commit every layer that becomes ready, in any order and at any moment.

        job = rearranger.start(old, new, pace="20GB/s")
        while not job.received:
            serve_a_batch()
            for layer in job.ready_layers():
                routing[layer] = job.commit(layer)
        result = job.wait()
    """

    def __init__(
        self,
        plan: RearrangementPlan,
        steps: Sequence[Step],
        parts: Sequence[torch.Tensor],
        runner: StepRunner,
        communicator: EplbCommunicator,
        control: ControlPlane,
        *,
        timeout_s: float,
        commit_timeout_s: float,
        bytes_per_s: float | None,
        device: torch.device,
        engine_stream: torch.cuda.Stream | None,
        summarize: Callable[[Account, float], RearrangeResult],
    ) -> None:
        self._plan = plan
        self._steps = list(steps)
        self._parts = list(parts)
        self._runner = runner
        self._communicator = communicator
        self._control = control
        self._rank = control.rank
        self._engine_ledger = Ledger(control.with_own_connection(), timeout_s)
        self._ledger = Ledger(control, timeout_s)
        self._timeout_s = timeout_s
        self._commit_timeout_s = commit_timeout_s
        self._pace = None if bytes_per_s is None else Pace(bytes_per_s)
        self._device = device
        self._engine_stream = engine_stream
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._summarize = summarize
        self._narrator = Narrator(communicator, runner, self._steps, plan.num_layers, background=True)
        self._account = Account()
        self._began = time.perf_counter()

        self._changed = threading.Condition()
        # All of these are read and written with the condition held.
        self._placement: IntArray = plan.old.copy()
        self._ready: list[_Ready] = []
        self._committed: set[int] = set()
        self._last_commit: dict[int, torch.cuda.Event | None] = {}  # part -> the copies out of it
        self._received_bytes = 0
        self._arriving: _Ready | None = None
        self._cancelling = False
        self._stopped = False
        self._error: BaseException | None = None
        self._result: RearrangeResult | None = None
        self._settled = False

        self._total_bytes = sum(map(runner.incoming_bytes, self._steps))
        self._question = ""  # the one that the thread is at
        self._bursts_between_questions = (
            1 << 30 if self._pace is None else max(1, round(_CANCEL_WITHIN_S / self._pace.burst_s))
        )
        self._thread = threading.Thread(target=self._work, name="eplb rearrangement", daemon=True)

    # --- for the engine ---------------------------------------------------------------------------------------------

    @property
    def received(self) -> bool:
        """Whether the thread has ended: everything is received, or the job was cancelled or has failed."""
        return not self._thread.is_alive()

    @property
    def ended(self) -> bool:
        """Whether `wait` has ended the job, and the rearranger can be used again."""
        return self._settled

    @property
    def progress(self) -> tuple[int, int]:
        """The payload bytes that this rank has received, and those that it will."""
        with self._changed:
            return self._received_bytes, self._total_bytes

    @property
    def placement(self) -> IntArray:
        """What the slots hold as far as this rank has committed, int64 `[layers, slots]`: what routing may use now."""
        with self._changed:
            return self._placement.copy()

    def ready_layers(self) -> list[int]:
        """Return the layers that can be committed now, sorted. All ranks have their bytes, or will see so in a moment.

        A layer that is larger than the window comes in parts, and is ready once for each.
        """
        with self._changed:
            return [] if self._error is not None else sorted({self._layer(ready.number) for ready in self._ready})

    def commit(self, layer: int) -> IntArray:
        """Copy what was received of `layer` into its slots, and return the layer's placement, int64 `[slots]`.

        The copies are enqueued on the engine's stream (the rearranger's, or the current one), behind what is there:
        later work sees the new weights, earlier work the old ones. Takes one message to the store and local copies.

        Raises:
            InputError: the layer is not ready on this rank, and does not become so in time.
            TransferError: the job has failed, or was cancelled before this commit; nothing was copied.
        """
        ready = self._await_ready(layer)
        verdict = self._settle(ready.number, COMMIT)
        if verdict.outcome != COMMIT:
            raise TransferError(
                f"layer {layer} was given up before it could be committed",
                peers=[] if verdict.rank == self._rank else [verdict.rank],
                phase="commit",
                usable=True,
                remedy="call wait(), which tells why and gives the placement",
            )
        return self._copy(ready)

    def cancel(self) -> None:
        """Stop receiving, on all ranks, at the next step. One rank's word is enough; `wait` tells where it ended."""
        with self._changed:
            self._cancelling = True
            self._changed.notify_all()
        self._engine_ledger.raise_flag(_CANCEL)

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
            if self._settle(ready.number, COMMIT).outcome == COMMIT:
                self._copy(ready)
            else:
                self._drop(ready)
        self._thread.join()
        return self._end()

    # --- engine's thread --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the thread."""
        if self._stream is not None:
            self._stream.wait_stream(self._engine_stream or torch.cuda.current_stream(self._device))
        self._communicator.set_stream(self._stream)
        self._narrator.started()
        self._thread.start()

    def _layer(self, number: int) -> int:
        return int(self._steps[number].layers[0])

    def _await_ready(self, layer: int) -> _Ready:
        """Return the first step of `layer` that is ready. Another rank may have seen a moment earlier that it is."""
        deadline = time.monotonic() + self._timeout_s
        with self._changed:
            while True:
                if self._error is not None:
                    raise TransferError(
                        f"layer {layer} cannot be committed: the job has failed",
                        phase="commit",
                        why=str(self._error),
                        remedy="call wait(), which raises the cause with the placement of all ranks",
                    ) from self._error
                for ready in self._ready:
                    if self._layer(ready.number) == layer:
                        return ready
                left = deadline - time.monotonic()
                expected = any(
                    self._layer(number) == layer for number in range(len(self._steps)) if number not in self._committed
                )
                if left <= 0 or not expected or self._stopped or not self._thread.is_alive():
                    raise InputError(
                        f"layer {layer} is not ready",
                        why="it does not change" if not expected else "its bytes have not arrived on all ranks",
                        remedy="commit what ready_layers() returns",
                    )
                self._changed.wait(min(left, 0.1))

    def _next_or_end(self, deadline: float | None) -> _Ready | None:
        """Return the next ready step to commit, or None when there will be none."""
        with self._changed:
            while True:
                if self._cancelling or self._stopped or self._error is not None:
                    ready = None
                else:
                    ready = self._ready[0] if self._ready else None
                if ready is not None:
                    return ready
                if not self._thread.is_alive():
                    return None
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(
                        f"the rearrangement has not ended; {self._received_bytes} of {self._total_bytes} bytes are here"
                    )
                self._changed.wait(0.05 if left is None else min(left, 0.05))

    def _settle(self, number: int, outcome: str) -> Verdict:
        try:
            return self._engine_ledger.settle(_outcome(number), Verdict(outcome, self._rank))
        except ControlPlaneError as gone:
            raise self._undecided(number, gone) from gone

    def _copy(self, ready: _Ready) -> IntArray:
        """Commit a step here, after it was settled that it is committed."""
        began = time.perf_counter()
        stream = self._engine_stream
        if ready.received is not None:
            (stream or torch.cuda.current_stream(self._device)).wait_event(ready.received)
        self._runner.commit(self._steps[ready.number], ready.part, stream)
        done = mark(self._device, stream)
        with self._changed:
            self._placement = self._steps[ready.number].apply(self._placement)
            self._committed.add(ready.number)
            self._last_commit[ready.number % len(self._parts)] = done
            self._ready.remove(ready)
            self._account.add("commit", time.perf_counter() - began)
            self._changed.notify_all()
            placement: IntArray = self._placement[self._layer(ready.number)].copy()
        self._narrator.committed(ready.number, self._steps[ready.number], time.perf_counter() - ready.began)
        return placement

    def _drop(self, ready: _Ready) -> None:
        with self._changed:
            self._ready.remove(ready)
            self._stopped = True
            self._changed.notify_all()

    def _end(self) -> RearrangeResult:
        """Settle what was received and not committed, then return or raise."""
        self._settled = True
        self._communicator.set_stream(self._engine_stream)
        try:
            self._settle_rest()
        except DecisionUnknownError as error:
            self._error = error
        if self._error is not None:
            if isinstance(self._error, TransferError):
                self._error.placement = self._placement.copy()
            self._narrator.failed(self._error, self._first_missing())
            raise self._error
        result = self._summarize(self._account, time.perf_counter() - self._began)
        self._result = result.at(self._placement, cancelled=len(self._committed) < len(self._steps))
        self._narrator.finished(self._result)
        return self._result

    def _settle_rest(self) -> None:
        dropped: set[int] = set()  # layers; a later part of one must not be committed without the earlier
        for ready in sorted(self._ready, key=lambda ready: ready.number):
            layer = self._layer(ready.number)
            if layer not in dropped and self._settle(ready.number, DROP).outcome == COMMIT:
                self._copy(ready)
            else:
                dropped.add(layer)
        self._ready.clear()

    def _first_missing(self) -> int | None:
        return next((n for n in range(len(self._steps)) if n not in self._committed), None)

    def _undecided(self, number: int, gone: ControlPlaneError) -> DecisionUnknownError:
        error = DecisionUnknownError(
            f"nobody can tell whether layer {self._layer(number)} is committed",
            phase="commit",
            why=gone.what,
            remedy="load the experts with -1 in error.placement anew; let torchrun, or another process that outlives "
            "the ranks, host the store",
        )
        with self._changed:
            step = self._steps[number]
            self._placement[step.changes[:, 0], step.changes[:, 1]] = EMPTY
            error.placement = self._placement.copy()
            self._error = error
            self._ready.clear()
            self._changed.notify_all()
        return error

    # --- the job's thread -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        number = 0
        try:
            if self._stream is not None:
                torch.cuda.set_device(self._device)
            self._communicator.trust_matching(True)
            try:
                for number, step in enumerate(self._steps):
                    self._question = _go(number)
                    if not self._may_go(number) or not self._receive(number, step):
                        break
                    self._forget(number)
            finally:
                self._communicator.trust_matching(False)
        except BaseException as error:  # noqa: BLE001 - it belongs to the engine's thread
            self._fail(number, error)
        finally:
            with self._changed:
                self._changed.notify_all()

    def _may_go(self, number: int) -> bool:
        """Wait until this rank and all others can receive step `number`; return False if the job ends here."""
        self._await_room(number)
        heard: dict[int, tuple[int, float]] = {}

        def silent() -> TransferError | None:
            """Return an error if a rank that is missing shows no sign of life."""
            now = time.monotonic()
            lost = []
            for rank in self._ledger.missing(_go(number)):
                beats = self._ledger.beats(rank)
                if rank not in heard or heard[rank][0] != beats:
                    heard[rank] = beats, now
                elif now - heard[rank][1] > self._timeout_s:
                    lost.append(rank)
            if not lost:
                return None
            ranks = ("rank " if len(lost) == 1 else "ranks ") + ", ".join(map(str, lost))
            text = f"{ranks} showed no sign of life for {self._timeout_s:g} s"
            return TransferTimeoutError(text, peers=lost, phase="go")

        return self._goes_on(_go(number), silent)

    def _await_room(self, number: int) -> None:
        """Wait until this rank can receive a step, or the job ends. The other ranks see that it is alive."""
        deadline = time.monotonic() + self._commit_timeout_s
        asked = 0.0
        with self._changed:
            while not (self._cancelling or self._stopped) and not self._has_room(number):
                now = time.monotonic()
                if now > deadline:
                    raise TransferError(
                        f"rank {self._rank} has not committed what was ready within {self._commit_timeout_s:g} s",
                        phase="commit",
                        usable=True,
                        remedy="commit what ready_layers() returns, or give a longer commit_timeout_s",
                    )
                if now - asked > _BEAT_S:
                    asked = now
                    self._ledger.beat()
                    if self._ledger.flag(_CANCEL):
                        return
                self._changed.wait(0.02)

    def _goes_on(self, question: str, watch: Callable[[], TransferError | None] | None = None) -> bool:
        """Ask all ranks whether to go on; return False if one of them has cancelled the job."""
        began = time.perf_counter()
        verdict = self._ledger.vote(question, lambda: STOP if self._ledger.flag(_CANCEL) else COMMIT, watch=watch)
        with self._changed:
            self._account.add("decide", time.perf_counter() - began)
            if verdict.outcome == STOP:
                self._stopped = True
                self._changed.notify_all()
        if verdict.aborted:
            raise error_of(verdict, self._rank, usable=verdict.usable)
        return verdict.outcome == COMMIT

    def _has_room(self, number: int) -> bool:
        """Whether the step's part of the window is free, and what it sends from is committed here."""
        previous = number - len(self._parts)
        if previous >= 0 and previous not in self._committed:
            return False
        step = self._steps[number]
        waiting = (n for n in range(number) if n not in self._committed)
        return not any(self._runner.depends(step, self._steps[earlier]) for earlier in waiting)

    def _receive(self, number: int, step: Step) -> bool:
        """Receive a step on all ranks; return False if the job was cancelled meanwhile."""
        part = self._parts[number % len(self._parts)]
        began = time.perf_counter()
        if self._stream is not None:
            with self._changed:
                events = [event for event in self._last_commit.values() if event is not None]
            for event in events:
                self._stream.wait_event(event)
        for index, burst in enumerate(self._bursts(step)):
            if index and index % self._bursts_between_questions == 0:
                self._question = _going_on(number, index)
                if not self._goes_on(self._question):
                    return False
            nbytes = self._runner.incoming_slices(step, burst)
            if self._pace is not None:
                self._pace.wait(nbytes)
            stats = self._runner.transfer_slices(step, burst, part).wait()
            with self._changed:
                self._received_bytes += nbytes
                if stats is not None:
                    self._account.paths.update(stats.paths)
                    for phase, seconds in stats.phases.items():
                        self._account.add(phase, seconds)
        self._question = _have(number)
        self._arriving = _Ready(number, part, mark(self._device, self._stream), began)
        verdict = self._ledger.vote(self._question)
        if verdict.aborted:
            raise error_of(verdict, self._rank, usable=verdict.usable)
        self._arrived()
        return True

    def _bursts(self, step: Step) -> list[list[Slice]]:
        limit = self._runner.largest_share(step) if self._pace is None else self._pace.burst_bytes
        return self._runner.bursts(step, max(1, limit))

    def _arrived(self) -> None:
        """All ranks have the step that this rank has received last."""
        with self._changed:
            if self._arriving is not None:
                self._ready.append(self._arriving)
                self._arriving = None
            self._changed.notify_all()

    def _forget(self, number: int) -> None:
        """Remove records that no rank will read again: all ranks have gone past the step before."""
        if number and number % self._control.world_size == self._rank:
            bursts = range(0, len(self._bursts(self._steps[number - 1])), self._bursts_between_questions)
            for question in (_go(number - 1), _have(number - 1), *(_going_on(number - 1, i) for i in bursts if i)):
                self._ledger.forget(question)

    def _fail(self, number: int, error: BaseException) -> None:
        """Tell the other ranks, at the first question that they have not all answered, and keep the error."""
        raised = error
        try:
            self._settle_failure(number, error)
        except ControlPlaneError as gone:
            raised = DecisionUnknownError(
                "the store that carries the commit records is gone",
                phase="commit",
                why=gone.what,
                remedy="let torchrun, or another process that outlives the ranks, host the store",
            )
        with self._changed:
            self._error = raised
            self._changed.notify_all()

    def _settle_failure(self, number: int, error: BaseException) -> None:
        between = range(self._bursts_between_questions, len(self._bursts(self._steps[number])) + 1)
        later = [_going_on(number, i) for i in between if i % self._bursts_between_questions == 0]
        questions = [_go(number), *later, _have(number), _go(number + 1)]
        for question in questions[questions.index(self._question) :]:
            if self._ledger.abort(question, error).aborted:
                return
            if question == _have(number):
                self._arrived()  # all ranks had said so, this one too: it can be committed


def _go(number: int) -> str:
    return f"going on with step {number}"


def _going_on(number: int, burst: int) -> str:
    return f"going on with step {number} at burst {burst}"


def _have(number: int) -> str:
    return f"receiving step {number}"


def _outcome(number: int) -> str:
    return f"outcome of step {number}"
