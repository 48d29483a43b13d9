"""Waiting ends: with an answer, with an error, or at the deadline."""

from __future__ import annotations

import threading
import time

import pytest

from eplb_core.transport.deadline import call_within, wait_until


def test_wait_until_returns_as_soon_as_it_is_done() -> None:
    answers = iter([False, False, True])
    assert wait_until(lambda: next(answers), 60.0)


def test_wait_until_gives_up_at_the_deadline() -> None:
    began = time.monotonic()
    assert not wait_until(lambda: False, 0.05)
    assert time.monotonic() - began >= 0.05


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
def test_wait_until_asks_once_even_if_no_time_is_left(timeout_s: float) -> None:
    assert wait_until(lambda: True, timeout_s)
    assert not wait_until(lambda: False, timeout_s)


def test_call_within_returns_what_the_call_returns() -> None:
    assert call_within(60.0, lambda: 7) == 7
    assert call_within(60.0, lambda: None) is None


def test_call_within_raises_what_the_call_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        call_within(60.0, lambda: 1 // 0)


def test_call_within_leaves_a_call_that_hangs_behind() -> None:
    release = threading.Event()
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
        call_within(0.05, release.wait)
    release.set()
