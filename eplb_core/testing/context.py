"""What a check is given in every rank: communicators to try, and ways to meet the other ranks."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.control.groups import StatelessGroup, TorchGroups
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment
from eplb_core.launch.rank_devices import rank_device
from eplb_core.registry.config import parse_config
from eplb_core.registry.registry import default_registry
from eplb_core.testing.check import expect, skip
from eplb_core.testing.subject import Subject

TIMEOUT_S = 15.0
"""The `timeout` option of communicators whose peers all take part."""

_MEET_S = 60.0
_LOOK_AROUND_S = 1.0  # waiting for ranks, a look at whether one of them has failed

_T = TypeVar("_T")


class RankContext:
    """One rank, and the subject that it checks.

    Args:
        environment: the rank.
        subject: what is checked.
        leave_open: whether communicators are dropped without closing them, since closing is known to hang.
    """

    def __init__(self, environment: RankEnvironment, subject: Subject, *, leave_open: bool = False) -> None:
        self.environment = environment
        self.subject = subject
        self.rank = environment.rank
        self.world_size = environment.world_size
        self.device = rank_device(subject.device, environment)
        self.step = 0
        self._leave_open = leave_open
        self._groups: TorchGroups | None = None
        self._shared: EplbCommunicator | None = None
        self._closed: EplbCommunicator | None = None
        self._to_close: list[EplbCommunicator] = []
        self._to_destroy: list[dist.ProcessGroup] = []
        self._memos: dict[str, Any] = {}

    # --- communicators ----------------------------------------------------------------------------------------------

    @property
    def communicator(self) -> EplbCommunicator:
        """The communicator of all ranks that every check may use, as long as it leaves it usable."""
        if self._shared is None:
            self._shared = self.create()
        return self._shared

    @property
    def closed_communicator(self) -> EplbCommunicator:
        """One that has moved something and was then closed."""
        if self._leave_open:
            skip("close() does not return")
        if self._closed is None:
            communicator = self.create()
            communicator.execute()
            communicator.close()
            self._closed = communicator
        return self._closed

    def fresh(self, *, timeout_s: float = TIMEOUT_S, own_groups: bool = False) -> EplbCommunicator:
        """Return a communicator of this check's own; it is closed when the check is over.

        Args:
            timeout_s: its `timeout` option.
            own_groups: whether it gets process groups of its own, which a failure may ruin.
        """
        groups = self.new_groups() if own_groups else None
        return self.kept(self.create(groups, timeout_s=timeout_s))

    def create(
        self, groups: TorchGroups | StatelessGroup | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> EplbCommunicator:
        """Return a communicator that the check itself has to close."""
        weights = [torch.empty(0, device=self.device)] if self.device.type != "cpu" else []
        arguments = {"timeout": timeout_s}
        return create_eplb_communicator(groups or self.groups, self.subject.config, weights, arguments=arguments)

    def kept(self, communicator: EplbCommunicator) -> EplbCommunicator:
        """Have a communicator closed when the check is over, and return it."""
        self._to_close.append(communicator)
        return communicator

    # --- groups -----------------------------------------------------------------------------------------------------

    @property
    def groups(self) -> TorchGroups:
        """The process groups of all ranks."""
        if self._groups is None:
            self._groups = self.new_groups()
        return self._groups

    def new_groups(self, ranks: Sequence[int] | None = None) -> TorchGroups:
        """Return new process groups; every rank has to call it, also one that is not in `ranks` (None: all).

        A rank that is not in `ranks` gets groups that are good for nothing.
        """
        members = list(range(self.world_size)) if ranks is None else list(ranks)
        timeout = datetime.timedelta(seconds=_MEET_S)
        cpu_group = dist.new_group(members, backend="gloo", timeout=timeout)
        device_group = None
        if self._needs_device_group():
            device_group = dist.new_group(members, backend="nccl", timeout=timeout, device_id=self.device)
        if self.rank not in members:
            return self.groups
        if device_group is not None:  # NCCL connects on first use, which can take longer than a check's deadlines
            dist.all_reduce(torch.zeros(1, device=self.device), group=device_group)
            torch.cuda.synchronize(self.device)
        self._to_destroy += [group for group in (cpu_group, device_group) if group is not None]
        return TorchGroups(cpu_group, device_group)

    def _needs_device_group(self) -> bool:
        spec = default_registry().select(parse_config(self.subject.config)).spec
        return spec is not None and spec.capabilities.device_group and self.device.type != "cpu"

    # --- the other ranks --------------------------------------------------------------------------------------------

    def meet(self, name: str, ranks: Sequence[int] | None = None) -> None:
        """Wait for all ranks, or for those given; a check uses each name once."""
        key = f"step {self.step}/{name}"
        self.environment.store.set(f"{key}/{self.rank}", "")
        self.wait_for([f"{key}/{rank}" for rank in (range(self.world_size) if ranks is None else ranks)])

    def tell(self, name: str, value: str = "") -> None:
        """Set a word that `ask` returns on any rank of this check."""
        self.environment.store.set(f"step {self.step}/{name}", value)

    def ask(self, name: str) -> str:
        """Wait until a rank has told `name`, and return what it told."""
        self.wait_for([f"step {self.step}/{name}"])
        return self.environment.store.get(f"step {self.step}/{name}").decode()

    def wait_for(self, keys: Sequence[str]) -> None:
        """Wait for keys of the store at which the ranks meet.

        Raises:
            BrokenPromiseError: another rank has failed this check, and will not set them.
        """
        store = self.environment.store
        while True:
            try:
                store.wait(list(keys), datetime.timedelta(seconds=_LOOK_AROUND_S))
                return
            except dist.DistError:
                expect(not store.check([self.failure_key]), "another rank failed while this one waited for it")

    @property
    def failure_key(self) -> str:
        """The key that a rank sets when it has failed the check at hand."""
        return f"step {self.step} failed"

    def once(self, name: str, measure: Callable[[], _T]) -> _T:
        """Return what `measure` returned when it was first asked for under this name: several checks share one."""
        if name not in self._memos:
            self._memos[name] = measure()
        found: _T = self._memos[name]
        return found

    @property
    def never_closes(self) -> bool:
        """Whether closing is known to hang, so that nothing can be said about what comes after it."""
        return self._leave_open

    # --- for the runner ---------------------------------------------------------------------------------------------

    def renew(self) -> None:
        """Forget the shared communicator and the groups after a failure: nobody knows what state they are in."""
        if self._shared is not None:
            self._to_close.append(self._shared)
        self._shared = self._closed = self._groups = None
        self._to_destroy.clear()  # destroying a group that a peer is stuck in could hang

    def tidy(self) -> None:
        """Close what the check has left open.

        Raises:
            BrokenPromiseError: closing raised.
        """
        open_, self._to_close = self._to_close, []
        problems = []
        for communicator in () if self._leave_open else open_:
            try:
                communicator.close()
            except Exception as error:  # noqa: BLE001 - it is a finding, and the others have to be closed as well
                problems.append(f"close() raised {type(error).__name__}: {error}")
        expect(not problems, "; ".join(problems))

    def finish(self) -> None:
        """Close everything; raises as `tidy` does."""
        if self._shared is not None:
            self._to_close.append(self._shared)
            self._shared = None
        try:
            self.tidy()
        finally:
            for group in self._to_destroy:
                dist.destroy_process_group(group)
            self._to_destroy.clear()
