"""A process that used NIXL comes to its end where rdma-core is installed, and two libnl are in it."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from eplb_backends.nixl.netlink import SYSTEM_LIBRARY, entangled_libraries, loaded_libraries
from eplb_core.registry.config import parse_config
from eplb_core.registry.probe import run_probe
from eplb_core.registry.registry import Registry

pytest.importorskip("nixl")

OWN, EFA, SYSTEM = (
    "/env/nixl_cu13.libs/libnl-route-3-3ad497a3.so.200.26.0",
    "/lib/libefa.so.1",
    "/lib/libnl-route-3.so.200",
)


def can_load(name: str) -> bool:
    """Whether a new process can load a library; this one is left as it is."""
    tried = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({name!r})"]
    return subprocess.run(tried, stderr=subprocess.DEVNULL, check=False, timeout=60).returncode == 0


with_rdma_core = pytest.mark.skipif(
    not (can_load("libefa.so.1") and can_load(SYSTEM_LIBRARY)), reason="rdma-core (libefa, libnl) is not installed"
)


def run(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False, timeout=100)


AN_AGENT = """
import torch
from eplb_backends.nixl.agent import Agent
agent = Agent("rank0", torch.device("cpu"), progress_thread=False)
"""
AN_AGENT_OF_SOMEBODY_ELSE = """
from nixl._api import nixl_agent, nixl_agent_config
other = nixl_agent("other", nixl_agent_config(backends=["UCX"]))
"""
THE_LIBRARIES = """
from pathlib import Path
from eplb_backends.nixl.netlink import loaded_libraries
print(*(Path(path).name for path in loaded_libraries()))
"""


@with_rdma_core
@pytest.mark.parametrize("closes", [True, False])
def test_a_process_that_used_nixl_exits_with_0(closes: bool) -> None:
    ended = run(AN_AGENT + THE_LIBRARIES + ("agent.close()\n" if closes else ""))
    assert ended.returncode == 0, ended.stderr
    assert "libnl-route-3.so.200" in ended.stdout.split()


@with_rdma_core
def test_nixl_may_have_been_imported_before_as_long_as_it_made_no_agent() -> None:
    ended = run("import nixl._api" + AN_AGENT + AN_AGENT_OF_SOMEBODY_ELSE)
    assert ended.returncode == 0, ended.stderr


@with_rdma_core
def test_where_somebody_else_made_an_agent_first_the_log_tells_the_danger_and_the_remedy() -> None:
    """Not asserted: that the process crashes. Another wheel may have no libnl of its own."""
    ended = run(AN_AGENT_OF_SOMEBODY_ELSE + THE_LIBRARIES + AN_AGENT)
    if not any(name.startswith("libnl-route-3-") for name in ended.stdout.split()):
        pytest.skip("this build of NIXL brings no libnl")
    assert "the process may end with SIGSEGV" in ended.stderr
    assert f'call ctypes.CDLL("{SYSTEM_LIBRARY}") before the first NIXL agent' in ended.stderr


@with_rdma_core
def test_the_remedy_that_the_log_gives_works() -> None:
    ended = run(f'import ctypes; ctypes.CDLL("{SYSTEM_LIBRARY}")' + AN_AGENT_OF_SOMEBODY_ELSE + AN_AGENT)
    assert (ended.returncode, "SIGSEGV" in ended.stderr) == (0, False), ended.stderr


@with_rdma_core
def test_the_probe_of_nixl_finds_nothing_to_warn_of() -> None:
    result = run_probe(Registry().select(parse_config("nixl")), "cpu")
    assert (result.available, result.warning) == (True, ""), result.reason


@pytest.mark.parametrize(
    ("loaded", "entangled"),
    [
        ([OWN, EFA, SYSTEM], (OWN, SYSTEM)),
        ([SYSTEM, OWN, EFA], None),  # kept apart
        ([OWN, SYSTEM, EFA], None),  # by somebody else, after a first agent without EFA
        ([EFA, SYSTEM, OWN], None),  # NCCL or Mooncake came first
        ([OWN], None),
        ([SYSTEM, EFA], None),  # NIXL built for the system
        ([], None),
    ],
)
def test_libraries_are_entangled_only_where_the_systems_came_with_ucx_after_the_wheels(
    loaded: list[str], entangled: tuple[str, str] | None
) -> None:
    assert entangled_libraries(loaded) == entangled


def test_the_libraries_of_this_process_are_found() -> None:
    ctypes.CDLL(None)
    assert any("libc.so" in path for path in loaded_libraries())


def test_threads_may_make_their_first_agents_at_the_same_moment() -> None:
    """The loader's lock and Python's were once taken in both orders."""
    source = """
import threading, torch
from eplb_backends.nixl.netlink import keep_apart, loaded_libraries
def look():
    for _ in range(300):
        keep_apart(), loaded_libraries()
threads = [threading.Thread(target=look) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    assert run(source).returncode == 0
