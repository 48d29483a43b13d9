"""Connections to a store of another process, which is stopped, continued and killed."""

from __future__ import annotations

import datetime
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist

from eplb_core.control import store_connection
from eplb_core.control.plane import ControlPlane
from eplb_core.control.store_connection import connect
from eplb_core.errors import ControlPlaneError
from eplb_core.launch.rank_process import start_rank

SHORT_S, LONG_S = 0.5, 30.0


def host_a_store(pipe: Connection) -> None:
    """Tell the port of a new store, and keep it until the other end of the pipe is closed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    pipe.poll(None)


class Host:
    """A process that hosts a store."""

    def __init__(self) -> None:
        self._process, self._pipe = start_rank(host_a_store, (), "host of a store")
        self.store = dist.TCPStore(
            "127.0.0.1",
            self._pipe.recv(),
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=600),
        )

    def signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)
        if number == signal.SIGSTOP:  # it is delivered to one thread after the other
            tasks = Path("/proc", str(self._process.pid), "task")
            while any(stat.read_text().rpartition(")")[2].split()[0] != "T" for stat in tasks.glob("*/stat")):
                time.sleep(0.001)

    def end(self) -> None:
        if self._pipe.closed:
            return
        self._process.kill()
        self._process.join(LONG_S)
        self._process.close()
        self._pipe.close()


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.end()


def control(host: Host, timeout_s: float) -> ControlPlane:
    connection = connect(dist.PrefixStore("test", host.store), timeout_s)
    return ControlPlane(connection.store, 0, 1, connection=connection)


@pytest.mark.parametrize(
    "ask",
    [
        lambda plane: plane.settle("dinner", b"tea"),
        lambda plane: plane.settled("dinner"),
        lambda plane: plane.add("cups", 1),
        lambda plane: plane.fetch(0, "recipe", SHORT_S),
        lambda plane: plane.barrier("dinner", SHORT_S),
    ],
    ids=["settle", "settled", "add", "fetch", "gather"],
)
def test_a_store_whose_process_is_stopped_is_an_error_in_time_and_is_not_asked_again(host: Host, ask: object) -> None:
    """Its late answer would be taken for that to the next question."""
    plane = control(host, SHORT_S)
    plane.add("cups", 1)
    host.signal(signal.SIGSTOP)
    with pytest.raises(ControlPlaneError, match=r"the store .* is gone or does not answer"):
        ask(plane)  # type: ignore[operator]
    host.signal(signal.SIGCONT)
    for _ in range(3):
        with pytest.raises(ControlPlaneError, match=r"the store .* is gone or does not answer"):
            plane.add("cups", 10)
    assert control(host, LONG_S).add("cups", 0) in (1, 2)  # asked once at most


@pytest.mark.parametrize("end", [signal.SIGSTOP, signal.SIGKILL])
def test_no_connection_is_made_to_a_store_that_is_gone(host: Host, end: signal.Signals) -> None:
    host.signal(end)
    if end == signal.SIGKILL:
        host.end()
    began = time.monotonic()
    with pytest.raises(ControlPlaneError, match=r"the store at 127.0.0.1:\d+ is gone"):
        connect(dist.PrefixStore("a", dist.PrefixStore("b", host.store)), SHORT_S)
    assert time.monotonic() - began < LONG_S  # the store's own timeout is 600 s


def test_a_store_that_answers_again_leaves_no_thread_and_lets_others_connect_meanwhile(host: Host) -> None:
    before = threading.enumerate()
    host.signal(signal.SIGSTOP)
    with pytest.raises(ControlPlaneError):
        connect(host.store, SHORT_S)
    left = [thread for thread in threading.enumerate() if thread not in before]
    other = Host()
    try:
        assert control(other, LONG_S).add("cups", 1) == 1
    finally:
        other.end()
    host.signal(signal.SIGCONT)
    for thread in left:
        thread.join(LONG_S)
        assert not thread.is_alive()


def test_a_question_may_take_longer_than_answers_as_long_as_it_says_so(host: Host) -> None:
    plane = control(host, SHORT_S)
    with pytest.raises(ControlPlaneError, match="rank 0 did not answer") as error:
        plane.fetch(0, "recipe", 4 * SHORT_S)
    assert error.value.missing == (0,)
    plane.publish("recipe", b"tea")
    assert plane.fetch(0, "recipe", LONG_S) == b"tea"


def test_another_thread_that_waits_on_the_shared_store_keeps_nobody_from_connecting(host: Host) -> None:
    began = threading.Event()

    def wait() -> None:
        began.set()
        host.store.wait(["supper"], datetime.timedelta(seconds=LONG_S))

    thread = threading.Thread(target=wait)
    thread.start()
    began.wait(LONG_S)
    plane = control(host, LONG_S)
    assert plane.add("cups", 2) == 2
    connect(host.store, LONG_S).store.set("supper", "soup")
    thread.join(LONG_S)
    assert not thread.is_alive()


@pytest.mark.parametrize("kind", ["in memory", "no descriptors are seen"])
def test_a_connection_without_a_known_socket_works_without_a_limit(
    kind: str, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: dist.Store = host.store
    if kind == "in memory":
        store = dist.HashStore()
    else:
        monkeypatch.setattr(store_connection, "_sockets", dict)
    connection = connect(store, SHORT_S)
    assert ControlPlane(connection.store, 0, 1, connection=connection).add("cups", 1) == 1
