"""The thread of a background job: receives step after step into the window, as far as there is room."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.control.commit_record import COMMIT, CommitRecord, error_of, who_is_to_blame
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import ControlPlaneError, DecisionUnknownError, TransferError, TransferTimeoutError
from eplb_core.rearrange.job_state import CANCEL, JobState, Ready
from eplb_core.rearrange.pace import Pace
from eplb_core.rearrange.step_runner import Slice, StepRunner
from eplb_core.scheduling.schedule import Step
from eplb_core.transport.streams import mark
from eplb_core.words import ranks_text

STOP = "stop"
_BEAT_S = 0.5
_CANCEL_WITHIN_S = 0.25  # how often a paced transfer asks whether it was cancelled


class Receiver:
    """Receives the steps of a job.

    Args:
        state: shared with the engine's thread.
        runner: this rank's part in each step.
        communicator: what moves the bytes; nobody else uses it meanwhile.
        control: where the ranks decide.
        timeout_s: how long another rank may be silent, in seconds.
        commit_timeout_s: how long a rank may take to commit what is ready, in seconds.
        bytes_per_s: the most that a rank receives a second; None for no limit.
        device: where the weights lie.
    """

    def __init__(
        self,
        state: JobState,
        runner: StepRunner,
        communicator: EplbCommunicator,
        control: ControlPlane,
        *,
        timeout_s: float,
        commit_timeout_s: float,
        bytes_per_s: float | None,
        device: torch.device,
    ) -> None:
        self._state = state
        self._runner = runner
        self._communicator = communicator
        self._rank, self._world_size = control.rank, control.world_size
        self._record = CommitRecord(control, timeout_s)
        self._timeout_s = timeout_s
        self._commit_timeout_s = commit_timeout_s
        self._pace = None if bytes_per_s is None else Pace(bytes_per_s)
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arriving: Ready | None = None
        self._key = _go(0)  # the one that the thread is at
        self._began = time.monotonic()  # the transfer that it is at
        self._furthest = 0  # the step that it is at
        self._bursts_between_questions = (
            1 << 30 if self._pace is None else max(1, round(_CANCEL_WITHIN_S / self._pace.burst_s))
        )
        self._thread = threading.Thread(target=self._work, name="eplb rearrangement", daemon=True)

    @property
    def working(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    def begin(self, engine_stream: torch.cuda.Stream | None) -> None:
        """Start the thread, behind what is queued on the engine's stream."""
        if self._stream is not None:
            self._stream.wait_stream(engine_stream or torch.cuda.current_stream(self._device))
        self._communicator.set_stream(self._stream)
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the end of the thread, if it was started."""
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _work(self) -> None:
        number = 0
        try:
            if self._stream is not None:
                torch.cuda.set_device(self._device)
            self._communicator.trust_matching(True)
            try:
                for number, step in enumerate(self._state.steps):
                    self._key, self._furthest = _go(number), number
                    if not self._may_go(number) or not self._receive(number, step):
                        break
                    self._forget(number)
            finally:
                self._communicator.trust_matching(False)
        except BaseException as error:  # noqa: BLE001 - it belongs to the engine's thread
            self._fail(number, error)
        finally:
            with self._state.changed:
                self._state.changed.notify_all()

    def _may_go(self, number: int) -> bool:
        """Wait until this rank and all others can receive step `number`; return False if the job ends here."""
        self._await_room(number)
        heard: dict[int, tuple[int, float]] = {}

        def silent() -> TransferError | None:
            """Return an error if a rank that is missing shows no sign of life."""
            now = time.monotonic()
            lost = []
            for rank in self._record.missing(_go(number)):
                beats = self._record.beats(rank)
                if rank not in heard or heard[rank][0] != beats:
                    heard[rank] = beats, now
                elif now - heard[rank][1] > self._timeout_s:
                    lost.append(rank)
            if not lost:
                return None
            ranks = ranks_text(lost)
            text = f"{ranks} showed no sign of life for {self._timeout_s:g} s"
            return TransferTimeoutError(text, peers=lost, phase="go")

        if not self._goes_on(_go(number), silent):
            return False
        if not self._has_room(number):
            raise TransferError("the job went on although it was to be cancelled", phase="go", peers=[self._rank])
        return True

    def _await_room(self, number: int) -> None:
        """Wait until this rank can receive a step, or the job ends. The other ranks see that it is alive."""
        deadline = time.monotonic() + self._commit_timeout_s
        asked = 0.0
        with self._state.changed:
            while not (self._state.cancelling or self._state.stopped) and not self._has_room(number):
                now = time.monotonic()
                if self._state.abandoned is not None:
                    raise self._state.abandoned
                if now > deadline:
                    raise TransferError(
                        f"rank {self._rank} has not committed what was ready within {self._commit_timeout_s:g} s",
                        phase="commit",
                        usable=True,
                        remedy="commit what ready_layers() returns, or give a longer commit_timeout_s",
                    )
                if now - asked > _BEAT_S:
                    asked = now
                    self._record.beat()
                    if self._record.flag(CANCEL):
                        return
                self._state.changed.wait(0.02)

    def _goes_on(self, key: str, watch: Callable[[], TransferError | None] | None = None) -> bool:
        """Ask all ranks whether to go on; return False if one of them has cancelled the job."""
        began = time.perf_counter()
        decision = self._record.decide(
            key,
            lambda: STOP if self._record.flag(CANCEL) else COMMIT,
            watch=watch,
            interrupted=self._abandoned,
        )
        with self._state.changed:
            self._state.times.add("decide", time.perf_counter() - began)
            if decision.outcome == STOP:
                self._state.stopped = True
                self._state.changed.notify_all()
        if decision.aborted:
            raise error_of(decision, self._rank, usable=decision.usable)
        return decision.outcome == COMMIT

    def _abandoned(self) -> TransferError | None:
        return self._state.abandoned

    def _has_room(self, number: int) -> bool:
        """Whether the step's part of the window is free, and what it sends from is committed here."""
        previous = number - len(self._state.parts)
        if previous >= 0 and previous not in self._state.committed:
            return False
        step = self._state.steps[number]
        waiting = (n for n in range(number) if n not in self._state.committed)
        return not any(self._runner.depends(step, self._state.steps[earlier]) for earlier in waiting)

    def _receive(self, number: int, step: Step) -> bool:
        """Receive a step on all ranks; return False if the job was cancelled meanwhile."""
        part = self._state.parts[number % len(self._state.parts)]
        began = time.perf_counter()
        if self._stream is not None:
            with self._state.changed:
                events = [event for event in self._state.last_commit.values() if event is not None]
            for event in events:
                self._stream.wait_event(event)
        for index, burst in enumerate(self._bursts(step)):
            if index and index % self._bursts_between_questions == 0:
                self._key = _going_on(number, index)
                if not self._goes_on(self._key):
                    return False
            nbytes = self._runner.incoming_slices(step, burst)
            if self._pace is not None:
                # A rank that has abandoned the job stays for the bursts that the others are in, and says so afterwards.
                self._pace.wait(nbytes, self._abandoned)
            self._began = time.monotonic()
            stats = self._runner.transfer_slices(step, burst, part).wait()
            with self._state.changed:
                self._state.received_bytes += nbytes
                if stats is not None:
                    self._state.times.paths.update(stats.paths)
                    for phase, seconds in stats.phases.items():
                        self._state.times.add(phase, seconds)
        self._key = _have(number)
        self._arriving = Ready(number, part, mark(self._device, self._stream), began)
        decision = self._record.decide(self._key, interrupted=self._abandoned)
        if decision.aborted:
            raise error_of(decision, self._rank, usable=decision.usable)
        self._arrived()
        return True

    def _bursts(self, step: Step) -> list[list[Slice]]:
        limit = self._runner.largest_share(step) if self._pace is None else self._pace.burst_bytes
        return self._runner.bursts(step, max(1, limit))

    def _arrived(self) -> None:
        """All ranks have the step that this rank has received last."""
        with self._state.changed:
            if self._arriving is not None:
                self._state.ready.append(self._arriving)
                self._arriving = None
            self._state.changed.notify_all()

    def _forget(self, number: int) -> None:
        """Remove records that no rank will read again: all ranks have gone past the step before."""
        if number and number % self._world_size == self._rank:
            bursts = range(0, len(self._bursts(self._state.steps[number - 1])), self._bursts_between_questions)
            for key in (_go(number - 1), _have(number - 1), *(_going_on(number - 1, i) for i in bursts if i)):
                self._record.forget(key)

    def records(self) -> list[str]:
        """Return the keys that may be left at the store when the job has ended on all ranks."""
        last = max(0, len(self._state.steps) - 1)
        questions = [_go(last), _have(last), _go(last + 1)]
        for number in range(len(self._state.steps)):
            if number >= self._furthest - 1:
                bursts = range(0, len(self._bursts(self._state.steps[number])), self._bursts_between_questions)
                questions += [_go(number), _have(number), *(_going_on(number, i) for i in bursts if i)]
        return questions

    def _fail(self, number: int, error: BaseException) -> None:
        """Tell the other ranks, at the first key that is not decided, and keep the error."""
        raised = error
        try:
            with self._record.last_words(time.monotonic() - self._began):
                raised = self._settle_failure(number, error)
        except ControlPlaneError as gone:
            if self._arriving is not None:  # all ranks may have said that they have it
                with self._state.changed:
                    self._state.unknown.add(self._arriving.number)
            raised = DecisionUnknownError(
                "the store that carries the commit records is gone",
                phase="commit",
                why=gone.what,
                remedy="let torchrun, or another process that outlives the ranks, host the store",
            )
        self._state.fail(raised)

    def _settle_failure(self, number: int, error: BaseException) -> BaseException:
        """Return what to raise: `error`, or one that names who is really to blame."""
        # As far as `_receive` asks, and not further: an answer to a question that nobody asks is never read.
        between = range(self._bursts_between_questions, len(self._bursts(self._state.steps[number])))
        later = [_going_on(number, i) for i in between if i % self._bursts_between_questions == 0]
        keys = [_go(number), *later, _have(number), _go(number + 1)]
        for key in keys[keys.index(self._key) :]:
            decision = self._record.abort(key, error)
            if decision.aborted:
                return who_is_to_blame(error, decision, self._rank)
            if key == _have(number):
                self._arrived()  # all ranks had said so, this one too: it can be committed
        return error


def _go(number: int) -> str:
    return f"going on with step {number}"


def _going_on(number: int, burst: int) -> str:
    return f"going on with step {number} at burst {burst}"


def _have(number: int) -> str:
    return f"receiving step {number}"
