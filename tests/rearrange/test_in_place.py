"""Experts that are received directly into slots which the placement has given up, without a copy out of a window."""

from __future__ import annotations

import itertools
import os
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.contract.payload import Payloads
from eplb_core.control.groups import StatelessGroup
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import TransferError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment, collect_local_ranks
from eplb_core.rearrange import rearranger as rearrange_module
from eplb_core.rearrange.rearranger import InPlace, Rearranger
from eplb_core.rearrange.shared_schedule import share_cuts
from eplb_core.scheduling.layer import LayerMoves
from tests.rearrange.test_rearrange import EMPTY, Weights, crossings, fill, mixed_layers, random_placement, wrong_slots
from tests.support.ranks import LAUNCH_S, Member, Report, Scenario, error_of, run_scenarios

CONFIG = "nixl?window=1MiB&timeout=20s"
POISON = 0xA5
LARGE = 48 << 20  # more than the sockets between two ranks hold
TIMEOUT_S = 1.0


def _lies_in(tensor: torch.Tensor, weights: Weights) -> bool:
    where = tensor.untyped_storage().data_ptr()
    return any(where == weight.untyped_storage().data_ptr() for layer in weights for weight in layer)


def a_chain_of_placements(member: Member, in_place: InPlace) -> list[dict[str, Any]]:
    rng = np.random.default_rng(11)
    weights = mixed_layers(member.device)
    placements = [random_placement(rng, len(weights), member.world_size) for _ in range(6)]
    fill(weights, placements[0], member.rank)
    told = []
    with member.communicator(CONFIG, weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights, window_bytes=4 * 40_192, in_place=in_place)
        landed: list[bool] = []
        add_payloads = communicator.add_payloads

        def watched(sends: Payloads, recvs: Payloads) -> None:
            landed.extend(_lies_in(payload.tensor, weights) for each in recvs.values() for payload in each)
            add_payloads(sends, recvs)

        communicator.add_payloads = watched  # type: ignore[method-assign]
        for old, new in itertools.pairwise(placements):
            landed.clear()
            result = rearranger.run(old, new)
            needed = sum(len(crossings(old, new, la, ra)) for la in range(len(old)) for ra in range(member.world_size))
            told.append(
                {
                    "wrong": wrong_slots(weights, new, member.rank),
                    "reached": np.array_equal(result.placement, new),
                    "moved": (result.moved, needed),
                    "in place": sum(landed),
                }
            )
    return told


def many_experts(member: Member) -> list[dict[str, Any]]:
    """So many that the ranks share the work of scheduling."""
    rng = np.random.default_rng(23)
    layers, slots = 8, 48
    weights = [
        [torch.zeros(slots, 64, dtype=torch.uint8), torch.zeros(slots, 3, dtype=torch.float64)] for _ in range(layers)
    ]
    total = slots * member.world_size
    placements = [np.stack([rng.permutation(np.arange(total) % (total - 9)) for _ in range(layers)]) for _ in range(4)]
    fill(weights, placements[0], member.rank)
    groups: list[int] = []

    def watched(control: ControlPlane, cut: Any, count: int, timeout_s: float) -> list[list[LayerMoves]]:
        groups.append(count)
        return share_cuts(control, cut, count, timeout_s)

    told = []
    with pytest.MonkeyPatch.context() as patch, member.communicator(CONFIG, weights[0]) as communicator:
        patch.setattr(rearrange_module, "share_cuts", watched)
        rearranger = Rearranger(communicator, weights, window_bytes=48 * 256, in_place="always")
        for old, new in itertools.pairwise(placements):
            groups.clear()
            result = rearranger.run(old, new)
            told.append({"wrong": wrong_slots(weights, new, member.rank), "groups": groups.copy()})
            assert np.array_equal(result.placement, new)
    return told


def is_told_how(member: Member) -> list[dict[str, Any]]:
    weights = mixed_layers(member.device)
    errors = []
    with member.communicator("torch_gloo") as communicator:
        errors.append(error_of(lambda: Rearranger(communicator, weights, in_place="always")))
        errors.append(error_of(lambda: Rearranger(communicator, weights, in_place="sometimes")))  # type: ignore[arg-type]
    return errors


def says_whether_bytes_land_late(member: Member, config: str) -> bool:
    with member.communicator(config) as communicator:
        return communicator.may_land_late


PROMISES = {"torch_gloo": True, "nixl?window=1MiB": False, "nixl?window=1MiB&progress=on": True}


