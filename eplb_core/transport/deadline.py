"""Waits with a deadline: for a condition to poll, and for native calls that take no timeout."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

_SPIN_S = 200e-6  # most small transfers end within this; sleeping would double their time
_LONGEST_SLEEP_S = 1e-3


def wait_until(done: Callable[[], bool], timeout_s: float) -> bool:
    """Return True once `done()` does, or False if it still does not after `timeout_s` seconds.

    It polls without a pause at first and then sleeps ever longer between polls, a millisecond at most.
    """
    began = time.monotonic()
    pause = 20e-6
    while not done():
        waited = time.monotonic() - began
        if waited >= timeout_s:
            return done()
        if waited > _SPIN_S:
            time.sleep(min(pause, timeout_s - waited))
            pause = min(1.5 * pause, _LONGEST_SLEEP_S)
    return True


def call_within(timeout_s: float, call: Callable[[], Result]) -> Result:
    """Return what `call()` returns, or raise what it raises, within `timeout_s` seconds.

    The call runs in a new thread, since a native library cannot be interrupted. A call that does not return stays in
    that thread, which does not keep the process from exiting. Devices, streams and modes that torch keeps per thread
    must be set inside the call.

    Raises:
        TimeoutError: it has not returned.
    """
    returned: list[Result] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(call())
        except BaseException as error:  # noqa: BLE001 - it belongs to the caller's thread
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True, name="eplb call with a deadline")
    thread.start()
    thread.join(timeout_s)
    if raised:
        raise raised[0]
    if returned:
        return returned[0]
    raise TimeoutError(f"it did not return within {timeout_s:g} s")
