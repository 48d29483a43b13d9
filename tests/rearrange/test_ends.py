"""Around the moving itself: lost experts and loaders, other generations, the end check, a store that dies."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_core.arrays import IntArray
from eplb_core.control.commit_record import CommitRecord
from eplb_core.control.groups import StatelessGroup
from eplb_core.errors import EplbError, IntegrityError, TransferError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment, collect_local_ranks
from eplb_core.planning.placement import EMPTY
from eplb_core.rearrange.rearranger import Rearranger
from eplb_core.rearrange.step_runner import PreparedStep, StepRunner
from eplb_core.scheduling.schedule import Step
from tests.rearrange.test_rearrange import SLOTS, Weights, content, fill, mixed_layers, random_placement, wrong_slots
from tests.support.ranks import Member, Report, Scenario, error_of, run_scenarios

CONFIG = "nixl?window=1MiB&timeout=20s"


class Checkpoint:
    """Brings experts, and remembers which."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.asked: list[tuple[int, int]] = []

    def __call__(self, layer: int, expert: int) -> Sequence[torch.Tensor]:
        self.asked.append((layer, expert))
        return [
            torch.from_numpy(content(layer, number, expert + 100, tensor)).view(tensor.dtype).view(tensor.shape[1:])
            if tensor.numel()
            else tensor[0]
            for number, tensor in enumerate(self.weights[layer])
        ]


def _lose(placement: IntArray, layer: int, expert: int) -> IntArray:
    after = placement.copy()
    after[layer, after[layer] == expert] = EMPTY
    return after


def loses_experts(member: Member) -> dict[str, Any]:
    rng = np.random.default_rng(11)
    weights = mixed_layers(member.device)
    whole, new = (random_placement(rng, len(weights), member.world_size) for _ in range(2))
    old = _lose(_lose(whole, 1, 2), 3, 0)
    fill(weights, old, member.rank)
    needed = [
        (layer, expert)
        for layer, expert in ((1, 2), (3, 0))
        for slot in range(SLOTS)
        if new[layer, member.rank * SLOTS + slot] == expert
    ]
    with member.communicator(CONFIG, weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights)
        refused = error_of(lambda: rearranger.run(old, new))
        untouched = wrong_slots(weights, old, member.rank)

        def broken(layer: int, expert: int) -> Sequence[torch.Tensor]:
            raise OSError(f"no file for expert {expert} of layer {layer}")

        def of_another_shape(layer: int, expert: int) -> Sequence[torch.Tensor]:
            return [torch.zeros(1)]

        loader = Checkpoint(weights)
        failed = error_of(lambda: rearranger.run(old, new, loader=broken if member.rank == 1 else loader))
        between = rearranger.placement
        assert between is not None
        kept = wrong_slots(weights, between, member.rank)
        misfit = error_of(lambda: rearranger.run(between, new, loader=of_another_shape))
        loader.asked.clear()
        result = rearranger.run(between, new, loader=loader, verify="full")
    return {
        "refused": (refused["type"], refused.get("experts")),
        "untouched": untouched,
        "failed": (failed["type"], failed["experts"]),
        "why": failed["text"],
        "misfit": misfit["text"],
        "between": np.array_equal(between, _lose(_lose(new, 1, 2), 3, 0)),
        "kept": kept,
        "asked": sorted(loader.asked) == sorted(needed),
        "reached": np.array_equal(result.placement, new),
        "wrong": wrong_slots(weights, new, member.rank),
    }


