"""Events reach hooks in order and on a thread of their own; whatever a hook does, who moves weights goes on."""

from __future__ import annotations

import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from eplb_core.errors import HandshakeError, PeerLostError, TransferTimeoutError
from eplb_core.hooks import (
    HookSpecifications,
    PluginHost,
    RearrangeFailed,
    RearrangeFinished,
    RearrangeStarted,
    StepCommitted,
    TransferFailed,
    TransferStarted,
    hookimpl,
)
from eplb_core.hooks.events import HOOK_OF_EVENT, Event, detached
from tests.support.fake_distributions import run_child

WAIT_S = 20.0
RANK: dict[str, Any] = {"backend": "rail", "rank": 1, "world_size": 4}
TRAFFIC: dict[str, Any] = {**RANK, "bytes_sent": 10, "bytes_received": 20, "messages": 3}


def started(number: int) -> TransferStarted:
    return TransferStarted(**{**TRAFFIC, "messages": number})


def listener(hear: Callable[[Any], object], hook: str = "eplb_transfer_started") -> object:
    """Return a plugin with one hook."""

    def implementation(event: object) -> None:
        hear(event)

    implementation.__name__ = hook
    return type("Plugin", (), {hook: staticmethod(hookimpl(implementation))})()


def host_with(*plugins: object, event_limit: int = 100) -> PluginHost:
    host = PluginHost("eplb.plugins.of-nobody", event_limit=event_limit)
    for number, plugin in enumerate(plugins):
        host.register(plugin, f"plugin {number}")
    return host


