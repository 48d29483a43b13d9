"""Ranks that are threads of one process, and a transport between them: unit tests in milliseconds.

    def work(group):
        with create_eplb_communicator(group, "in_process", weights, registry=in_process.registry()) as communicator:
            ...

    results = in_process.run_ranks(4, work)

Deaths, deadlines and real transports need processes; everything else of an engine, or of a rearrangement, does not.
The transport is also the shortest reading of the contract.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

import importlib_metadata
import torch
import torch.distributed as dist

from eplb_core import __version__
from eplb_core.contract.backend import ENTRY_POINT_GROUP, PLUGIN_API_VERSION, BackendSpec, Capabilities
from eplb_core.contract.context import BackendContext
from eplb_core.contract.option_types import CommonOptions
from eplb_core.contract.payload import Payload, Payloads
from eplb_core.control.groups import StatelessGroup
from eplb_core.errors import BackendUnavailableError
from eplb_core.registry.discovery import Registration
from eplb_core.registry.registry import Registry
from eplb_core.transport import QueuedCommunicator, as_bytes

Result = TypeVar("Result")

_NAME = "in_process"
_LIVE: weakref.WeakValueDictionary[int, InProcessCommunicator] = weakref.WeakValueDictionary()


class InProcessCommunicator(QueuedCommunicator):
    """Copies out of the tensors of the other ranks, which are threads of this process.

    Args:
        context: the group.
        options: the options of the config string.
        expert_weights: the tensors of one layer.

    Raises:
        BackendUnavailableError: a rank is another process.
    """

    path = "memory"

    def __init__(
        self, context: BackendContext, options: CommonOptions, expert_weights: Sequence[torch.Tensor] = ()
    ) -> None:
        super().__init__(context, options)
        self._offered: Payloads = {}
        _LIVE[id(self)] = self
        mine = f"{os.getpid()} {id(self)}"
        said = context.control.all_gather("which process each rank is in", mine.encode(), self.timeout_s)
        processes, numbers = zip(*(each.decode().split() for each in said), strict=True)
        if len(set(processes)) > 1:
            raise BackendUnavailableError("the ranks are not threads of one process", name=_NAME)
        self._ranks = [_LIVE[int(number)] for number in numbers]
        context.control.barrier("every rank knows the others", self.timeout_s)

    def move(self, sends: Payloads, recvs: Payloads) -> None:
        """Offer what is sent, copy what the others offer, and wait until they have copied."""
        control, rank = self.context.control, self.context.rank
        self._offered = sends
        try:
            control.barrier("everything is offered", self.timeout_s)
            for peer, payloads in recvs.items():
                _copy(payloads, self._ranks[peer]._offered[rank])  # a function: no name may keep a sent tensor alive
            control.barrier("everything is copied", self.timeout_s)
        finally:
            self._offered = {}

    def release(self) -> None:
        """Forget the other ranks."""
        self._ranks = []

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """False: it has no buffers."""
        return False

    @property
    def may_land_late(self) -> bool:
        """False: each rank writes to its own tensors only."""
        return False


def _copy(mine: Sequence[Payload], theirs: Sequence[Payload]) -> None:
    for target, source in zip(mine, theirs, strict=True):
        as_bytes(target.tensor).copy_(as_bytes(source.tensor))


BACKEND = BackendSpec(
    name=_NAME,
    summary="copies between threads of one process, for tests",
    api_version=PLUGIN_API_VERSION,
    factory="eplb_core.testing.in_process:InProcessCommunicator",
    capabilities=Capabilities(stateless_groups=True, background=True),
)


class _Registry(Registry):
    """The installed backends, and this one: it is not installed, so that `auto` never finds it."""

    def _registrations(self) -> dict[str, list[Registration]]:
        value = f"{__name__}:BACKEND"
        point = importlib_metadata.EntryPoint(_NAME, value, ENTRY_POINT_GROUP)
        mine = Registration(_NAME, value, "eplb", __version__, os.path.dirname(__file__), _entry_point=point)
        return super()._registrations() | {_NAME: [mine]}


@functools.cache
def registry() -> Registry:
    """Return a registry of the installed backends and `in_process`, for `create_eplb_communicator`."""
    return _Registry()


def run_ranks(num_ranks: int, work: Callable[[StatelessGroup], Result], *, timeout_s: float = 60.0) -> list[Result]:
    """Call `work` on each of so many ranks, which are threads, with its group; return what each returned, by rank.

    Args:
        num_ranks: how many.
        work: what each does. An exception of one is raised here once all have ended, the lowest rank's first.
        timeout_s: how long to wait for the last one, in seconds.

    Raises:
        TimeoutError: a rank has not ended. Its thread stays behind.
    """
    store = dist.HashStore()
    returned: dict[int, Result] = {}
    raised: dict[int, BaseException] = {}

    def one(rank: int) -> None:
        try:
            returned[rank] = work(StatelessGroup(rank, num_ranks, store))
        except BaseException as error:  # noqa: BLE001 - it belongs to the caller's thread
            raised[rank] = error

    threads = [
        threading.Thread(target=one, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(num_ranks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    for rank, error in sorted(raised.items()):
        error.add_note(f"on rank {rank} of {num_ranks}")
        raise error
    late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if late:
        raise TimeoutError(f"ranks {late} have not ended within {timeout_s:g} s")
    return [returned[rank] for rank in range(num_ranks)]
