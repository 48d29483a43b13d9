"""What is known to go wrong with NIXL and UCX, and where it is tested that it does not go wrong here.

Each trap was measured, read in the sources, or reported to the projects. "units" is `test_units.py`.

silent tcp: CUDA IPC reads are off without NVLink   here: the environment ...; units: a slow link ... is warned of
silent tcp: ranks in different PID namespaces       units: a link is what the places of both ends allow
silent tcp, or wrong bytes: expandable_segments     here: memory of expandable_segments ...; the first bytes ...
the first READ from a peer costs 12 to 35 ms        here: the page of a peer is read once ... (it warms the way)
descriptors cost 10 us each, nothing merges         test_nixl: joined pieces move the same bytes ...
descriptors must lie in one registration            test_nixl: views and copies of one array ... (every byte is right)
a READ's own notification leaves late               units: every byte arrives ... (only messages of our own are used)
notifications are kept under a few KB               test_nixl: ready carries its addresses in parts ...
notifications of others, and of earlier rounds      test_nixl: messages of another communicator are dropped, strangers
a target that does not poll completes nothing       test_nixl: a waiting rank ..., both settings of progress
the progress thread competes on few cores           test_nixl: a waiting rank leaves the core to others
UCX takes SIGHUP                                    test_nixl: a signal handler of the user goes on to work
exceptions have no common base, states may be ERR   units: whatever nixl raises ...; what a read may still write to ...
a peer that is dead, killed in mid-READ, stopped    test_failure
no abort: a READ may land later                     units: what a read may still write to is kept for good ...
sources must outlive READs of them                  test_nixl: forgotten (every byte is right)
truncated metadata poisons a name                   test_nixl: damaged metadata is an error on every rank ...
a name must not be used twice                       here: an agent has a fresh name ...
peers do not hear of registrations                  test_nixl: registering later (every byte is right)
ucx_error_handling_mode must stay peer              here: an agent ... leaves ucx to its defaults
the order of release                                units: ... released in order; the rest is released when a part fails
an interpreter that ends without close()            test_nixl: a process that leaves without closing exits with 0
other names of the package (ROCm)                   units: nixl is found under its other names
reading while a receive buffer is still copied from units: a slot that is still copied from is not handed out
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eplb_backends.nixl import agent as agent_module
from eplb_backends.nixl import communicator as communicator_module
from eplb_backends.nixl import layout
from eplb_backends.nixl.agent import Agent
from eplb_backends.nixl.communicator import NixlCommunicator
from eplb_backends.nixl.memory import Regions, expandable_segments
from eplb_backends.nixl.messages import Kind, Writer, parse
from eplb_backends.nixl.prepared import LandingPieces
from eplb_backends.nixl.round import Round
from eplb_backends.nixl.selftest import PAGE_BYTES, read_from_every_peer
from eplb_core.contract.payload import Payload
from eplb_core.errors import IntegrityError, TransferError
from eplb_core.transport.pattern import pattern
from eplb_core.transport.queue import TransferQueue
from tests.backends.nixl.test_units import CPU, DESTINATION, SOURCE, TOKEN, MemoryAgent, MemoryPeers, round_of, tensors

# --- how NIXL is loaded and asked ------------------------------------------------------------------------------------


class FakeApi:
    """The part of NIXL's module that an agent is made with; notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def nixl_agent_config(self, **settings: Any) -> object:
        self.asked |= settings
        return None

    def nixl_agent(self, name: str, config: object) -> Any:
        self.asked["name"] = name
        return self

    def create_backend(self, name: str, settings: dict[str, str]) -> None:
        self.asked["backend"] = (name, settings)


