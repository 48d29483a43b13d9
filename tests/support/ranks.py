"""Real ranks for tests: one set of processes runs many named scenarios, since starting and ending them takes time."""

from __future__ import annotations

import contextlib
import datetime
import functools
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.control.groups import StatelessGroup, TorchGroups
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import Outcome, RankEnvironment, collect_local_ranks
from eplb_core.testing import in_process
from eplb_core.testing.traffic import POISON, content
from eplb_core.testing.traffic import Message as Sent
from eplb_core.testing.traffic import all_pairs as all_pairs
from eplb_core.testing.traffic import ring as ring

LAUNCH_S = 110.0  # for one set of processes; below pytest's own limit, so that the processes are ended first
MEET_S = 60.0


@dataclass(frozen=True)
class Scenario:
    """One function that every rank calls as `function(member, *arguments)`."""

    name: str
    function: Callable[..., object]
    arguments: tuple[Any, ...] = ()


@dataclass
class Member:
    """What a scenario is given: the rank that it runs on."""

    environment: RankEnvironment
    device: torch.device
    kept: dict[str, EplbCommunicator] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.environment.rank

    @property
    def world_size(self) -> int:
        return self.environment.world_size

    def communicator(self, config: str | None, weights: Sequence[torch.Tensor] = (), **more: Any) -> EplbCommunicator:
        """Return a new communicator of all ranks."""
        if not weights and self.device.type != "cpu":
            weights = [torch.empty(0, device=self.device)]
        return create_eplb_communicator(TorchGroups(), config, weights, **more)

    @contextlib.contextmanager
    def shared(self, config: str) -> Iterator[EplbCommunicator]:
        """Give a communicator that other scenarios use too, as long as none of them fails."""
        if config not in self.kept:
            self.kept[config] = self.communicator(config)
        yield self.kept[config]

    def meet(self, name: str, succeeded: bool) -> bool:
        """Wait for all ranks; return whether all have succeeded. `name` is used once."""
        self.environment.store.set(f"met/{name}/{self.rank}", "yes" if succeeded else "no")
        everyone = [f"met/{name}/{rank}" for rank in range(self.world_size)]
        self.environment.store.wait(everyone, datetime.timedelta(seconds=MEET_S))
        return all(value == b"yes" for value in self.environment.store.multi_get(everyone))

    def let_go(self) -> None:
        """Close the shared communicators."""
        while self.kept:
            self.kept.popitem()[1].close()


@dataclass
class ThreadMember(Member):
    """A rank that is a thread: it has no process group, and its communicators are `in_process`."""

    def communicator(self, config: str | None, weights: Sequence[torch.Tensor] = (), **more: Any) -> EplbCommunicator:
        group = StatelessGroup(self.rank, self.world_size, self.environment.store)
        return create_eplb_communicator(group, config, weights, registry=in_process.registry(), **more)


class Report:
    """What became of each scenario on each rank, also of those that a rank could report before it died."""

    def __init__(self, outcomes: list[Outcome], results: list[dict[str, tuple[Any, str]]]) -> None:
        self.outcomes = outcomes
        self.results = results

    def returned(self, name: str) -> list[Any]:
        """Return what the scenario returned on each rank; fails with the tracebacks of the ranks that raised."""
        problems = []
        for outcome, results in zip(self.outcomes, self.results, strict=True):
            if name not in results:
                last = next(reversed(results), "none")
                told = outcome.trace or outcome.message
                problems.append(f"rank {outcome.rank} did not end it; the last one that it ended is {last!r}. {told}")
            elif results[name][1]:
                problems.append(f"rank {outcome.rank}: {results[name][1]}")
        assert not problems, "\n".join(problems)
        return [results[name][0] for results in self.results]

    @property
    def exit_codes(self) -> list[int | None]:
        return [outcome.exit_code for outcome in self.outcomes]


def run_scenarios(
    num_ranks: int,
    scenarios: Iterable[Scenario],
    *,
    device: str = "cpu",
    timeout_s: float = LAUNCH_S,
    process_group: bool = True,
) -> Report:
    """Run the scenarios one after the other on `num_ranks` ranks, which have a default process group unless told so."""
    results: list[dict[str, tuple[Any, str]]] = [{} for _ in range(num_ranks)]

    def take(rank: int, event: tuple[str, object, str]) -> None:
        results[rank][event[0]] = event[1:]

    arguments = (list(scenarios), device, process_group)
    outcomes = collect_local_ranks(perform, num_ranks, arguments, timeout_s=timeout_s, on_event=take)
    return Report(outcomes, results)


