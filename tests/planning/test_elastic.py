"""Ranks come and go between rearrangements, as processes of their own, and every weight is right after each step."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_core.control.groups import generation_group
from eplb_core.errors import PlacementError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.planning.generations import rank_mapping, remap_placement, reverse_mapping
from eplb_core.rearrange.rearranger import Rearranger

LAYERS, SLOTS, LOGICAL = 2, 4, 6
SHAPES = ((3, 5), (2000,))
PATIENCE_S = 50.0

# Which processes make up each generation; their ranks in it are their places in the list. Process 1 leaves from the
# middle, so that those behind it get other ranks. 2 -> 4 -> 3 -> 2.
GENERATIONS = ([0, 1], [0, 1, 2, 3], [0, 2, 3], [0, 3])


# --- placements said in other ranks -----------------------------------------------------------------------------------


def test_ranks_that_stay_keep_their_slots_and_new_ranks_have_empty_ones() -> None:
    remapped = remap_placement([[1, 2, 3, 4]], 2, {0: 2, 1: 0}, 3)
    assert remapped.tolist() == [[3, 4, -1, -1, 1, 2]]


def test_slots_of_a_rank_that_leaves_are_left_out() -> None:
    remapped = remap_placement([[1, 2, 3, 4, 5, 6]], 3, {0: 0, 2: 1}, 2)
    assert remapped.tolist() == [[1, 2, 5, 6]]


def test_there_and_back_is_the_same_placement() -> None:
    placement = np.random.default_rng(3).integers(-1, 9, (3, 8))
    there = {0: 3, 1: 1, 2: 4, 3: 0}
    back = {new: old for old, new in there.items()}
    assert (remap_placement(remap_placement(placement, 4, there, 5), 5, back, 4) == placement).all()


def test_slots_of_a_dead_rank_are_empty_where_the_survivors_keep_their_ranks() -> None:
    assert remap_placement([[1, 2, 3, 4, 5, 6]], 3, {0: 0, 2: 2}, 3).tolist() == [[1, 2, -1, -1, 5, 6]]


def test_ranks_in_another_order_take_their_slots_along() -> None:
    assert remap_placement([[1, 2, 3, 4, 5, 6]], 3, {0: 1, 1: 2, 2: 0}, 3).tolist() == [[5, 6, 1, 2, 3, 4]]


def test_a_rank_may_leave_while_another_joins() -> None:
    mapping = rank_mapping(["a", "b", "c"], ["c", "new", "a"])
    assert mapping == {0: 2, 2: 0}
    assert remap_placement([[1, 2, 3, 4, 5, 6]], 3, mapping, 3).tolist() == [[5, 6, -1, -1, 1, 2]]


def test_minus_one_says_that_a_rank_leaves() -> None:
    assert remap_placement([[1, 2, 3, 4, 5, 6]], 3, {0: 0, 1: -1, 2: 1}, 2).tolist() == [[1, 2, 5, 6]]


def test_the_mapping_back_is_that_of_the_members_the_other_way_round() -> None:
    before, after = [10, 11, 12, 13], [13, 10, 14]
    assert reverse_mapping(rank_mapping(before, after)) == rank_mapping(after, before) == {0: 3, 1: 0}
    assert reverse_mapping({0: 1, 1: -1, 2: -1}) == {1: 0}


def test_a_member_that_is_there_twice_is_refused() -> None:
    with pytest.raises(PlacementError, match="'a' is a member of the generation after twice"):
        rank_mapping(["a", "b"], ["a", "b", "a"])


def test_a_mapping_back_of_two_ranks_that_become_one_is_refused() -> None:
    with pytest.raises(PlacementError, match="old ranks 0, 2 all new rank 5"):
        reverse_mapping({0: 5, 1: 4, 2: 5})


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({2: -1}, "old rank 2"),
        ({0: -2}, "new rank -2"),
        ({2: 0}, "old rank 2"),
        ({-1: 0}, "old rank -1"),
        ({0: 3}, "new rank 3"),
        ({0: 1, 1: 1}, "old ranks 0, 1 all new rank 1"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(mapping: Mapping[int, int], words: str) -> None:
    with pytest.raises(PlacementError, match=words):
        remap_placement([[1, 2, 3, 4]], 2, mapping, 3)


# --- real processes ---------------------------------------------------------------------------------------------------


def wanted(generation: int) -> np.ndarray:
    """Return the placement to reach in a generation, int64 `[layers, slots]`; every expert at least once."""
    slots = len(GENERATIONS[generation]) * SLOTS
    rng = np.random.default_rng(generation + 11)
    return np.stack([rng.permutation(np.resize(np.arange(LOGICAL), slots)) for _ in range(LAYERS)])


def expert(layer: int, tensor: int, logical: int) -> torch.Tensor:
    """Return one tensor of one expert: random, and a function of nothing but the arguments."""
    rng = np.random.default_rng([layer, tensor, logical])
    return torch.from_numpy(rng.random(SHAPES[tensor], dtype=np.float32))


@dataclass
class Life:
    """One process through all generations that it is part of."""

    process: int
    config: str
    store: dist.Store
    weights: list[list[torch.Tensor]] = field(default_factory=list)
    said: list[Any] = field(default_factory=list)

    def live(self) -> list[Any]:
        self.weights = [[torch.full((SLOTS, *shape), -1.0) for shape in SHAPES] for _ in range(LAYERS)]
        memberships = [g for g, members in enumerate(GENERATIONS) if self.process in members]
        communicator = self.communicator(memberships[0])
        if memberships[0] == 0:
            self.load(wanted(0))
            self.store.set(f"loaded/{self.process}", "")
        else:
            self.grow(communicator, memberships[0])
            self.settle(communicator, memberships[0])
        for generation in memberships[1:]:
            following = self.follow(communicator, generation)
            communicator.close()
            communicator = following
            self.settle(communicator, generation)
        if memberships[-1] + 1 < len(GENERATIONS):
            self.hand_over(communicator, memberships[-1])
        communicator.close()
        return self.said

    def settle(self, communicator: Any, generation: int) -> None:
        """Work on in a generation once the old communicator is closed and those that left are gone."""
        self.check(generation, wanted(generation), "after the old communicator was closed")
        gone = [f"gone/{process}" for process in GENERATIONS[generation - 1] if process not in GENERATIONS[generation]]
        self.store.wait([*gone, "loaded/0"])
        self.rearrange(communicator, generation, wanted(generation), wanted(generation)[:, ::-1])
        self.rearrange(communicator, generation, wanted(generation)[:, ::-1], wanted(generation))

    def follow(self, communicator: Any, generation: int) -> Any:
        """Go from one generation to the next; both communicators exist meanwhile."""
        if len(GENERATIONS[generation]) > len(GENERATIONS[generation - 1]):
            following = self.communicator(generation)
            self.grow(following, generation)
            return following
        self.hand_over(communicator, generation - 1)
        return self.communicator(generation)

    def grow(self, communicator: Any, generation: int) -> None:
        old = wanted(generation - 1)
        before, after = GENERATIONS[generation - 1], GENERATIONS[generation]
        new_rank_of = {before.index(process): after.index(process) for process in before}
        remapped = remap_placement(old, len(before), new_rank_of, len(after))
        self.rearrange(communicator, generation, remapped, wanted(generation))

    def hand_over(self, communicator: Any, generation: int) -> None:
        """Move, among the old ranks, to what those that stay shall hold."""
        before, after = GENERATIONS[generation], GENERATIONS[generation + 1]
        old_rank_of = {after.index(process): before.index(process) for process in after}
        target = remap_placement(wanted(generation + 1), len(after), old_rank_of, len(before))
        self.rearrange(communicator, generation, wanted(generation), target)

    def rearrange(self, communicator: Any, generation: int, old: np.ndarray, new: np.ndarray) -> None:
        result = Rearranger(communicator, self.weights).run(old, new)
        assert (result.placement == new)[new >= 0].all()
        self.check(generation, new, "after a rearrangement")

    def check(self, generation: int, placement: np.ndarray, when: str) -> None:
        rank = GENERATIONS[generation].index(self.process)
        for layer, tensors in enumerate(self.weights):
            for slot in range(SLOTS):
                logical = int(placement[layer, rank * SLOTS + slot])
                for number, tensor in enumerate(tensors):
                    if logical >= 0:
                        expected = expert(layer, number, logical)
                        assert torch.equal(tensor[slot], expected), f"{when}: layer {layer}, slot {slot} is wrong"
        self.said.append((generation, when))

    def load(self, placement: np.ndarray) -> None:
        rank = GENERATIONS[0].index(self.process)
        for layer, tensors in enumerate(self.weights):
            for slot in range(SLOTS):
                for number, tensor in enumerate(tensors):
                    tensor[slot] = expert(layer, number, int(placement[layer, rank * SLOTS + slot]))
        self.check(0, placement, "loaded")

    def communicator(self, generation: int) -> Any:
        members = GENERATIONS[generation]
        group = generation_group(self.store, generation, members.index(self.process), len(members))
        return create_eplb_communicator(group, self.config)


def live(process: int, config: str, port: int, pipe: Connection) -> None:
    """Run in each process."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=PATIENCE_S)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timeout)
        pipe.send((os.getpid(), Life(process, config, store).live(), ""))
    except BaseException:  # noqa: BLE001 - the test shows it
        pipe.send((os.getpid(), [], traceback.format_exc()))