@pytest.fixture(scope="module", params=(2, 3, 4), ids=("2 ranks", "3 ranks", "4 ranks"))
def report(request: pytest.FixtureRequest) -> Report:
    scenarios = [Scenario(f"chain {kind}", a_chain_of_placements, (kind,)) for kind in ("always", "auto", "never")]
    scenarios.append(Scenario("many", many_experts))
    scenarios.append(Scenario("told", is_told_how))
    scenarios += [Scenario(config, says_whether_bytes_land_late, (config,)) for config in PROMISES]
    return run_scenarios(request.param, scenarios)


@pytest.mark.parametrize("in_place", ["always", "auto", "never"])
def test_every_slot_holds_the_expert_that_the_placement_says(report: Report, in_place: InPlace) -> None:
    for runs in report.returned(f"chain {in_place}"):
        assert [run["wrong"] for run in runs] == [[]] * len(runs)
        assert all(run["reached"] for run in runs)
        assert all(run["moved"][0] == run["moved"][1] for run in runs)


def test_slots_are_received_into_only_where_that_is_wanted_and_pays(report: Report) -> None:
    landed = {
        kind: sum(run["in place"] for runs in report.returned(f"chain {kind}") for run in runs)
        for kind in ("always", "auto", "never")
    }
    assert landed["always"] > 50
    assert landed["auto"] == landed["never"] == 0  # so few bytes are staged sooner than a step more is taken


def test_many_experts_arrive_when_the_ranks_have_shared_the_scheduling(report: Report) -> None:
    ranks = len(report.outcomes)
    assert report.returned("many") == [[{"wrong": [], "groups": [ranks]}] * 3] * ranks


def test_what_cannot_be_is_refused(report: Report) -> None:
    for errors in report.returned("told"):
        assert [error["type"] for error in errors] == ["InputError"] * 2
        assert "promise" in errors[0]["text"]
        assert "sometimes" in errors[1]["text"]


@pytest.mark.parametrize("config", PROMISES)
def test_a_communicator_says_whether_bytes_may_land_after_an_error(report: Report, config: str) -> None:
    assert report.returned(config) == [PROMISES[config]] * len(report.outcomes)


# --- nothing lands after an error -----------------------------------------------------------------------------------


def is_stopped_while_it_is_read(environment: RankEnvironment, transports: str | None) -> dict[str, Any] | None:
    """Rank 0 stops in the middle; rank 1 gives up, uses the slot otherwise, and lets it go on."""
    if transports is not None:
        os.environ["UCX_TLS"] = transports
    store, rank = environment.store, environment.rank
    weights = [[torch.full((2, LARGE), 1 + rank, dtype=torch.uint8)]]
    old, new = np.array([[0, 1, 2, -1]]), np.array([[0, 1, 2, 1]])  # slot 1 of rank 1 was empty, and gets expert 1
    group = StatelessGroup(rank, 2, store)
    communicator = create_eplb_communicator(group, f"nixl?window=1MiB&timeout={TIMEOUT_S:g}s&mode=direct", weights[0])
    rearranger = Rearranger(communicator, weights, window_bytes=LARGE, in_place="always")
    rearranger.run(new, new)
    store.set(f"pid {rank}", str(os.getpid()))
    if rank == 0:
        _stop_once_announced(communicator)
        error = error_of(lambda: rearranger.run(old, new))
        communicator.close()
        return error
    pid = int(store.get("pid 0"))
    try:
        rearranger.run(old, new)
    except TransferError as error:
        placement = None if error.placement is None else error.placement.tolist()
    else:
        return {"placement": "it arrived"}
    slot = weights[0][0][1]
    began = int(slot[0]), int(slot[-1])  # whether any byte had arrived, for people who read a failure
    slot.fill_(POISON)
    os.kill(pid, signal.SIGCONT)
    until = time.monotonic() + 1.0
    unchanged = True
    while time.monotonic() < until:
        unchanged &= bool((slot == POISON).all())
    communicator.close()
    unchanged &= bool((slot == POISON).all())
    return {"placement": placement, "unchanged": unchanged, "began": began}


def _stop_once_announced(communicator: EplbCommunicator) -> None:
    start = communicator.start

    def stopping() -> Any:
        pending = start()
        os.kill(os.getpid(), signal.SIGSTOP)
        return pending

    communicator.start = stopping  # type: ignore[method-assign]


def test_nothing_lands_in_a_slot_after_the_error_even_if_its_source_goes_on() -> None:
    # Over shared memory a READ takes nothing of the source, and ends; over tcp it waits for it.
    outcomes = collect_local_ranks(is_stopped_while_it_is_read, 2, ("tcp,self",), timeout_s=LAUNCH_S, grace_s=20.0)
    told = outcomes[1].result
    assert told["placement"] == [[0, 1, 2, EMPTY]], told
    assert told["unchanged"], told