def perform(environment: RankEnvironment, scenarios: list[Scenario], device: str, process_group: bool) -> None:
    """Run in each rank: report the name of each scenario, what it returned, and the traceback of what it raised."""
    if process_group:
        environment.init_process_group(MEET_S)
    member = Member(environment, torch.device(device))
    for scenario in scenarios:
        returned, problem = None, ""
        try:
            returned = scenario.function(member, *scenario.arguments)
        except BaseException:  # noqa: BLE001 - the test that the scenario belongs to fails, the others go on
            problem = traceback.format_exc()
        try:
            if not member.meet(scenario.name, not problem):
                member.let_go()
        except dist.DistError:
            problem += "\nanother rank did not come to the end of this scenario"
            break
        finally:
            environment.report((scenario.name, returned, problem))
    member.let_go()


def run_in_threads(num_ranks: int, scenarios: Iterable[Scenario]) -> Report:
    """Run the scenarios on ranks that are threads of this process: for logic, in milliseconds."""
    results: list[dict[str, tuple[Any, str]]] = [{} for _ in range(num_ranks)]

    def work(group: StatelessGroup, scenario: Scenario) -> tuple[Any, str]:
        rank = group.rank_in_group
        environment = RankEnvironment(rank, num_ranks, rank, num_ranks, group.store)
        try:
            return scenario.function(ThreadMember(environment, torch.device("cpu")), *scenario.arguments), ""
        except BaseException:  # noqa: BLE001 - the test that the scenario belongs to fails, the others go on
            return None, traceback.format_exc()

    for scenario in scenarios:
        for rank, told in enumerate(in_process.run_ranks(num_ranks, functools.partial(work, scenario=scenario))):
            results[rank][scenario.name] = told
    return Report([Outcome(rank) for rank in range(num_ranks)], results)


def error_of(call: Callable[[], object]) -> dict[str, Any]:
    """Return what `call` raised, as plain values that can be sent to the parent: its type, text and attributes."""
    began = time.monotonic()
    try:
        call()
    except Exception as error:  # noqa: BLE001 - which one it is, is what the test asks
        plain = {key: value for key, value in vars(error).items() if isinstance(value, str | int | tuple | dict | bool)}
        return {**plain, "type": type(error).__name__, "text": str(error), "seconds": time.monotonic() - began}
    return {"type": None, "text": "", "seconds": time.monotonic() - began}


# --- traffic that every rank can compute by itself -------------------------------------------------------------------


def tensor_of(raw: np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor of `dtype` with these bytes."""
    if dtype == torch.bool:
        raw = raw & 1
    if not len(raw):
        return torch.empty(0, dtype=dtype, device=device)
    return torch.from_numpy(raw.copy()).to(device).view(dtype)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()


def exchange(member: Member, communicator: EplbCommunicator, messages: Sequence[Sent], epoch: int = 0) -> None:
    """Send and receive `messages` in one `execute()`, and compare every byte, sent ones included.

    Each rank queues in another order, which only keeps that of each pair.
    """
    index: dict[tuple[int, int], int] = {}
    sends, recvs = [], []
    for message in messages:
        pair = (message.source, message.destination)
        index[pair] = index.get(pair, -1) + 1
        raw = content(*pair, index[pair], epoch, message.nbytes)
        expected = tensor_of(raw, message.dtype, member.device)
        if message.source == member.rank:
            sends.append((expected, message.destination, bytes_of(expected)))
        if message.destination == member.rank:
            poisoned = tensor_of(np.full(message.nbytes, POISON, np.uint8), message.dtype, member.device)
            recvs.append((poisoned, message.source, bytes_of(expected)))
    recvs.sort(key=lambda entry: entry[1], reverse=bool(member.rank % 2))
    if "mode=direct" in communicator.binding.config:
        communicator.register([tensor for tensor, _, _ in (*sends, *recvs)])
    for tensor, destination, _ in sends[: len(sends) // 2]:
        communicator.add_send(tensor, destination)
    for tensor, source, _ in recvs:
        communicator.add_recv(tensor, source)
    for tensor, destination, _ in sends[len(sends) // 2 :]:
        communicator.add_send(tensor, destination)
    communicator.execute()
    for tensor, source, expected in recvs:
        assert bytes_of(tensor) == expected, f"{tensor.nbytes} bytes of {tensor.dtype} from rank {source} are wrong"
    for tensor, destination, expected in sends:
        assert bytes_of(tensor) == expected, f"a tensor sent to rank {destination} was changed"
