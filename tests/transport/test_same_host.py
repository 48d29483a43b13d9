"""What tells whether two processes are on one host."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from eplb_core.transport import HostIdentity


def test_it_is_what_the_system_says() -> None:
    here = HostIdentity.here()
    assert here.boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert (here.name, here.pid_namespace) == (socket.gethostname(), Path("/proc/self/ns/pid").stat().st_ino)


def test_it_is_the_same_wherever_it_is_asked_in_a_process() -> None:
    with ThreadPoolExecutor(2) as threads:
        assert set(threads.map(lambda _: HostIdentity.here(), range(2))) == {HostIdentity.here()}


def test_what_reaches_one_another_over_loopback_has_a_kernel_and_a_network_namespace_in_common() -> None:
    here = HostIdentity.here()
    assert len(here.loopback) == 24
    assert replace(here, name="a", pid_namespace=1).loopback == here.loopback
    assert replace(here, net_namespace=here.net_namespace + 1).loopback != here.loopback
    assert replace(here, boot="00000000-0000-0000-0000-000000000001").loopback != here.loopback


def test_a_system_that_tells_nothing_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(os, "stat", refuse)
    unknown = HostIdentity.here()
    assert (unknown.boot, unknown.pid_namespace, unknown.net_namespace) == ("", 0, 0)
    assert len(unknown.loopback) == 24
