"""Delivers events to hooks on a separate thread, so that a slow or stuck hook cannot delay a transfer.

The transfer puts an event into a bounded queue and goes on. Order is kept; events that do not fit are counted and
dropped. The thread starts with the first event that has a listener.
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
"""The most events that may wait for hooks in a process; further ones are dropped."""

EXIT_S: Final = 1.0
"""How long the interpreter waits at exit for undelivered events, in seconds."""

Listener = tuple[str, Callable[..., Any]]
"""A plugin's name, and a function that calls one of its hooks."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Told:
    """One event on its way to the listeners that existed when it happened."""

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
        # Reentrant: a signal handler or a finaliser may put an event while this thread holds it.
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[_Told] = deque()
        self._taken = 0
        self._done = 0
        self._running = ""
        self._running_since = 0.0
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, hook: str, event: Event, listeners: Sequence[Listener]) -> None:
        """Queue the event for `listeners`. Never raises and never waits; drops the event if the queue is full."""
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
                "hooks do not keep up: %d events are waiting, and further ones are dropped silently; "
                "%s has been running for %.1f s",
                self._limit,
                running or "nothing",
                seconds,
            )

    def flush(self, timeout_s: float) -> bool:
        """Wait until all events queued so far are delivered; return whether they are.

        On the thread that calls the hooks it returns at once.
        """
        if self._thread is threading.current_thread():
            return False
        with self._changed:
            last = self._taken
            return self._changed.wait_for(lambda: self._done >= last, timeout_s)

    def close(self) -> None:
        """Refuse further events, and let the thread end once the queue is empty. Does not wait."""
        if os.getpid() != self._process:
            return  # in a forked child, the copy of the lock may be held by a thread that does not exist
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
        """Before the interpreter exits: deliver waiting events and end the thread, if the hooks allow it in time."""
        thread = self._thread
        if thread is None or os.getpid() != self._process:
            return  # the thread and the queue belong to the parent
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
