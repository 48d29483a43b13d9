"""How a fault strikes, inside the process that it is meant for."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from eplb_core.control.commit_record import CommitRecord
from eplb_core.control.journal_record import JournalRecord
from eplb_core.rearrange.step_runner import StepRunner
from eplb_core.testing.campaign.plan import LEAVING, Fault

_MOMENTS: dict[str, tuple[tuple[type, str], ...]] = {
    "transfer": ((StepRunner, "transfer"),),
    "decide": ((CommitRecord, "decide"), (JournalRecord, "decide")),
    "settle": ((CommitRecord, "settle"), (JournalRecord, "abort")),
    "commit": ((StepRunner, "commit"),),
}
_IN_A_JOB = {"transfer": "transfer_slices"}
_SLOW_S = 0.05


class EngineError(Exception):
    """What the engine's own code raises in a campaign."""


class Strike:
    """The fault of this process in one trial.

    Args:
        fault: it, or None.
        usual_s: how long a rearrangement usually takes, in seconds.
        store_host: the process that hosts the store.
        background: whether the trial is a job.
    """

    def __init__(self, fault: Fault | None, usual_s: float, store_host: int, background: bool) -> None:
        self._fault = fault
        self._usual_s = usual_s
        self._store_host = store_host
        self._background = background
        self._left = 0 if fault is None else int(fault.after)
        self._interruptible = False
        self.struck = False

    @property
    def raises(self) -> tuple[type[BaseException], ...]:
        """What the fault itself raises in the engine."""
        kind = "" if self._fault is None else self._fault.kind
        return {"interrupt": (KeyboardInterrupt,), "error": (EngineError,)}.get(kind, ())

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Let the fault strike inside the block."""
        fault = self._fault
        if fault is None or fault.kind == "none":
            yield
        elif fault.kind == "slow":
            with self._before("transfer", self._dawdle):
                yield
        elif fault.moment == "time":
            timer = threading.Timer(fault.after * self._usual_s, self._strike)
            timer.daemon = True
            with self._taking_interrupts():
                timer.start()
                try:
                    yield
                finally:
                    timer.cancel()
        elif fault.moment == "engine":
            with self._taking_interrupts():
                yield
        else:
            with self._taking_interrupts(), self._before(fault.moment, self._count_down):
                yield

    def in_the_engine(self) -> None:
        """Strike here, if this is the moment: the engine's code calls it after each step, or in its loop."""
        if self._fault is not None and self._fault.moment == "engine" and self._fault.kind not in ("none", "slow"):
            self._count_down()

    def calm(self) -> None:
        """Let nothing interrupt from here on."""
        self._interruptible = False

    @property
    def is_still_to_leave(self) -> bool:
        """Whether the fault of this process is its end, and has not struck."""
        return self._fault is not None and self._fault.kind in LEAVING and not self.struck

    def leave(self) -> None:
        """Leave all the same: it was too quick for its fault."""
        self._strike()
        self.struck = False

    def _count_down(self) -> None:
        self._left -= 1
        if self._left < 0 and not self.struck:
            self._strike()

    def _dawdle(self) -> None:
        self.struck = True
        time.sleep(_SLOW_S)

    def _strike(self) -> None:
        self.struck = True
        kind = "" if self._fault is None else self._fault.kind
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind in ("stop", "zombie"):
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        elif kind == "error":
            raise EngineError("the engine has a fault of its own")
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._store_host, signal.SIGKILL if kind == "store killed" else signal.SIGSTOP)

    @contextlib.contextmanager
    def _taking_interrupts(self) -> Iterator[None]:
        def interrupt(_signal: int, _frame: FrameType | None) -> None:
            if self._interruptible:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, interrupt)
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def _before(self, moment: str, do: Callable[[], None]) -> Iterator[None]:
        """Call `do` before each time that this process does what the moment says."""

        def first(done: Callable[..., Any]) -> Callable[..., Any]:
            def doing(*arguments: Any, **more: Any) -> Any:
                do()
                return done(*arguments, **more)

            return doing

        names = [(owner, _IN_A_JOB.get(name, name) if self._background else name) for owner, name in _MOMENTS[moment]]
        kept = [(owner, name, getattr(owner, name)) for owner, name in names]
        for owner, name, done in kept:
            setattr(owner, name, first(done))
        try:
            yield
        finally:
            for owner, name, done in kept:
                setattr(owner, name, done)


class StallClock:
    """How long this process did not get to run: on a machine that is busy, deadlines are that much later."""

    _TICK_S = 0.02
    _USUAL_S = 0.06

    def __init__(self) -> None:
        self.stalled_s = 0.0
        threading.Thread(target=self._tick, name="stall clock", daemon=True).start()

    def _tick(self) -> None:
        while True:
            began = time.monotonic()
            time.sleep(self._TICK_S)
            took = time.monotonic() - began
            if took > self._USUAL_S:
                self.stalled_s += took - self._TICK_S
