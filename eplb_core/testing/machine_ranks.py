"""Ranks that do what they are told, one call at a time: threads of this process, or processes of their own."""

from __future__ import annotations

import contextlib
import datetime
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
import torch.distributed as dist

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.control.groups import StatelessGroup, TorchGroups
from eplb_core.errors import EplbError, TransferError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import store_of_this_machine
from eplb_core.launch.rank_process import RankProcess, start_rank
from eplb_core.registry.config import parse_config
from eplb_core.registry.registry import Registry, default_registry
from eplb_core.testing.traffic import POISON, bytes_of, content

_START_S = 60.0  # for the ranks to meet
_ANSWER_S = 60.0  # for what a rank is told to do; its own deadlines come first
_JOIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Said:
    """What came of a call on one rank.

    Attributes:
        kind: the class name of what was raised, or nothing.
        error: its text.
        own: whether it is an error of eplb.
        usable: of a `TransferError`.
        wrong: what is wrong with the bytes, or nothing.
    """

    kind: str = ""
    error: str = ""
    own: bool = True
    usable: bool = False
    wrong: str = ""


class Ranks(Protocol):
    """So many ranks, all of them waiting for a call."""

    size: int

    def all(self, calls: Sequence[tuple[Any, ...] | None]) -> list[Said]:
        """Have each rank make its call, all at once; None leaves a rank alone. Return what came of them."""

    def end(self) -> None:
        """End them."""


class RankOfMachine:
    """What one rank does.

    Args:
        rank: its number.
        size: how many there are.
        store: where they meet.
        config: the backend.
        timeout_s: its timeout, in seconds.
        registry: where to look it up.
    """

    def __init__(
        self, rank: int, size: int, store: dist.Store, config: str, timeout_s: float, registry: Registry | None
    ) -> None:
        self._rank, self._size, self._store = rank, size, store
        self._config, self._timeout_s, self._registry = config, timeout_s, registry
        self._communicator: EplbCommunicator | None = None
        self._queued: list[tuple[torch.Tensor, bytes, int, bool]] = []
        entry = (registry or default_registry()).select(parse_config(config))
        self._stateless = entry.spec is not None and entry.spec.capabilities.stateless_groups

    def do(self, name: str, *arguments: Any) -> Said:
        """Do one thing, and say what came of it."""
        try:
            return Said(wrong=getattr(self, f"_{name}")(*arguments) or "")
        except EplbError as error:
            usable = isinstance(error, TransferError) and error.usable
            wrong = self._forget_queue(sent_only=True) if name == "execute" else ""
            return Said(type(error).__name__, str(error), usable=usable, wrong=wrong)
        except Exception as error:  # noqa: BLE001 - it is what is looked for
            return Said(type(error).__name__, str(error), own=False)

    def _create(self, generation: int) -> None:
        with contextlib.suppress(Exception):  # an earlier program has seen it
            self._close()
        self._communicator = None
        own = dist.PrefixStore(f"generation {generation}", self._store)
        group: Any
        if self._stateless:
            group = StatelessGroup(self._rank, self._size, own)
        else:
            if dist.is_initialized():
                dist.destroy_process_group()
            dist.init_process_group("gloo", store=own, rank=self._rank, world_size=self._size)
            group = TorchGroups()
        limits = {"timeout": self._timeout_s, "start_timeout": _START_S}
        self._communicator = create_eplb_communicator(group, self._config, arguments=limits, registry=self._registry)

    def _send(self, peer: int, index: int, epoch: int, nbytes: int) -> None:
        expected = content(self._rank, peer, index, epoch, nbytes)
        tensor = torch.from_numpy(expected.copy())
        self._made.add_send(tensor, peer)
        self._queued.append((tensor, expected.tobytes(), peer, True))

    def _receive(self, peer: int, index: int, epoch: int, nbytes: int) -> None:
        expected = content(peer, self._rank, index, epoch, nbytes)
        tensor = torch.full((nbytes,), POISON, dtype=torch.uint8)
        self._made.add_recv(tensor, peer)
        self._queued.append((tensor, expected.tobytes(), peer, False))

    def _refuse(self, how: str) -> None:
        tensor = torch.zeros(6, 2, dtype=torch.uint8)
        if how == "itself":
            self._made.add_send(tensor, self._rank)
        elif how == "nobody":
            self._made.add_recv(tensor, self._size)
        else:
            self._made.add_send(tensor.t(), (self._rank + 1) % self._size)

    def _register(self, nbytes: int, landing: bool) -> None:
        self._made.register([torch.zeros(nbytes, dtype=torch.uint8)], landing=landing)

    def _execute(self) -> str:
        self._made.execute()
        return self._forget_queue(sent_only=False)

    def _close(self) -> None:
        if self._communicator is not None:
            self._communicator.close()
        self._queued.clear()

    @property
    def _made(self) -> EplbCommunicator:
        if self._communicator is None:
            raise AssertionError("there is no communicator")
        return self._communicator

    def _forget_queue(self, *, sent_only: bool) -> str:
        """Return what is wrong with the bytes of what was queued."""
        queued, self._queued = self._queued, []
        for tensor, expected, peer, is_sent in queued:
            if (is_sent or not sent_only) and bytes_of(tensor).tobytes() != expected:
                return f"{len(expected)} bytes {'to' if is_sent else 'from'} rank {peer} are wrong"
        return ""