def speaks_of_other_generations(member: Member) -> dict[str, Any]:
    """Ranks 0 and 1 were a group of two, in the other order; then rank 1 is to leave."""
    rng = np.random.default_rng(12)
    weights = mixed_layers(member.device)
    of_two = random_placement(rng, len(weights), 2)
    here = np.full((len(weights), SLOTS * 3), EMPTY)
    here[:, :SLOTS], here[:, SLOTS : 2 * SLOTS] = of_two[:, SLOTS:], of_two[:, :SLOTS]
    fill(weights, here, member.rank)
    of_three = random_placement(rng, len(weights), 3)
    after_leaving = random_placement(rng, len(weights), 2)
    with member.communicator(CONFIG, weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights)
        grown = rearranger.run(of_two, of_three, ranks_before={0: 1, 1: 0})
        wrong = wrong_slots(weights, of_three, member.rank)
        shrunk = rearranger.run(of_three, after_leaving, ranks_after={0: 0, 2: 1})
        wrong += wrong_slots(weights, shrunk.placement, member.rank)
    left = shrunk.placement[:, SLOTS : 2 * SLOTS]
    stayed = np.concatenate([shrunk.placement[:, :SLOTS], shrunk.placement[:, 2 * SLOTS :]], axis=1)
    return {
        "wrong": wrong,
        "grown": np.array_equal(grown.placement, of_three),
        "left": bool((left == EMPTY).all()),
        "stayed": np.array_equal(stayed, after_leaving),
    }


def keeps_slots(member: Member) -> dict[str, Any]:
    rng = np.random.default_rng(13)
    weights = mixed_layers(member.device)
    old = random_placement(rng, len(weights), member.world_size)
    fill(weights, old, member.rank)
    mixed = old.reshape(len(weights), -1, SLOTS)[:, :, ::-1].reshape(old.shape)
    with member.communicator(CONFIG, weights[0]) as communicator:
        result = Rearranger(communicator, weights).run(old, mixed, keep_slots=True)
    return {"same": np.array_equal(result.placement, old), "steps": result.steps}


