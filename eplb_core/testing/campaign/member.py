"""One process of a campaign: it takes part in one trial after the other, and says what it holds after each."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from eplb_core.arrays import IntArray
from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.control.groups import StatelessGroup, TorchGroups
from eplb_core.errors import EplbError, HandshakeError, TransferError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment
from eplb_core.planning.placement import EMPTY
from eplb_core.rearrange.rearranger import InPlace, Rearranger
from eplb_core.testing.campaign.experts import (
    expert,
    fill,
    poisoned_weights,
    random_placement,
    room_for,
    wrong_slots,
)
from eplb_core.testing.campaign.plan import Trial
from eplb_core.testing.campaign.strike import StallClock, Strike

PATIENCE_S = 2.0
"""What a rank may take beyond the timeout to raise."""

_CALM_S = 30.0  # the timeout of what no fault is near: a busy machine must not look like one
_MEET_S = 60.0
_ATTEMPTS = 3
_NAP_S = 0.01
_LEAST_USUAL_S = 0.005


@dataclass(frozen=True, slots=True)
class Host:
    """The process that hosts the store of one trial, which a fault may end."""

    pid: int
    port: int


@dataclass(frozen=True, slots=True)
class Told:
    """What a process says of one trial.

    Attributes:
        kind: the class name of what was raised, or nothing.
        error: its text.
        own: whether it is an error of eplb, or what the process's own fault was.
        blamed: the ranks that the error names.
        placement: what the slots hold, int64 `[layers, slots]`.
        wrong: `(layer, slot)` of this rank where other bytes lie.
        seconds: what the call took.
        usual_s: what an undisturbed one takes.
        stalled_s: how long the process did not get to run meanwhile.
        struck: whether a fault of this process came before the end.
    """

    kind: str
    error: str
    own: bool
    blamed: tuple[int, ...]
    placement: IntArray
    wrong: list[tuple[int, int]]
    seconds: float
    usual_s: float
    stalled_s: float
    struck: bool


@dataclass(slots=True)
class Next:
    """What a process says of the rearrangement after a trial.

    Attributes:
        wrong: `(layer, slot)` of this rank that is not what was asked for.
        wrong_later: the same, once ranks that had been left behind have come back.
        loaded: how many experts no slot held any more.
    """

    wrong: list[tuple[int, int]]
    wrong_later: list[tuple[int, int]] = field(default_factory=list)
    loaded: int = 0


class Member:
    """One process.

    Args:
        environment: its rank among all processes, and a store that outlives all of them.
        config: the backend.
        seed: of the placements.
        timeout_s: the communicator's, while something goes wrong.
        trials: what is tried.
        hosts: trial -> the process that hosts its store, where that is not the launcher.
        stateless: trials whose group is a store alone.
    """

    def __init__(
        self,
        environment: RankEnvironment,
        config: str,
        seed: int,
        timeout_s: float,
        trials: Sequence[Trial],
        hosts: dict[int, Host],
        stateless: frozenset[int],
    ) -> None:
        self._environment = environment
        self._config = config
        self._timeout_s = timeout_s
        self._trials = trials
        self._hosts = hosts
        self._stateless = stateless
        self._process = environment.rank
        self._store = environment.store
        self._rng = np.random.default_rng(seed)  # the same in every process
        self._clock = StallClock()
        self._weights = poisoned_weights()

    def live(self) -> None:
        """Take part until this process has left, or nothing is left to try."""
        self._store.set(f"pid {self._process}", str(os.getpid()))
        members = self._trials[0].members
        placement = random_placement(self._rng, len(members))
        fill(self._weights, placement, members.index(self._process))
        placement, usual_s, _ = self._calmly("start", members, placement, None)
        for trial in self._trials:
            target = random_placement(self._rng, len(trial.members))
            told = self._disturbed(trial, placement, target, usual_s)
            self._environment.report(("told", trial.number, told))
            self._store.set(f"{trial.number} through {self._process}", "")
            if self._process not in trial.remaining:
                return
            self._wake(trial, "stop")
            known = self._agreed(trial, told.placement)
            before = {rank: new for new, rank in enumerate(map(trial.members.index, trial.remaining))}
            placement, usual_s, after = self._calmly(f"after {trial.number}", trial.remaining, known, before)
            if self._wake(trial, "zombie"):
                after.wrong_later = wrong_slots(self._weights, placement, trial.remaining.index(self._process))
            self._environment.report(("next", trial.number, after))

    # --- rearrangements ----------------------------------------------------------------------------------------------

    def _calmly(
        self, name: str, members: tuple[int, ...], old: IntArray, before: dict[int, int] | None
    ) -> tuple[IntArray, float, Next]:
        """Rearrange undisturbed; return the placement, how long it took, and what is wrong with it."""
        target = random_placement(self._rng, len(members))
        loaded: list[tuple[int, int]] = []

        def loader(layer: int, logical: int) -> Sequence[torch.Tensor]:
            loaded.append((layer, logical))
            return expert(layer, logical)

        with self._meet(name, members, self._store, _CALM_S, stateless=False) as communicator:
            began = time.perf_counter()
            rearranger = Rearranger(communicator, self._weights)
            placement = rearranger.run(old, target, ranks_before=before, loader=loader, verify="full").placement
            usual_s = time.perf_counter() - began
        wrong = wrong_slots(self._weights, target, members.index(self._process))
        return placement, max(usual_s, _LEAST_USUAL_S), Next(wrong, loaded=len(loaded))

    def _disturbed(self, trial: Trial, old: IntArray, new: IntArray, usual_s: float) -> Told:
        """Rearrange while something goes wrong, and say how it ended here."""
        rank = trial.members.index(self._process)
        host = self._hosts.get(trial.number)
        store = (
            self._store
            if host is None
            else dist.TCPStore("127.0.0.1", host.port, is_master=False, wait_for_workers=False)
        )
        communicator = self._meet(
            f"trial {trial.number}", trial.members, store, self._timeout_s, stateless=trial.number in self._stateless
        )
        rearranger = Rearranger(
            communicator,
            self._weights,
            window_bytes=room_for(trial.window_experts),
            in_place=_in_place(trial, communicator),
        )
        strike = Strike(trial.fault_of(self._process), usual_s, 0 if host is None else host.pid, trial.background)
        self._gather(f"trial {trial.number}", trial.members)
        began, stalled_s = time.monotonic(), self._clock.stalled_s
        raised: BaseException | None = None
        placement: IntArray | None = None
        try:
            with strike.armed():
                try:
                    if trial.background:
                        placement = self._beside(rearranger, communicator, old, new, trial, strike)
                    else:
                        placement = rearranger.run(old, new, progress=lambda *_: strike.in_the_engine()).placement
                finally:
                    strike.calm()
        except BaseException as error:  # noqa: BLE001 - what it is, is what the campaign asks
            raised = error
        seconds = time.monotonic() - began
        if strike.is_still_to_leave:
            self._environment.report(("too late", trial.number, None))
            strike.leave()
        if raised is not None:
            placement = getattr(raised, "placement", None)
            placement = rearranger.placement if placement is None else placement
        with contextlib.suppress(EplbError):
            communicator.close()
        return Told(
            kind="" if raised is None else type(raised).__name__,
            error="" if raised is None else str(raised),
            own=raised is None
            or isinstance(raised, EplbError)
            or (strike.struck and isinstance(raised, strike.raises)),
            blamed=tuple(getattr(raised, "peers", ())) or tuple(getattr(raised, "missing", ())),
            # Nothing was moved before the first agreement.
            placement=old if placement is None else placement,
            wrong=wrong_slots(self._weights, old if placement is None else placement, rank),
            seconds=seconds,
            usual_s=usual_s,
            stalled_s=self._clock.stalled_s - stalled_s,
            struck=strike.struck,
        )

    def _beside(
        self,
        rearranger: Rearranger,
        communicator: EplbCommunicator,
        old: IntArray,
        new: IntArray,
        trial: Trial,
        strike: Strike,
    ) -> IntArray:
        """Be an engine that serves while a job rearranges, in a block that closes the communicator."""
        job = rearranger.start(old, new)
        try:
            ends = time.monotonic() + _MEET_S
            while not job.received and trial.commits != "wait" and time.monotonic() < ends:
                strike.in_the_engine()
                layers = job.ready_layers()
                for layer in reversed(layers) if trial.commits == "the last first" else layers:
                    job.commit(layer)
                if trial.commits == "cancelled" and job.progress[0]:
                    job.cancel()
                    break
                time.sleep(_NAP_S / 20)
            strike.in_the_engine()
            return job.wait(_MEET_S).placement  # its own deadlines come first
        except TransferError:
            return job.wait(_MEET_S).placement  # which tells
        except BaseException:
            strike.calm()
            with contextlib.suppress(EplbError):
                communicator.close()
            with contextlib.suppress(EplbError):  # after it, rearranger.placement is the one of all ranks
                job.wait(_MEET_S)
            raise

    # --- the others --------------------------------------------------------------------------------------------------

    def _meet(
        self, name: str, members: tuple[int, ...], store: dist.Store, timeout_s: float, *, stateless: bool
    ) -> EplbCommunicator:
        """Return a communicator of `members` that meets at `store`."""
        for attempt in range(_ATTEMPTS - 1):
            try:
                return self._meet_once(f"group {name}/{attempt}", members, store, timeout_s, stateless)
            except HandshakeError:  # on every rank; with a short timeout, a busy machine does that
                continue
        return self._meet_once(f"group {name}/last", members, store, timeout_s, stateless)

    def _meet_once(
        self, name: str, members: tuple[int, ...], store: dist.Store, timeout_s: float, stateless: bool
    ) -> EplbCommunicator:
        rank, size = members.index(self._process), len(members)
        own = dist.PrefixStore(name, store)
        group: Any
        if stateless:
            group = StatelessGroup(rank, size, own)
        else:
            if dist.is_initialized():
                dist.destroy_process_group()
            dist.init_process_group("gloo", store=own, rank=rank, world_size=size)
            group = TorchGroups()
        limits = {"timeout": timeout_s, "start_timeout": _CALM_S}
        return create_eplb_communicator(group, self._config, self._weights[0], arguments=limits)

    def _gather(self, name: str, processes: Sequence[int]) -> None:
        self._store.set(f"{name} here {self._process}", "")
        self._store.wait([f"{name} here {process}" for process in processes], datetime.timedelta(seconds=_MEET_S))

    def _wake(self, trial: Trial, kind: str) -> bool:
        """Have processes that a fault of this kind has stopped go on, and wait until they are through."""
        stopped = [fault.victim for fault in trial.faults if fault.kind == kind]
        others = [process for process in trial.remaining if process not in stopped]
        through = [f"{trial.number} through {process}" for process in stopped]
        if stopped and self._process == others[0]:
            if kind == "stop":  # not before the others have given up
                awake = [f"{trial.number} through {process}" for process in others]
                self._store.wait(awake, datetime.timedelta(seconds=_MEET_S))
            else:
                self._gather_for_a_zombie(trial)
            ends = time.monotonic() + _MEET_S
            while not self._store.check(through) and time.monotonic() < ends:
                for process in stopped:  # again and again: it may not have come to its stop yet
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(self._store.get(f"pid {process}")), signal.SIGCONT)
                time.sleep(_NAP_S)
        elif stopped and kind == "zombie":
            self._gather_for_a_zombie(trial)
        if through:
            self._store.wait(through, datetime.timedelta(seconds=_MEET_S))
        return bool(stopped)

    def _gather_for_a_zombie(self, trial: Trial) -> None:
        self._gather(f"without zombie {trial.number}", trial.remaining)

    def _agreed(self, trial: Trial, placement: IntArray) -> IntArray:
        """Return what the slots hold, by all that are left: -1 where they do not say the same."""
        key = f"{trial.number} placement of"
        self._store.set(f"{key} {self._process}", msgspec.msgpack.encode(placement.tolist()))  # type: ignore[arg-type]
        keys = [f"{key} {process}" for process in trial.remaining]
        self._store.wait(keys, datetime.timedelta(seconds=_MEET_S))
        said = np.array([msgspec.msgpack.decode(bytes(value)) for value in self._store.multi_get(keys)], dtype=np.int64)
        return np.where((said == said[0]).all(axis=0), said[0], EMPTY)


def _in_place(trial: Trial, communicator: EplbCommunicator) -> InPlace:
    return "always" if trial.in_place and not communicator.may_land_late else "never"


def take_part(environment: RankEnvironment, log: str, temporary: str, *arguments: Any) -> None:
    """Run in each process.

    Args:
        environment: of the process.
        log: the file that standard error goes to.
        temporary: where temporary files go.
        arguments: of `Member`.
    """
    os.environ["TMPDIR"] = tempfile.tempdir = temporary
    errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(errors, 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a launcher in the background ignores it
    Member(environment, *arguments).live()
