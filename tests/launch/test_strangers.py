"""What others on the machine can do to ranks that eplb starts; docs/security.md says the same."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.control.groups import StatelessGroup, TorchGroups
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment, collect_local_ranks, run_local_ranks


def move_something(communicator: EplbCommunicator, environment: RankEnvironment) -> None:
    sent, received = torch.full((1000,), float(environment.rank)), torch.zeros(1000)
    communicator.add_send(sent, 1 - environment.rank)
    communicator.add_recv(received, 1 - environment.rank)
    communicator.execute()
    assert received.tolist() == [1.0 - environment.rank] * 1000


LOOPBACK = ("127.0.0.1", "::1")


def _own_store(environment: RankEnvironment) -> dist.TCPStore:
    store = environment.store
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, dist.TCPStore)
    return store


def disturbed(environment: RankEnvironment) -> bool:
    """Gather and settle while a stranger writes to every key that ranks are known to use."""
    from eplb_core.control.plane import ControlPlane

    if environment.rank == 0:
        mine = _own_store(environment)
        stranger = dist.TCPStore(mine.host, mine.port, is_master=False, wait_for_workers=False)
        for number in range(4):
            for rank in range(2):
                stranger.set(f"plane/{number}/{rank}", "a stranger's")
        stranger.set("plane/verdict", "a stranger's")
        stranger.set("there", "")
    else:
        mine = _own_store(environment)
        mine.wait(["there"])
    control = ControlPlane(dist.PrefixStore("plane", environment.store), environment.rank, environment.world_size)
    gathered = [control.all_gather("words", b"a rank's", 20.0) for _ in range(4)]
    verdict = control.settle("verdict", b"a rank's")
    return {verdict, *(word for words in gathered for word in words)} == {b"a rank's"}


def test_a_stranger_who_writes_to_the_keys_of_local_ranks_writes_somewhere_else() -> None:
    assert run_local_ranks(disturbed, 2, timeout_s=60.0) == [True, True]


def visible(environment: RankEnvironment) -> list[str]:
    """Return where this rank's secret stands that others can see."""
    environment.store.set("probe", "")
    (key,) = (key for key in _own_store(environment).list_keys() if key.endswith("probe"))
    secret = key.partition("/")[0]
    assert re.fullmatch(r"[0-9a-f]{32}", secret)
    places = ("cmdline", "environ")
    return [place for place in places if secret.encode() in Path(f"/proc/self/{place}").read_bytes()] + [
        name for name, value in os.environ.items() if secret in value
    ]


def test_the_secret_of_local_ranks_is_on_no_command_line_and_in_no_environment() -> None:
    assert run_local_ranks(visible, 2, timeout_s=60.0) == [[], []]


def listening(environment: RankEnvironment, config: str) -> list[str]:
    """Move something, and return the addresses at which this rank listens."""
    if config.startswith("torch"):
        environment.init_process_group(30.0)
        group: TorchGroups | StatelessGroup = TorchGroups()
    else:
        store = dist.PrefixStore("group", environment.store)
        group = StatelessGroup(environment.rank, environment.world_size, store)
    with create_eplb_communicator(group, config) as communicator:
        move_something(communicator, environment)
        found = psutil.Process().net_connections("inet")
        return sorted({one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN})


def test_ranks_over_gloo_listen_at_loopback_only() -> None:
    assert run_local_ranks(listening, 2, ("torch_gloo",), timeout_s=60.0) == [["127.0.0.1"]] * 2


def test_the_launcher_listens_at_loopback_only() -> None:
    found: list[str] = []

    def look(_pids: list[int]) -> None:
        connections = psutil.Process().net_connections("inet")
        found.extend(one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN)

    outcomes = collect_local_ranks(_nothing, 1, timeout_s=60.0, on_start=look)
    assert outcomes[0].exit_code == 0
    assert set(found) <= set(LOOPBACK)
    assert found


def _nothing(_environment: RankEnvironment) -> None:
    return


def page_and_other_user(environment: RankEnvironment) -> list[str]:
    """Return what another user gets who opens this rank's page of the board, as ranks find one another's."""
    from eplb_core.control.board import OwnPage

    page = OwnPage()
    folder = Path(page.offer.path).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o500
    code = f"import os; os.setgid(65534); os.setuid(65534); os.open({page.offer.path!r}, os.O_RDONLY)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    page.close_file()
    return [str(asked.returncode), asked.stderr.strip().splitlines()[-1]]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_open_the_memory_that_ranks_share() -> None:
    (code, said), _ = run_local_ranks(page_and_other_user, 2, timeout_s=60.0)
    assert code == "1"
    assert said.startswith("PermissionError")


def shared_files(environment: RankEnvironment, config: str) -> list[str]:
    """Return the names in file systems of memory that this rank has mapped, while a communicator is open."""
    store = dist.PrefixStore("group", environment.store)
    group = StatelessGroup(environment.rank, environment.world_size, store)
    with create_eplb_communicator(group, config, [torch.zeros(4)]) as communicator:
        move_something(communicator, environment)
        lines = Path("/proc/self/maps").read_text().splitlines()
    named = {line.split(None, 5)[5] for line in lines if "/dev/shm/" in line}
    return sorted(name for name in named if not name.endswith("(deleted)"))


def test_shared_memory_of_nixl_has_no_name_that_others_could_open() -> None:
    assert run_local_ranks(shared_files, 2, ("nixl",), timeout_s=60.0) == [[], []]