@pytest.mark.parametrize("progress_thread", [False, True])
def test_an_agent_has_a_fresh_name_and_leaves_ucx_to_its_defaults(
    progress_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = FakeApi()
    monkeypatch.setattr(agent_module, "_load", lambda device: api)
    names = set()
    for _ in range(2):
        Agent("rank7", CPU, progress_thread=progress_thread)
        names.add(api.asked["name"])
    assert len(names) == 2
    assert all(name.startswith("rank7-") for name in names)
    assert api.asked["backend"] == ("UCX", {})
    assert api.asked["backends"] == []
    assert api.asked["enable_prog_thread"] == progress_thread


def test_the_environment_is_set_before_nixl_loads_and_only_where_the_user_has_not(tmp_path: Path) -> None:
    """The package here says what it saw when it was imported."""
    (tmp_path / "nixl").mkdir()
    (tmp_path / "nixl" / "__init__.py").touch()
    (tmp_path / "nixl" / "_api.py").write_text("import os\nSEEN = dict(os.environ)\n")
    (tmp_path / "child.py").write_text(
        """
import json, os, sys, torch
from eplb_backends.nixl.agent import _load

seen = {"cpu": _load(torch.device("cpu")).SEEN}
sys.modules.pop("nixl._api")
os.environ |= {"UCX_DEBUG_SIGNO": "SIGUSR2", "UCX_TLS": "tcp"}
seen["cuda"] = _load(torch.device("cuda")).SEEN
print(json.dumps(seen))
"""
    )
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("UCX_", "NIXL_"))}
    ran = subprocess.run(
        [sys.executable, "child.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, env=mine
    )
    assert ran.returncode == 0, ran.stderr
    seen = {
        device: {name: value for name, value in environment.items() if name.startswith(("UCX_", "NIXL_"))}
        for device, environment in json.loads(ran.stdout).items()
    }
    assert seen["cpu"] == {"UCX_DEBUG_SIGNO": "0", "NIXL_LOG_LEVEL": "WARN"}
    assert seen["cuda"] == {
        "UCX_DEBUG_SIGNO": "SIGUSR2",
        "UCX_TLS": "tcp",
        "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",
        "NIXL_LOG_LEVEL": "WARN",
    }


# --- memory of expandable_segments -----------------------------------------------------------------------------------


def segment(address: int, nbytes: int, *, expandable: bool, device: int = 0) -> dict[str, Any]:
    """As `torch.cuda.memory_snapshot` describes them."""
    return {"address": address, "total_size": nbytes, "is_expandable": expandable, "device": device, "blocks": []}


def test_only_segments_of_this_device_that_are_mapped_in_chunks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = [
        segment(1000, 100, expandable=True),
        segment(2000, 100, expandable=False),
        segment(3000, 100, expandable=True, device=1),
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: snapshot)
    chunked = expandable_segments(torch.device("cuda", 0))
    assert [chunked.overlap(address, 10) for address in (1000, 1095, 1100, 2000, 3000)] == [True, True] + [False] * 3
    assert not expandable_segments(CPU).overlap(1000, 10)


def unconnected(mode: str) -> NixlCommunicator:
    """A communicator that can register, and nothing else."""
    one = object.__new__(NixlCommunicator)
    one._queue, one._device, one._mode, one._shared = TransferQueue(0, 2, CPU), CPU, mode, None
    one._registered, one._landing, one._agent = Regions(), Regions(), MemoryAgent()  # type: ignore[assignment]
    return one


@pytest.fixture
def plain_and_chunked(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Two tensors, of which the second lies in memory of expandable_segments."""
    both = tensors(1000, 1000)
    regions = Regions()
    regions.add(both[1].data_ptr(), 1000)
    monkeypatch.setattr(communicator_module, "expandable_segments", lambda device: regions)
    return both


@pytest.mark.parametrize("landing", [False, True])
def test_memory_of_expandable_segments_is_packed_with_a_warning(
    landing: bool, plain_and_chunked: list[torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    one = unconnected("auto")
    one.register(plain_and_chunked, landing=landing)
    assert "1 of 2 tensors are in memory of expandable_segments" in caplog.text
    assert [one._registered.contain(each.data_ptr(), 1000) for each in plain_and_chunked] == [True, False]
    assert [one._landing.contain(each.data_ptr(), 1000) for each in plain_and_chunked] == [landing, False]


def test_direct_refuses_memory_of_expandable_segments(plain_and_chunked: list[torch.Tensor]) -> None:
    one = unconnected("direct")
    with pytest.raises(TransferError, match="before the weights are allocated, or use mode=auto") as caught:
        one.register(plain_and_chunked)
    assert (caught.value.usable, caught.value.phase) == (True, "register")
    assert not one._registered.contain(plain_and_chunked[0].data_ptr(), 1000)


# --- the first bytes from a peer -------------------------------------------------------------------------------------


class FirstContact:
    """A round that receives `nbytes` from rank 1, of which nothing is proven, and whose page is `page`."""

    def __init__(self, page: torch.Tensor, nbytes: int) -> None:
        self.page = page
        self.peers = MemoryPeers()
        self.peers.pages = {SOURCE: page.data_ptr()}
        [self.sent], [received] = tensors(nbytes), tensors(nbytes, seed=2)
        landing = Regions()
        landing.add(received.data_ptr(), nbytes)
        self.round: Round = round_of(self.peers, [], [received], Regions(), landing)
        self.round.advance(True)
        digest = layout.incoming({SOURCE: [Payload(self.sent)]}, Regions(), LandingPieces())[SOURCE].digest
        address = np.array([self.sent.data_ptr()] if nbytes else [], np.int64)
        [raw] = Writer(TOKEN, 0).ready(1, 1, digest, address)
        message = parse(TOKEN, raw)
        assert message is not None
        self.round.handle(SOURCE, message)

    def advance_to_the_end(self) -> None:
        while not self.round.ended:
            assert self.round.advance(True)


@pytest.mark.parametrize("nbytes", [0, 100_000])
def test_the_page_of_a_peer_is_read_once_before_a_round_from_it_ends(nbytes: int) -> None:
    first = FirstContact(pattern(PAGE_BYTES, CPU, SOURCE), nbytes)
    first.advance_to_the_end()
    assert first.peers.proven == {SOURCE}
    assert first.peers.page_to_read(SOURCE) is None
    assert first.round.descriptors == ((1, 1) if nbytes else (0, 0))


def test_a_page_that_comes_wrong_is_an_error_that_names_the_peer() -> None:
    first = FirstContact(pattern(PAGE_BYTES, CPU, DESTINATION), 100_000)
    with pytest.raises(IntegrityError, match="from rank 1 are wrong") as caught:
        first.advance_to_the_end()
    assert (caught.value.peers, caught.value.phase) == ((SOURCE,), "probe")
    assert first.peers.proven == set()
    assert not first.peers.told(Kind.DONE)


class Damaged:
    """A communicator that brings what it should, but for one byte from rank 2."""

    def __init__(self) -> None:
        self.landing, self.peer = torch.empty(0), -1

    def add_send(self, tensor: torch.Tensor, to: int) -> None:
        pass

    def add_recv(self, tensor: torch.Tensor, peer: int) -> None:
        self.landing, self.peer = tensor, peer

    def execute(self) -> None:
        self.landing.copy_(pattern(len(self.landing), CPU, self.peer))
        if self.peer == 2:
            self.landing[-1] ^= 1


def test_wrong_bytes_at_start_name_the_rank_that_they_came_from() -> None:
    send, receive = (torch.zeros(1 << 16, dtype=torch.uint8) for _ in range(2))
    with pytest.raises(IntegrityError, match="expandable_segments") as caught:
        read_from_every_peer(Damaged(), send, receive, 0, 4)  # type: ignore[arg-type]
    assert (caught.value.peers, caught.value.phase) == ((2,), "self-test")
