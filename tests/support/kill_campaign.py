"""Ranks that are killed in the middle of rearrangements, one after the other, until one is left.

Everything random follows from a seed: placements, who dies, when, and what it is doing meanwhile. The survivors of each
kill say what the placement is, have every slot compared with it, byte for byte, and rearrange among themselves.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from eplb_core.arrays import IntArray
from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.control.commit_record import CommitRecord
from eplb_core.control.groups import StatelessGroup, TorchGroups
from eplb_core.errors import HandshakeError, TransferError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import Outcome, RankEnvironment, collect_local_ranks
from eplb_core.planning.placement import EMPTY
from eplb_core.rearrange.rearranger import InPlace, Rearranger
from eplb_core.rearrange.step_runner import StepRunner

SLOTS, EXPERTS, LAYERS = 8, 7, 5
ROW = 150_001
TIMEOUT_S = 5.0
MARGIN_S = 2.0
CONFIGS = ("nixl?window=1MiB", "torch_gloo")


@dataclass(frozen=True)
class Kill:
    """One kill: who, and when.

    Attributes:
        victim: the rank in the group that is killed.
        moment: "time", or what the victim is about to do when it is killed.
        after: for "time" the fraction of a rearrangement's usual duration, else how often it may do so before.
        background: whether the rearrangement runs as a job beside "inference".
    """

    victim: int
    moment: str
    after: float
    background: bool


@dataclass
class Told:
    """What a survivor says of one kill."""

    error: str
    names_the_victim: bool
    seconds: float
    placement: IntArray
    wrong: list[tuple[int, int]]
    next_wrong: list[tuple[int, int]] = field(default_factory=list)
    lost: int = 0


MOMENTS: dict[str, tuple[type, str]] = {
    "transfer": (StepRunner, "transfer"),
    "decide": (CommitRecord, "decide"),
    "settle": (CommitRecord, "settle"),
    "commit": (StepRunner, "commit"),
}


def plan_kills(seed: int, num_ranks: int) -> list[Kill]:
    """Return one kill for each group size from `num_ranks` down to 2."""
    chance = random.Random(seed)
    kills = []
    for size in range(num_ranks, 1, -1):
        moment = chance.choice(["time", "time", *MOMENTS])
        after = chance.uniform(0, 1.1) if moment == "time" else chance.randrange(12)
        kills.append(Kill(chance.randrange(size), moment, after, chance.random() < 0.4))
    return kills


def random_placement(rng: np.random.Generator, ranks: int) -> IntArray:
    """Return a placement int64 `[layers, slots]` that has every expert, a few twice, and empty slots."""
    spare = ranks * SLOTS - EXPERTS
    rows = [
        rng.permutation(np.concatenate([np.arange(EXPERTS), rng.integers(-1, EXPERTS, spare)])) for _ in range(LAYERS)
    ]
    return np.array(rows, np.int64)


@functools.cache
def expert(layer: int, logical: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([layer, logical]).integers(0, 256, ROW, dtype=np.uint8))


class Survivor:
    """One process through all kills, or to its own."""

    def __init__(self, environment: RankEnvironment, config: str, seed: int) -> None:
        self.environment = environment
        self.config = config
        self.seed = seed
        self.kills = plan_kills(seed, environment.world_size)
        self.rng = np.random.default_rng(seed)  # the same on every rank
        self.rank = environment.rank
        self.size = environment.world_size
        self.weights = [[torch.zeros(SLOTS, ROW, dtype=torch.uint8)] for _ in range(LAYERS)]
        self.kept: list[EplbCommunicator] = []

    def in_place(self, generation: int) -> InPlace:
        """Receive into slots in two of three generations, where the backend can."""
        return "always" if "nixl" in self.config and (self.seed + generation) % 3 else "never"

    def live(self) -> None:
        placement = random_placement(self.rng, self.size)
        self.fill(placement)
        communicator = self.meet(0)
        usual = 0.0
        for generation, kill in enumerate(self.kills):
            rearranger = Rearranger(
                communicator, self.weights, window_bytes=4 * (ROW + 256), in_place=self.in_place(generation)
            )
            # Once undisturbed: everybody knows how long it takes, and nothing is lazily made any more.
            began = time.perf_counter()
            target = random_placement(self.rng, self.size)
            placement = rearranger.run(placement, target).placement
            usual = max(time.perf_counter() - began, 0.005)
            target = random_placement(self.rng, self.size)
            told = self.disturbed(rearranger, placement, target, kill, usual)
            survivors = [rank for rank in range(self.size) if rank != kill.victim]
            communicator.close()
            self.rank, self.size = survivors.index(self.rank), len(survivors)
            communicator = self.meet(generation + 1)
            following = random_placement(self.rng, self.size)
            before = {old: new for new, old in enumerate(survivors)}
            loaded: list[tuple[int, int]] = []

            def loader(layer: int, logical: int, loaded: list[tuple[int, int]] = loaded) -> Sequence[torch.Tensor]:
                loaded.append((layer, logical))
                return [expert(layer, logical)]

            result = Rearranger(communicator, self.weights).run(
                told.placement, following, ranks_before=before, loader=loader, verify="full"
            )
            placement = result.placement
            told.lost = len(loaded)
            told.next_wrong = self.wrong(following, self.rank)
            self.environment.report((generation, told))
        communicator.close()

    def disturbed(self, rearranger: Rearranger, old: IntArray, new: IntArray, kill: Kill, usual: float) -> Told:
        """Rearrange while one rank is killed, and say how it ended here."""
        rank = self.rank
        began = time.monotonic()
        with self.dying(kill, usual) if rank == kill.victim else contextlib.nullcontext():
            try:
                if kill.background:
                    placement = self.in_background(rearranger, old, new)
                else:
                    placement = rearranger.run(old, new).placement
                error, names = "", True
            except TransferError as failure:
                error = f"{type(failure).__name__}: {failure}"
                placement, names = failure.placement, kill.victim in failure.peers
            except HandshakeError as failure:
                error = f"{type(failure).__name__}: {failure}"
                placement, names = failure.placement, kill.victim in failure.missing
        if rank == kill.victim:
            os.kill(os.getpid(), signal.SIGKILL)  # it was too quick for its own end
        seconds = time.monotonic() - began
        if placement is None:
            raise AssertionError(f"{error} without a placement")
        return Told(error, names, seconds, placement, self.wrong(placement, rank))

    def in_background(self, rearranger: Rearranger, old: IntArray, new: IntArray) -> IntArray:
        job = rearranger.start(old, new)
        for _ in range(10**6):
            if job.received:
                break
            for layer in job.ready_layers():
                try:
                    job.commit(layer)
                except TransferError:
                    break
            time.sleep(0.0005)
        return job.wait(TIMEOUT_S + MARGIN_S).placement

    @contextlib.contextmanager
    def dying(self, kill: Kill, usual: float) -> Iterator[None]:
        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if kill.moment == "time":
            timer = threading.Timer(kill.after * usual, die)
            timer.daemon = True
            timer.start()
            yield
            timer.cancel()
            return
        owner, name = MOMENTS[kill.moment]
        done = getattr(owner, name)
        left = int(kill.after)

        def doing(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                die()
            return done(*arguments, **more)

        setattr(owner, name, doing)
        try:
            yield
        finally:
            setattr(owner, name, done)

    # --- groups and slots ----------------------------------------------------------------------------------------

    def meet(self, generation: int) -> EplbCommunicator:
        store = dist.PrefixStore(f"generation {generation}", self.environment.store)
        config = f"{self.config}{'&' if '?' in self.config else '?'}timeout={TIMEOUT_S:g}s"
        if self.config.startswith("nixl"):
            group: Any = StatelessGroup(self.rank, self.size, store)
        else:
            if dist.is_initialized():
                dist.destroy_process_group()
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size)
            group = TorchGroups()
        return create_eplb_communicator(group, config, self.weights[0])

    def fill(self, placement: IntArray) -> None:
        for layer in range(LAYERS):
            for slot in range(SLOTS):
                logical = int(placement[layer, self.rank * SLOTS + slot])
                if logical != EMPTY:
                    self.weights[layer][0][slot] = expert(layer, logical)

    def wrong(self, placement: IntArray, rank: int) -> list[tuple[int, int]]:
        return [
            (layer, slot)
            for layer in range(LAYERS)
            for slot in range(SLOTS)
            if (logical := int(placement[layer, rank * SLOTS + slot])) != EMPTY
            and not torch.equal(self.weights[layer][0][slot], expert(layer, logical))
        ]


def survive(environment: RankEnvironment, config: str, seed: int) -> None:
    """Run in each rank."""
    torch.set_num_threads(1)
    Survivor(environment, config, seed).live()


def run_campaign(config: str, seed: int, num_ranks: int) -> tuple[list[Outcome], list[dict[int, Told]]]:
    """Return how every rank ended, and what it told of each kill."""
    told: list[dict[int, Told]] = [{} for _ in range(num_ranks)]

    def take(rank: int, event: tuple[int, Told]) -> None:
        told[rank][event[0]] = event[1]

    limit = 90.0
    outcomes = collect_local_ranks(survive, num_ranks, (config, seed), timeout_s=limit, on_event=take, grace_s=limit)
    return outcomes, told


def problems_of(config: str, seed: int, num_ranks: int) -> list[str]:
    """Run one campaign and return what is wrong with it; every line holds what reproduces it."""
    outcomes, told = run_campaign(config, seed, num_ranks)
    kills = plan_kills(seed, num_ranks)
    alive = list(range(num_ranks))  # processes
    found: list[str] = []
    for generation, kill in enumerate(kills):
        where = f"{config}, seed {seed}, {len(alive)} ranks, {kill}"
        check: Callable[[bool, str], None] = lambda good, text, where=where: (  # noqa: E731
            None if good else found.append(f"{where}: {text}")
        )
        victim = alive.pop(kill.victim)
        check(outcomes[victim].exit_code == -signal.SIGKILL, f"the victim ended with {outcomes[victim]}")
        missing = [process for process in alive if generation not in told[process]]
        if missing:
            check(False, f"processes {missing} told nothing: {[outcomes[process] for process in missing]}")
            return found
        said = [told[process][generation] for process in alive]
        check(len({s.placement.tobytes() for s in said}) == 1, "the survivors tell different placements")
        for one in said:
            check(not one.wrong, f"slots {one.wrong} do not hold what the placement says")
            check(not one.next_wrong, f"slots {one.next_wrong} are wrong after the next rearrangement")
            check(one.names_the_victim, f"it does not name the victim: {one.error}")
            check(one.seconds < TIMEOUT_S + MARGIN_S + 1, f"it took {one.seconds:.1f} s")
        check(len({bool(s.error) for s in said}) == 1, f"some failed and some did not: {[s.error for s in said]}")
    ended_badly = [outcomes[process] for process in alive if outcomes[process].exit_code != 0]
    return found + [f"{config}, seed {seed}: the last rank ended with {outcome}" for outcome in ended_badly]
