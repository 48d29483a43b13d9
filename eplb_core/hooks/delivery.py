"""Delivers events to hooks on one thread of their own, so that a slow hook, or one that never returns, harms nobody.

Whoever moves weights puts an event into a bounded queue and goes on. Order is kept; what does not fit is counted and
dropped. There is no thread before the first event that somebody listens to.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from eplb_core.hooks.events import Event

EVENT_LIMIT: Final = 4096
"""How many events may wait for hooks in a process before further ones are dropped."""

EXIT_S: Final = 1.0
"""How long the interpreter, when it exits, waits for hooks that are still to be told, in seconds."""

Listener = tuple[str, Callable[..., Any]]
"""A plugin's name, and what calls one hook of it."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Told:
    """One event on its way to those who listened when it happened."""

    hook: str
    event: Event
    listeners: Sequence[Listener]


class EventDelivery:
    """A bounded queue of events, and the thread that calls hooks with them. Belongs to the process that made it.

    Args:
        call: calls one hook, `call(hook, listener, event)`, and logs what it raises.
        limit: how many events may wait.
    """

    def __init__(self, call: Callable[[str, Listener, Event], None], limit: int = EVENT_LIMIT) -> None:
        self.dropped = 0
        self._call = call
        self._limit = limit
        self._process = os.getpid()
        # Reentrant: a signal handler, or a finaliser, may tell of something while this thread holds it.
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[_Told] = deque()
        self._taken = 0
        self._done = 0
        self._running = ""
        self._running_since = 0.0
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, hook: str, event: Event, listeners: Sequence[Listener]) -> None:
        """Have `listeners` told. Never raises and never waits; drops the event if too many are waiting."""
        with self._changed:
            if self._closed or not self._started():
                self.dropped += 1
                return
            if len(self._waiting) < self._limit:
                self._waiting.append(_Told(hook, event, listeners))
                self._taken += 1
                self._changed.notify_all()
                return
            self.dropped += 1
            first, running = self.dropped == 1, self._running
            seconds = time.monotonic() - self._running_since
        if first:
            _log.warning(
                "hooks do not keep up: %d events wait, and further ones are dropped without another word; "
                "%s has been running for %.1f s",
                self._limit,
                running or "nothing",
                seconds,
            )

    def flush(self, timeout_s: float) -> bool:
        """Wait until hooks were told of everything that was put so far; return whether that is so.

        On the thread that calls the hooks it returns at once.
        """
        if self._thread is threading.current_thread():
            return False
        with self._changed:
            last = self._taken
            return self._changed.wait_for(lambda: self._done >= last, timeout_s)

    def close(self) -> None:
        """Take no more events, and let the thread end once what is waiting is delivered. Does not wait."""
        if os.getpid() != self._process:
            return  # this is a forked child, and its copy of the lock may be held by a thread that is not there
        atexit.unregister(self._end)
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _started(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="eplb hooks", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads, or the interpreter is about to exit
                return False
            self._thread = thread
            atexit.register(self._end)
        return True

    def _end(self) -> None:
        """Before the interpreter exits: deliver what waits, and end the thread, as far as the hooks allow."""
        thread = self._thread
        if thread is None or os.getpid() != self._process:
            return  # the thread, and what waits, are those of the parent
        ends = time.monotonic() + EXIT_S
        self.close()
        thread.join(max(ends - time.monotonic(), 0.0))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                told = self._waiting.popleft()
            for listener in told.listeners:
                self._running, self._running_since = f"{told.hook} of plugin {listener[0]}", time.monotonic()
                self._call(told.hook, listener, told.event)
            del told  # nothing is kept alive while this waits for the next
            self._running = ""
            with self._changed:
                self._done += 1
                self._changed.notify_all()