def checks_its_end(member: Member, how: str) -> dict[str, Any]:
    """Rank 1 spoils one byte of an expert that it received, behind everybody's back."""
    rng = np.random.default_rng(14)
    weights = [[torch.zeros(SLOTS, 700, dtype=torch.uint8), torch.zeros(SLOTS, 3)] for _ in range(3)]
    old, new = (random_placement(rng, 3, member.world_size) for _ in range(2))
    fill(weights, old, member.rank)
    commit = StepRunner.commit

    def spoil(runner: StepRunner, prepared: PreparedStep, stream: Any) -> None:
        commit(runner, prepared, stream)
        if member.rank == 1:
            step = prepared.step
            changed = step.changes[(step.changes[:, 1] // SLOTS == 1) & (step.changes[:, 2] != EMPTY)]
            layer, slot, _ = changed[0].tolist()
            weights[layer][0][slot - SLOTS, 77] ^= 0x20

    with member.communicator("torch_gloo?timeout=20s", weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights)
        StepRunner.commit = spoil  # type: ignore[method-assign]
        try:
            error = error_of(lambda: rearranger.run(old, new, verify=how))
        finally:
            StepRunner.commit = commit  # type: ignore[method-assign]
        placement = rearranger.placement
        assert placement is not None
        # What is not known to be good any more is lost; its other copies, or a loader, bring it back.
        repaired = rearranger.run(placement, new, loader=Checkpoint(weights), verify=how)
    return {
        **{key: error[key] for key in ("type", "peers", "text")},
        "emptied": int((placement != new).sum()),
        "only": bool((placement[placement != new] == EMPTY).all()),
        "wrong": wrong_slots(weights, placement, member.rank) + wrong_slots(weights, repaired.placement, member.rank),
    }


def notices_different_copies(member: Member) -> dict[str, Any]:
    weights = [[torch.zeros(SLOTS, 700, dtype=torch.uint8)]]
    old = np.tile(np.arange(SLOTS), (1, member.world_size))
    fill(weights, old, member.rank)
    if member.rank == 1:
        weights[0][0][2, 5] ^= 1
    with member.communicator("torch_gloo?timeout=20s", weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights)
        error = error_of(lambda: rearranger.run(old, old[:, ::-1], verify="full"))
        placement = rearranger.placement
        bad = error_of(lambda: rearranger.run(old, old, verify="perhaps"))  # type: ignore[arg-type]
    return {**error, "untouched": np.array_equal(placement, old), "bad": bad["type"]}


def names_experts_that_arrived_wrong(member: Member) -> list[Any]:
    """A transport that checks for itself says `(peer, index)`; the rearranger says which expert that is."""
    weights = mixed_layers(member.device)
    runner_of: list[StepRunner] = []
    with member.communicator("torch_gloo?timeout=20s", weights[0]) as communicator:
        runner_of.append(Rearranger(communicator, weights)._runner)
    rows = [
        (0, 5, 1, 0, 0, 0),
        (4, 3, 1, 0, 0, 0),  # its second tensor has no bytes
        (2, 1, 2, 0, 0, 0),
        (1, 9, 1, 2, 2, 0),  # another rank's
        (3, 2, 1, 0, 0, 0),
    ]
    empty = np.empty((0, 7), np.int64)
    step = Step(
        np.array(rows, np.int64), empty, np.empty((0, 3), np.int64), np.zeros(3, np.int64), np.empty(0, np.int64)
    )
    error = IntegrityError("wrong", wrong=[(1, 2), (1, 3), (2, 1), (1, 4)])
    runner_of[0].name_experts(error, step)
    return list(error.experts)


@functools.cache
def report_of_three() -> Report:
    scenarios = [
        Scenario("lost", loses_experts),
        Scenario("generations", speaks_of_other_generations),
        Scenario("slots", keeps_slots),
        Scenario("end sample", checks_its_end, ("sample",)),
        Scenario("end full", checks_its_end, ("full",)),
        Scenario("copies", notices_different_copies),
        Scenario("names", names_experts_that_arrived_wrong),
    ]
    return run_scenarios(3, scenarios)


@pytest.fixture(scope="module")
def three() -> Report:
    return report_of_three()


def test_experts_that_nobody_holds_are_named_and_nothing_moves_without_a_loader(three: Report) -> None:
    for one in three.returned("lost"):
        assert one["refused"] == ("LostExpertsError", ((1, 2), (3, 0)))
        assert one["untouched"] == []


def test_a_loader_brings_the_experts_that_nobody_holds(three: Report) -> None:
    for one in three.returned("lost"):
        assert one["asked"]
        assert one["reached"]
        assert one["wrong"] == []


def test_a_loader_that_fails_on_one_rank_leaves_everything_else_in_its_new_place(three: Report) -> None:
    for one in three.returned("lost"):
        assert one["failed"] == ("LoaderError", ((1, 2), (3, 0)))
        assert "rank 1" in one["why"]
        assert "no file for expert" in one["why"]
        assert "1 tensors instead of" in one["misfit"]
        assert one["between"]
        assert one["kept"] == []


def test_placements_of_other_generations_are_understood(three: Report) -> None:
    for one in three.returned("generations"):
        assert one == {"wrong": [], "grown": True, "left": True, "stayed": True}


def test_experts_that_stay_can_keep_their_slots(three: Report) -> None:
    assert three.returned("slots") == [{"same": True, "steps": 0}] * 3


@pytest.mark.parametrize("how", ["sample", "full"])
def test_the_end_check_finds_a_spoilt_byte_and_empties_its_slot_in_the_placement(three: Report, how: str) -> None:
    for one in three.returned(f"end {how}"):
        assert one["type"] == "IntegrityError"
        assert one["peers"] == (1,)
        assert 1 <= one["emptied"] <= 3
        assert one["only"]
        assert one["wrong"] == []


def test_copies_that_differ_are_noticed_before_anything_moves(three: Report) -> None:
    for one in three.returned("copies"):
        assert one["type"] == "IntegrityError"
        assert "expert 2 of layer 0" in one["text"]
        assert one["untouched"]
        assert one["bad"] == "InputError"


def test_what_a_transport_found_wrong_is_named_as_experts(three: Report) -> None:
    assert three.returned("names")[0] == [(0, 5, 1), (2, 1, 2), (3, 2, 1), (4, 3, 1)]


def test_every_rank_exits_in_order(three: Report) -> None:
    assert three.exit_codes == [0] * 3


# --- the store dies ---------------------------------------------------------------------------------------------------


def hosts_the_store(environment: RankEnvironment) -> dict[str, Any] | None:
    """Rank 2 hosts the store of the group, against all advice, and dies just before a step is decided."""
    if environment.rank == 2:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment.store.set("port", str(server.port))
    port = int(environment.store.get("port"))
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    rng = np.random.default_rng(15)
    weights = [[torch.zeros(SLOTS, 4001, dtype=torch.uint8)] for _ in range(4)]
    old, new = (random_placement(rng, 4, 3) for _ in range(2))
    fill(weights, old, environment.rank)
    communicator = create_eplb_communicator(StatelessGroup(environment.rank, 3, store), "nixl?timeout=5s", weights[0])
    rearranger = Rearranger(communicator, weights, window_bytes=3 * 4096, in_place="never")
    decisions = 0
    decide = CommitRecord.decide

    def die(record: CommitRecord, *arguments: Any, **more: Any) -> Any:
        nonlocal decisions
        decisions += 1
        if decisions == 3 and environment.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return decide(record, *arguments, **more)

    CommitRecord.decide = die  # type: ignore[method-assign]
    try:
        rearranger.run(old, new)
    except TransferError as error:
        placement = error.placement if error.placement is not None else np.full_like(old, 99)
        told = {
            "type": type(error).__name__,
            "placement": placement,
            "wrong": wrong_slots(weights, placement, environment.rank),
            "old": old,
        }
        communicator.close()
        return told
    return None


def test_when_the_store_dies_with_its_host_what_nobody_can_know_is_said_to_be_unknown() -> None:
    outcomes = collect_local_ranks(hosts_the_store, 3, (), timeout_s=60, grace_s=60)
    for outcome in outcomes[:2]:
        assert outcome.succeeded, outcome
        assert outcome.result["type"] == "DecisionUnknownError"
        assert outcome.result["wrong"] == []
        unknown = (outcome.result["placement"] == EMPTY) & (outcome.result["old"] != EMPTY)
        assert unknown.any()


def loses_the_store(environment: RankEnvironment) -> dict[str, Any]:
    """The ranks have gathered without the store for a while when it dies, between two rearrangements."""
    server = None
    if environment.rank == 2:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment.store.set("port", str(server.port))
    store = dist.TCPStore("127.0.0.1", int(environment.store.get("port")), is_master=False)
    rng = np.random.default_rng(16)
    weights = [[torch.zeros(SLOTS, 4001, dtype=torch.uint8)] for _ in range(4)]
    old, new = (random_placement(rng, 4, 3) for _ in range(2))
    fill(weights, old, environment.rank)
    communicator = create_eplb_communicator(StatelessGroup(environment.rank, 3, store), "nixl?timeout=5s", weights[0])
    rearranger = Rearranger(communicator, weights)
    for _ in range(5):
        rearranger.run(old, old)
    environment.store.set(f"ready/{environment.rank}", "yes")
    environment.store.wait([f"ready/{rank}" for rank in range(3)])
    if server is not None:
        del server
        environment.store.set("gone", "yes")
    environment.store.wait(["gone"])
    told: dict[str, Any] = {}
    try:
        rearranger.run(old, new)
    except EplbError as error:
        told = {"type": type(error).__name__, "old": np.array_equal(error.placement, old)}
    told["wrong"] = wrong_slots(weights, old, environment.rank)
    with contextlib.suppress(EplbError):
        communicator.close()
    return told


def test_ranks_that_need_no_store_to_agree_begin_nothing_without_one() -> None:
    outcomes = collect_local_ranks(loses_the_store, 3, (), timeout_s=60, grace_s=60)
    for outcome in outcomes:
        assert outcome.succeeded, outcome
        assert outcome.result == {"type": "HandshakeError", "old": True, "wrong": []}