@pytest.mark.parametrize("config", ["nixl?window=128KiB"])
def test_scaling_from_2_to_4_to_3_to_2_keeps_every_weight_right_and_restarts_no_process(config: str) -> None:
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=PATIENCE_S)
    )
    context = multiprocessing.get_context("spawn")
    processes: dict[int, Any] = {}
    pipes: dict[int, Connection] = {}
    reports: dict[int, tuple[int, list[Any], str]] = {}
    deadline = time.monotonic() + PATIENCE_S

    def start(number: int) -> None:
        pipes[number], theirs = context.Pipe()
        processes[number] = context.Process(target=live, args=(number, config, store.port, theirs))
        processes[number].start()
        theirs.close()

    try:
        start(0)
        start(1)
        while not store.check(["loaded/0", "loaded/1"]):
            ended = wait(list(pipes.values()), timeout=0.05)
            assert not ended, [pipe.recv() for pipe in ended]  # type: ignore[union-attr]
            assert time.monotonic() < deadline, "the first generation did not start"
        start(2)
        start(3)
        for number in (1, 2, 0, 3):  # the order in which they leave
            assert pipes[number].poll(max(0.0, deadline - time.monotonic())), f"process {number} did not end"
            reports[number] = pipes[number].recv()
            processes[number].join(max(0.0, deadline - time.monotonic()))
            assert processes[number].exitcode == 0
            assert reports[number][2] == "", f"process {number}"
            store.set(f"gone/{number}", "")
    finally:
        for process in processes.values():
            if process.is_alive():
                process.kill()
                process.join()
    assert len({pid for pid, _, _ in reports.values()}) == 4
    seen = {number: sorted({generation for generation, _ in said}) for number, (_, said, _) in reports.items()}
    assert seen == {0: [0, 1, 2, 3], 1: [0, 1], 2: [1, 2], 3: [1, 2, 3]}