class Gate:
    """A hook that waits, in its first event, until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.heard: list[int] = []

    def __call__(self, event: TransferStarted) -> None:
        self.entered.set()
        assert self.opened.wait(WAIT_S)
        self.heard.append(event.messages)


def hook_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "eplb hooks"]


# --- order, and who is waited for -------------------------------------------------------------------------------------


def test_events_of_rearrangements_reach_the_hooks_of_their_names() -> None:
    events: list[Event] = [
        RearrangeStarted(**RANK, bytes_to_receive=5, bytes_to_send=6, steps=2, layers=3),
        StepCommitted(**RANK, step=0, steps=2, layers=(0, 2), bytes_received=5, peers=(0, 3), seconds=0.25),
        RearrangeFinished(**RANK, seconds=1.0, moved=7, bytes_received=5, steps=2, phases={"read": 0.5}),
        RearrangeFailed(**RANK, error=PeerLostError("rank 2 is gone", peers=[2]), seconds=1.0, step=1),
    ]
    heard: list[tuple[str, object]] = []
    hooks = [HOOK_OF_EVENT[type(event)] for event in events]
    host = host_with(*(listener(lambda event, hook=hook: heard.append((hook, event)), hook) for hook in hooks))
    for event in events:
        host.notify(event)
    assert host.flush(WAIT_S)
    assert heard == list(zip(hooks, events, strict=True))


def test_every_event_has_a_hook_and_every_hook_of_events_an_event() -> None:
    with_event = {
        name for name, spec in vars(HookSpecifications).items() if "event" in getattr(spec, "__annotations__", {})
    }
    assert set(HOOK_OF_EVENT.values()) == with_event


def test_who_tells_does_not_wait_for_a_hook_and_order_is_kept() -> None:
    gate = Gate()
    host = host_with(listener(gate))
    for number in range(50):
        host.notify(started(number))
    assert gate.entered.wait(WAIT_S)
    assert gate.heard == []
    gate.opened.set()
    assert host.flush(WAIT_S)
    assert gate.heard == list(range(50))


def test_events_of_several_threads_all_arrive_each_threads_in_order() -> None:
    heard: list[int] = []
    host = host_with(listener(lambda event: heard.append(event.messages)), event_limit=1000)
    threads = [
        threading.Thread(target=lambda first=first: [host.notify(started(first + n)) for n in range(100)])
        for first in (0, 1000, 2000, 3000)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert host.flush(WAIT_S)
    for first in (0, 1000, 2000, 3000):
        assert [number for number in heard if first <= number < first + 1000] == list(range(first, first + 100))


def test_of_more_events_than_may_wait_the_later_ones_are_dropped_and_counted_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = Gate()
    host = host_with(listener(gate), event_limit=10)
    host.notify(started(0))
    assert gate.entered.wait(WAIT_S)
    for number in range(1, 31):
        host.notify(started(number))
    assert host.events_dropped == 20
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith("hooks do not keep up: 10 events are waiting, and further ones are dropped")
    assert "eplb_transfer_started of plugin plugin 0 has been running for" in caplog.messages[0]
    gate.opened.set()
    assert host.flush(WAIT_S)
    assert gate.heard == list(range(11))


def test_flush_says_that_a_hook_has_not_returned() -> None:
    gate = Gate()
    host = host_with(listener(gate))
    host.notify(started(0))
    assert not host.flush(0.01)
    gate.opened.set()
    assert host.flush(WAIT_S)


def test_a_hook_that_flushes_does_not_wait_for_itself() -> None:
    answers: list[bool] = []
    host = host_with(listener(lambda event: answers.append(host.flush(WAIT_S))))
    host.notify(started(0))
    assert host.flush(WAIT_S)
    assert answers == [False]


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_hook_that_raises_is_logged_once_and_the_others_hear_everything(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[int] = []

    def fail(event: object) -> None:
        raise kind("the metrics server is gone")

    host = host_with(listener(fail), listener(lambda event: heard.append(event.messages)))
    with caplog.at_level(logging.ERROR):
        for number in range(5):
            host.notify(started(number))
        assert host.flush(WAIT_S)
    assert heard == list(range(5))
    assert caplog.messages == ["eplb_transfer_started of plugin plugin 0 failed; further failures are not logged"]


# --- the thread -------------------------------------------------------------------------------------------------------


def test_there_is_no_thread_where_nobody_listens() -> None:
    before = hook_threads()
    host = host_with(listener(print, "eplb_transfer_finished"))
    host.notify(started(0))
    assert not host.listens(TransferStarted)
    assert hook_threads() == before
    assert host.flush(0)


def test_the_thread_ends_with_its_host() -> None:
    before = hook_threads()
    host = host_with(listener(lambda event: None))
    host.notify(started(0))
    (thread,) = set(hook_threads()) - set(before)
    del host
    gc.collect()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_a_forked_child_tells_of_its_own_events_and_not_of_its_parents() -> None:
    gate = Gate()
    host = host_with(listener(gate))
    host.notify(started(0))
    assert gate.entered.wait(WAIT_S)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        gate.opened.set()
        host.notify(started(7))
        told = host.flush(WAIT_S)
        os.write(theirs, repr((told, gate.heard)).encode())
        os._exit(0)
    os.close(theirs)
    answer = os.read(ours, 1000)
    os.close(ours)
    os.waitpid(child, 0)
    gate.opened.set()
    assert answer == b"(True, [7])"
    assert host.flush(WAIT_S)
    assert gate.heard == [0]


# --- exit -------------------------------------------------------------------------------------------------------------

_PROGRAM = """
import os, sys, threading, time
from eplb_core.hooks import PluginHost, TransferStarted, hookimpl

class Plugin:
    @hookimpl
    def eplb_transfer_started(self, event):
        {body}
        print("heard", event.messages, flush=True)