class ThreadRanks:
    """Ranks that are threads of this process; arguments as of `RankOfMachine`."""

    def __init__(self, size: int, config: str, timeout_s: float, registry: Registry | None) -> None:
        self.size = size
        store = dist.HashStore()
        self._told: list[queue.SimpleQueue[tuple[Any, ...] | None]] = [queue.SimpleQueue() for _ in range(size)]
        self._said: list[queue.SimpleQueue[Said]] = [queue.SimpleQueue() for _ in range(size)]

        def work(rank: int) -> None:
            own = RankOfMachine(rank, size, store, config, timeout_s, registry)
            while (call := self._told[rank].get()) is not None:
                self._said[rank].put(own.do(*call))

        self._threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
        for thread in self._threads:
            thread.start()

    def all(self, calls: Sequence[tuple[Any, ...] | None]) -> list[Said]:
        """As `Ranks.all`."""
        for told, call in zip(self._told, calls, strict=True):
            if call is not None:
                told.put(call)
        return [
            said.get(timeout=_ANSWER_S) if call is not None else Said()
            for said, call in zip(self._said, calls, strict=True)
        ]

    def end(self) -> None:
        """As `Ranks.end`."""
        for told in self._told:
            told.put(None)
        for thread in self._threads:
            thread.join(_JOIN_S)


class ProcessRanks:
    """Ranks that are processes of this machine; arguments as of `RankOfMachine`."""

    def __init__(self, size: int, config: str, timeout_s: float) -> None:
        self.size = size
        self._store = store_of_this_machine()
        self._ranks: list[tuple[RankProcess, Connection]] = []
        try:
            for rank in range(size):
                self._ranks.append(
                    start_rank(_serve, (rank, size, self._store.port, config, timeout_s), f"rank {rank}")
                )
        except BaseException:
            self.end()
            raise

    def all(self, calls: Sequence[tuple[Any, ...] | None]) -> list[Said]:
        """As `Ranks.all`."""
        for (_, pipe), call in zip(self._ranks, calls, strict=True):
            if call is not None:
                pipe.send(call)
        return [self._answer(rank) if call is not None else Said() for rank, call in enumerate(calls)]

    def _answer(self, rank: int) -> Said:
        process, pipe = self._ranks[rank]
        with contextlib.suppress(EOFError, OSError):
            if pipe.poll(_ANSWER_S):
                said: Said = pipe.recv()
                return said
        process.join(0.1)
        return Said("silence", f"rank {rank} did not answer; its exit code is {process.exitcode}", own=False)

    def end(self) -> None:
        """As `Ranks.end`."""
        for _, pipe in self._ranks:
            pipe.close()
        for process, _ in self._ranks:
            process.join(_JOIN_S)
            process.kill()
            process.join(_JOIN_S)
            process.close()
        self._ranks = []


def _serve(rank: int, size: int, port: int, config: str, timeout_s: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=_START_S)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=limit)
    own = RankOfMachine(rank, size, store, config, timeout_s, None)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(own.do(*pipe.recv()))
    own.do("close")
    if dist.is_initialized():
        dist.destroy_process_group()
