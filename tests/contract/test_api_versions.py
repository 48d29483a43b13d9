"""A backend and an eplb of other ages: either they work together, or the side that is too old is named.

The core's version is a parameter of the registry, so that a plugin API which does not exist yet can be tried.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import eplb_core
from eplb_core import transport
from eplb_core.contract.backend import PLUGIN_API_VERSION, BackendSpec, Capabilities
from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.contract.context import BackendContext
from eplb_core.contract.option_types import CommonOptions
from eplb_core.contract.stats import TransferStats
from eplb_core.registry.entry import speaks
from tests.support.fake_distributions import install, install_backend, run_eplb, run_python

_MAJOR, _MINOR = PLUGIN_API_VERSION


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "together"),
    [
        ((1, 0), (1, 0), True),
        ((1, 1), (1, 0), True),
        ((1, 9), (1, 0), True),
        ((1, 10), (1, 9), True),
        ((1, 0), (1, 1), False),
        ((1, 9), (1, 10), False),
        ((1, 0), (2, 0), False),
        ((2, 0), (1, 0), False),
        ((2, 0), (1, 9), False),
        ((2, 3), (3, 1), False),
    ],
)
def test_a_backend_is_taken_if_it_was_written_for_this_minor_version_or_an_earlier_one_of_the_same_major(
    ours: tuple[int, int], theirs: tuple[int, int], together: bool
) -> None:
    assert speaks(ours, theirs) is together


# --- what is said when they do not fit -------------------------------------------------------------------------------

REFUSED = {
    "an older major": ((2, 0), (1, 7), "the backend must be upgraded", "rail-eplb"),
    "a newer minor": ((1, 1), (1, 2), "eplb must be upgraded", "eplb"),
    "a newer major": ((1, 9), (2, 0), "eplb must be upgraded", "eplb"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What eplbs of several versions say to backends of several versions: in one process, which is enough."""
    cases, path = {}, []
    for number, (case, (ours, theirs, _, _)) in enumerate([*REFUSED.items(), ("fits", ((1, 3), (1, 2), "", ""))]):
        path.append(install_backend(tmp_path_factory.mktemp("site"), "rail", api=repr(theirs)))
        cases[case] = (number, ours)
    answer: dict[str, Any] = run_python(
        f"""
        import sys
        from eplb_core.registry.config import parse_config
        from eplb_core.errors import BackendVersionError
        from eplb_core.registry.registry import Registry
        path, answer = sys.path, {{}}
        sites = {[str(each) for each in path]!r}
        for case, (number, ours) in {cases!r}.items():
            sys.path = [sites[number], *path]
            sys.modules.pop("rail_eplb_spec", None)
            sys.path_importer_cache.clear()
            registry = Registry(api_version=ours)
            (entry,) = [entry for entry in registry.entries() if entry.name == "rail"]
            try:
                registry.select(parse_config("rail"))
                refusal = None
            except BackendVersionError as error:
                refusal = str(error)
            answer[case] = [entry.state, entry.why, entry.remedy, refusal]
        """
    )
    return answer


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_backend_that_does_not_fit_is_refused_with_the_side_to_upgrade(answers: dict[str, Any], case: str) -> None:
    ours, theirs, older, package = REFUSED[case]
    why = f"it uses plugin API {theirs[0]}.{theirs[1]}, but this eplb has {ours[0]}.{ours[1]}; {older}"
    assert answers[case] == [
        "incompatible",
        why,
        f"pip install --upgrade {package}",
        f"backend 'rail' is not compatible with this version of eplb (rail-eplb 1.0): {why}\n"
        f"  hint: pip install --upgrade {package}",
    ]


def test_a_backend_of_the_previous_minor_version_is_ready(answers: dict[str, Any]) -> None:
    assert answers["fits"] == ["ready", "", "", None]


def test_the_command_lists_one_that_does_not_fit_and_refuses_only_that_one(tmp_path: Path) -> None:
    install_backend(tmp_path, "rail", api=repr((_MAJOR, _MINOR + 1)))
    listed = json.loads(run_eplb("backends", "--json", "-", path=[tmp_path]).stdout)["backends"]
    states = {entry["name"]: entry["state"] for entry in listed}
    assert states["rail"] == "incompatible"
    assert states["torch_gloo"] == "ready"