host = PluginHost()
host.register(Plugin(), "mine")
for number in range(3):
    host.notify(TransferStarted(backend="x", rank=0, world_size=1, bytes_sent=0, bytes_received=0, messages=number))
{end}
print("done", flush=True)
"""


def test_events_that_wait_when_the_interpreter_exits_are_delivered() -> None:
    child = run_child(["-c", _PROGRAM.format(body="time.sleep(0.05)", end="")])
    assert (child.returncode, child.stderr) == (0, "")
    assert sorted(child.stdout.splitlines()) == ["done", "heard 0", "heard 1", "heard 2"]


def test_a_hook_that_never_returns_does_not_keep_the_interpreter_from_exiting() -> None:
    child = run_child(["-c", _PROGRAM.format(body="threading.Event().wait()", end="")])
    assert (child.returncode, child.stdout, child.stderr) == (0, "done\n", "")


def test_with_nothing_waiting_the_interpreter_exits_as_ever() -> None:
    child = run_child(["-c", _PROGRAM.format(body="", end="assert host.flush(20)")])
    assert (child.returncode, child.stdout, child.stderr) == (0, "heard 0\nheard 1\nheard 2\ndone\n", "")


def test_a_forked_child_exits_without_waiting_for_its_parents_hooks() -> None:
    end = "pid = os.fork()\nif pid == 0: sys.exit(0)\nassert os.waitpid(pid, 0)[1] == 0"
    child = run_child(["-c", _PROGRAM.format(body="threading.Event().wait()", end=end)])
    assert (child.returncode, child.stdout, child.stderr) == (0, "done\n", "")


# --- what events hold -------------------------------------------------------------------------------------------------


class Stubborn(Exception):  # noqa: N818 - named for what it does
    """An exception that can only be made in one way."""

    def __new__(cls, reason: str, *, code: int) -> Stubborn:
        return super().__new__(cls, reason)

    def __init__(self, reason: str, *, code: int) -> None:
        super().__init__(reason)
        self.code = code


class Weights:
    """Stands for a tensor that a frame of a failed transfer holds."""


def test_an_event_keeps_nothing_of_a_failed_transfer_alive() -> None:
    def transfer() -> weakref.ref[Weights]:
        weights = Weights()
        try:
            try:
                raise ConnectionError("no route")
            except ConnectionError as cause:
                raise TransferTimeoutError("rank 2 did not come", peers=[2]) from cause
        except TransferTimeoutError as error:
            error.placement = np.zeros((1, 1), np.int64)
            error.weights = weights  # type: ignore[attr-defined]
            heard.append(TransferFailed(**TRAFFIC, error=error))
            heard.append(RearrangeFailed(**RANK, error=error, seconds=1.0, step=0))
        return weakref.ref(weights)

    heard: list[Any] = []
    weights = transfer()
    gc.collect()
    assert weights() is None
    for event in heard:
        assert type(event.error) is TransferTimeoutError
        assert (event.error.__traceback__, event.error.__cause__, event.error.placement) == (None, None, None)
        assert (event.error.peers, event.error.what) == ((2,), "rank 2 did not come")


def test_the_thread_keeps_no_event_once_it_was_told() -> None:
    host = host_with(listener(lambda event: None))
    event = TransferFailed(**TRAFFIC, error=Stubborn("x", code=1))
    host.register(listener(lambda event: None, "eplb_transfer_failed"), "failed")
    error = weakref.ref(event.error)
    host.notify(event)
    assert host.flush(WAIT_S)
    del event
    gc.collect()
    assert error() is None


@pytest.mark.parametrize(
    "error",
    [
        ValueError("plain"),
        OSError(2, "No such file or directory", "weights.bin"),
        KeyError("layer 3"),
        PeerLostError("rank 1 is gone", peers=[1], phase="read", remedy="restart it"),
        HandshakeError("ranks differ", table={"window": ["1 MiB", "2 MiB"]}),
        Stubborn("no way", code=5),
        ValueError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_detached_error_has_the_class_and_the_text_of_the_error(error: Exception) -> None:
    copy = detached(error)
    assert copy is not error
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_of_an_argument_that_is_no_plain_value_only_the_type_is_kept() -> None:
    assert detached(ValueError("bad row", np.zeros(3))).args == ("bad row", "<ndarray>")


def test_phases_that_change_later_do_not_change_the_event() -> None:
    phases = {"read": 1.0}
    event = RearrangeFinished(**RANK, seconds=1.0, moved=1, bytes_received=1, steps=1, phases=phases)
    phases["read"] = 2.0
    assert event.phases == {"read": 1.0}