# --- a backend of the first version, with later ones -----------------------------------------------------------------

FIRST = """
from eplb_core import BackendSpec, Capabilities

BACKEND = BackendSpec(
    name="first",
    summary="as it was written for 1.0",
    api_version=(1, 0),
    factory="first_eplb:create",
    capabilities=Capabilities(stateless_groups=True),
)
"""
FIRST_COMMUNICATOR = """
import torch
from eplb_core import EplbCommunicator
from eplb_core.transport import TransferQueue, as_bytes, check_match


class First(EplbCommunicator):
    def __init__(self, context, options):
        self._control, self._timeout_s = context.control, float(options.timeout)
        self._queue = TransferQueue(context.rank, context.world_size, context.device)

    def add_send(self, tensor, dst_rank):
        self._queue.add_send(tensor, dst_rank)

    def add_recv(self, tensor, src_rank):
        self._queue.add_recv(tensor, src_rank)

    def execute(self):
        sends, recvs = self._queue.take()
        check_match(self._control, sends, recvs, self._timeout_s)
        mine = b"".join(as_bytes(send.tensor).numpy().tobytes() for each in sends.values() for send in each)
        theirs = self._control.all_gather("the weights", mine, self._timeout_s)
        start = 0
        for source, each in recvs.items():
            for recv in each:
                content = bytearray(theirs[source][start : start + recv.nbytes])
                as_bytes(recv.tensor).copy_(torch.frombuffer(content, dtype=torch.uint8))
                start += recv.nbytes


def create(context, options, expert_weights):
    return First(context, options)
"""
FIRST_QUEUED = """
import torch
from eplb_core import TransferStats
from eplb_core.transport import QueuedCommunicator, as_bytes


class First(QueuedCommunicator):
    path = "store"

    def move(self, sends, recvs):
        mine = b"".join(as_bytes(send.tensor).numpy().tobytes() for each in sends.values() for send in each)
        theirs = self.context.control.all_gather("the weights", mine, self.timeout_s)
        start = 0
        for source, each in recvs.items():
            for recv in each:
                content = bytearray(theirs[source][start : start + recv.nbytes])
                as_bytes(recv.tensor).copy_(torch.frombuffer(content, dtype=torch.uint8))
                start += recv.nbytes
        return TransferStats(phases={"gather": 0.0})

    def refuse(self, sends, recvs):
        return None

    def give_up(self, error):
        print(error.peers)

    def release(self):
        self.queue.check_open


create = First
"""
REARRANGE = """
import threading
import numpy as np
import torch
from torch.distributed import TCPStore
from eplb_core import Rearranger, StatelessGroup, create_eplb_communicator
from eplb_core.registry.registry import Registry

def work(rank, store):
    weights = [[torch.full((2, 3), 10.0 * rank) + torch.tensor([[0.0], [1.0]])]]  # expert e of 4 holds 10*(e//2) + e%2
    registry = Registry(api_version=(1, 1))
    with create_eplb_communicator(StatelessGroup(rank, 2, store), "first", weights[0], registry=registry) as moves:
        result = Rearranger(moves, weights).run(np.array([[0, 1, 2, 3]]), np.array([[3, 1, 2, 0]]))
    answer[rank] = [result.placement.tolist(), weights[0][0].tolist()]

answer = [None, None]
host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
threads = [
    threading.Thread(target=work, args=(rank, TCPStore("127.0.0.1", host.port, wait_for_workers=False)), daemon=True)
    for rank in range(2)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(30)
"""


@pytest.mark.parametrize("communicator", [FIRST_COMMUNICATOR, FIRST_QUEUED], ids=["by hand", "queued"])
def test_a_backend_of_the_first_minor_version_moves_weights_with_an_eplb_of_the_next(
    communicator: str, tmp_path: Path
) -> None:
    modules = {"first_spec": FIRST, "first_eplb": communicator}
    site = install(tmp_path, "first", backends={"first": "first_spec:BACKEND"}, modules=modules)
    row = {expert: [10.0 * (expert // 2) + expert % 2] * 3 for expert in range(4)}
    assert run_python(REARRANGE, [site]) == [
        [[[3, 1, 2, 0]], [row[3], row[1]]],
        [[[3, 1, 2, 0]], [row[2], row[0]]],
    ]


# --- what 1.0 promised, and every 1.x has to keep --------------------------------------------------------------------
# A test below that fails asks for the next major version, or for a default.


def required(described: Any) -> set[str]:
    parameters = inspect.signature(described).parameters.values()
    return {parameter.name for parameter in parameters if parameter.default is parameter.empty}


def test_a_communicator_needs_the_same_three_methods() -> None:
    assert EplbCommunicator.__abstractmethods__ == {"add_send", "add_recv", "execute"}


@pytest.mark.parametrize(
    ("described", "names"),
    [
        (BackendSpec, {"name", "summary", "api_version", "factory"}),
        (Capabilities, set()),
        (CommonOptions, set()),
        (TransferStats, set()),
        (eplb_core.ProbeResult, {"available", "reason"}),
        (transport.TransferQueue, {"rank", "world_size"}),
        (transport.check_match, {"control", "sends", "recvs", "timeout_s"}),
        (transport.QueuedCommunicator, {"context", "options"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_backend_has_to_say_does_not_grow(described: Any, names: set[str]) -> None:
    assert required(described) == names


def test_what_a_factory_is_given_does_not_shrink() -> None:
    given = {field.name for field in dataclasses.fields(BackendContext)}
    assert given >= {"rank", "world_size", "device", "control", "cpu_group", "device_group", "device_communicator"}


@pytest.mark.parametrize(
    "name",
    [
        "PLUGIN_API_VERSION",
        "BackendContext",
        "BackendSpec",
        "ByteSize",
        "Capabilities",
        "CommonOptions",
        "Duration",
        "EplbCommunicator",
        "PendingTransfer",
        "ProbeResult",
        "TransferError",
        "TransferStats",
    ],
)
def test_what_a_backend_imports_stays_where_it_is(name: str) -> None:
    assert name in eplb_core.__all__
    assert hasattr(eplb_core, name)


@pytest.mark.parametrize(
    "name",
    [
        "HostIdentity",
        "Message",
        "Payload",
        "Payloads",
        "QueuedCommunicator",
        "TransferQueue",
        "as_bytes",
        "as_transfer_error",
        "call_within",
        "check_match",
        "checksums",
        "coalesce",
        "copy_all",
        "exchange",
        "in_order",
        "mark",
        "nbytes_of",
        "on_stream",
        "ordinal_of",
        "synchronize",
        "wait_until",
    ],
)
def test_what_a_backend_moves_bytes_with_stays_where_it_is(name: str) -> None:
    assert name in transport.__all__
    assert hasattr(transport, name)


def test_a_queued_communicator_needs_one_method() -> None:
    assert transport.QueuedCommunicator.__abstractmethods__ == {"move"}


class ThreeMethods(EplbCommunicator):
    """A communicator that overrides nothing that has a default."""

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None: ...

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None: ...

    def execute(self) -> None: ...


_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "add_payloads": ({1: [transport.Payload(torch.zeros(1))]}, {}),
    "add_send": (torch.zeros(1), 1),
    "add_recv": (torch.zeros(1), 1),
    "set_stream": (None,),
    "trust_matching": (True,),
    "register": ([torch.zeros(1)],),
    "bind": (None,),
}


@pytest.mark.parametrize("name", sorted(name for name in vars(EplbCommunicator) if not name.startswith("_")))
def test_everything_that_the_base_class_has_does_for_a_backend_that_does_not_know_it(name: str) -> None:
    communicator = ThreeMethods()
    if name == "binding":
        with pytest.raises(eplb_core.EplbError, match="not bound to a group"):
            _ = communicator.binding
    elif isinstance(vars(EplbCommunicator)[name], property):
        getattr(communicator, name)
    else:
        getattr(communicator, name)(*_ARGUMENTS.get(name, ()))
