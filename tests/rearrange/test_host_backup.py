"""Experts whose last holder died come back from host memory, in any layout, and no disk is asked."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_core import HostBackup
from eplb_core.arrays import IntArray
from eplb_core.control.groups import StatelessGroup, generation_group
from eplb_core.errors import LoaderError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.launch.local_ranks import RankEnvironment, collect_local_ranks
from eplb_core.planning.placement import EMPTY
from eplb_core.rearrange import host_backup, host_memory
from eplb_core.rearrange.expert_exchange import Passage, rounds
from eplb_core.rearrange.rearranger import Rearranger
from tests.rearrange.test_rearrange import EXPERTS, SLOTS, fill, mixed_layers, random_placement, row_bytes, wrong_slots
from tests.support.ranks import Member, Report, Scenario, error_of, run_scenarios

CONFIG = "nixl?window=1MiB&timeout=20s"
LIMIT_S = 90.0
LAYERS = 5


# --- ranks that die --------------------------------------------------------------------------------------------------


def on_hosts(hosts: Sequence[int]) -> None:
    """Let the ranks of this process's group take themselves to be on these hosts."""
    host_backup.hosts_of_ranks = lambda control, timeout_s: list(hosts)  # type: ignore[assignment]


def unable_to_share() -> None:
    """Let no process open memory of another one."""
    host_memory._open = lambda message, nbytes: None


def placements(ranks: int, dying: Sequence[int]) -> tuple[IntArray, IntArray]:
    """Return a placement in which some experts are on dying ranks alone, and one for those that are left."""
    rng = np.random.default_rng(7)
    old = random_placement(rng, LAYERS, ranks)
    for layer, row in enumerate(old):
        for rank in range(ranks):
            mine = slice(rank * SLOTS, (rank + 1) * SLOTS)
            if rank not in dying:
                row[mine][np.isin(row[mine], [layer % EXPERTS, (layer + 3) % EXPERTS])] = EMPTY
        row[dying[0] * SLOTS : dying[0] * SLOTS + 2] = [layer % EXPERTS, (layer + 3) % EXPERTS]
        for expert in range(EXPERTS):  # what the two have displaced
            if expert not in row:
                row[np.flatnonzero(row == EMPTY)[0]] = expert
    left = ranks - len(dying)
    new = np.array([rng.permutation(np.resize(np.arange(EXPERTS), left * SLOTS)) for _ in range(LAYERS)])
    return old, new


def outlives(
    environment: RankEnvironment, dying: tuple[int, ...], hosts: tuple[int, ...] | None, copies: int, shared: bool
) -> dict[str, Any]:
    """Keep everything, let some ranks die, and rearrange what is left into another layout."""
    if hosts is not None:
        on_hosts(hosts)
    if not shared:
        unable_to_share()
    rank, ranks = environment.rank, environment.world_size
    old, new = placements(ranks, dying)
    weights = mixed_layers(torch.device("cpu"))
    fill(weights, old, rank)
    first = create_eplb_communicator(generation_group(environment.store, 0, rank, ranks), CONFIG, weights[0])
    backup = HostBackup(first, weights, old, copies=copies)
    environment.store.set(f"kept/{rank}", "yes")
    environment.store.wait([f"kept/{other}" for other in range(ranks)])
    if rank in dying:
        os.kill(os.getpid(), signal.SIGKILL)
    first.close()
    left = [other for other in range(ranks) if other not in dying]
    here = {before: now for now, before in enumerate(left)}
    group = generation_group(environment.store, 1, here[rank], len(left))
    told: dict[str, Any] = {"nbytes": backup.nbytes, "kept": len(backup.experts)}
    with create_eplb_communicator(group, CONFIG, weights[0]) as survivors:
        rearranger = Rearranger(survivors, weights)
        try:
            result = rearranger.run(old, new, ranks_before=here, loader=backup.over(survivors))
        except LoaderError as error:
            told["error"] = str(error)
            told["lost"] = list(error.experts)
            told["wrong"] = wrong_slots(weights, error.placement, here[rank])
            told["placement"] = error.placement.tolist()
            return told
        again = np.roll(new, SLOTS, axis=1)
        told["wrong"] = wrong_slots(weights, new, here[rank])
        told["as planned"] = bool((result.placement == new).all())
        rearranger.run(new, again)  # what came back is as good as anything else
        told["wrong"] += wrong_slots(weights, again, here[rank])
    return told


def survivors_of(ranks: int, *arguments: Any) -> list[dict[str, Any]]:
    outcomes = collect_local_ranks(outlives, ranks, arguments, timeout_s=LIMIT_S, grace_s=LIMIT_S)
    dying = arguments[0]
    assert [outcome.exit_code for outcome in outcomes if outcome.rank in dying] == [-signal.SIGKILL] * len(dying)
    left = [outcome for outcome in outcomes if outcome.rank not in dying]
    assert all(outcome.succeeded for outcome in left), [outcome.trace or outcome.message for outcome in left]
    return [outcome.result for outcome in left]


CASES = {
    "one host": (3, (1,), None, 1, True),
    "the rank that shares its memory dies": (3, (0,), None, 1, True),
    "two hosts": (4, (1,), (0, 0, 1, 1), 1, True),
    "a host dies, two copies": (4, (0, 1), (0, 0, 1, 1), 2, True),
    "nothing is shared, two copies": (3, (2,), None, 2, False),
}


@pytest.mark.parametrize("case", CASES)
def test_an_expert_whose_last_holder_died_comes_back_in_another_layout(case: str) -> None:
    for told in survivors_of(*CASES[case]):
        assert told["wrong"] == []
        assert told["as planned"]


def test_what_no_host_that_is_left_has_kept_is_named_and_nothing_else_is_lost() -> None:
    old, new = placements(4, (0, 1))
    left = survivors_of(4, (0, 1), (0, 0, 1, 1), 1, True)
    assert left[0]["placement"] == left[1]["placement"]
    held = np.array(left[0]["placement"])
    lost = {
        (layer, expert) for layer in range(LAYERS) for expert in set(new[layer]) - set(old[layer, 2 * SLOTS :].tolist())
    }
    assert lost
    for told in left:
        assert told["wrong"] == []
        assert set(map(tuple, told["lost"])) == lost
        assert "kept by no host that is left" in told["error"]
    for layer in range(LAYERS):
        expected = [EMPTY if (layer, expert) in lost else expert for expert in new[layer]]
        assert held[layer].tolist() == expected


SHARES = (((0, 0, 0, 0), 1), ((0, 0, 1, 1), 1), ((0, 1, 2, 2), 2))
"""Hosts of four ranks, and on how many of them each expert is kept."""


def test_every_expert_is_kept_as_often_as_asked_and_hosts_keep_alike() -> None:
    outcomes = collect_local_ranks(keeps, 4, timeout_s=LIMIT_S)
    assert all(outcome.succeeded for outcome in outcomes), [outcome.trace for outcome in outcomes]
    payload = [sum(map(row_bytes, tensors)) for tensors in mixed_layers(torch.device("cpu"))]
    for number, (hosts, copies) in enumerate(SHARES):
        of_host = {host: outcome.result[number] for host, outcome in zip(hosts, outcomes, strict=True)}
        assert sum(len(kept) for kept, _ in of_host.values()) == copies * LAYERS * EXPERTS
        numbers = [len(kept) for kept, _ in of_host.values()]
        assert max(numbers) - min(numbers) <= 1
        for kept, nbytes in of_host.values():
            assert nbytes == sum(payload[layer] for layer, _ in kept)


def keeps(environment: RankEnvironment) -> list[tuple[list[tuple[int, int]], int]]:
    weights = mixed_layers(torch.device("cpu"))
    old = random_placement(np.random.default_rng(1), LAYERS, 4)
    fill(weights, old, environment.rank)
    group = StatelessGroup(environment.rank, 4, dist.PrefixStore("keeps", environment.store))
    told = []
    with create_eplb_communicator(group, CONFIG, weights[0]) as communicator:
        for hosts, copies in SHARES:
            on_hosts(hosts)
            backup = HostBackup(communicator, weights, old, copies=copies)
            told.append((sorted(backup.experts), backup.nbytes))
    return told


# --- ranks that stay -------------------------------------------------------------------------------------------------


def loses(member: Member, *, joins: int | None) -> list[tuple[int, int, int]]:
    """Restore two experts that no slot holds; rank `joins` has kept nothing."""
    rng = np.random.default_rng(3)
    weights = mixed_layers(member.device)
    whole, new = (random_placement(rng, LAYERS, member.world_size) for _ in range(2))
    fill(weights, whole, member.rank)
    with member.communicator(CONFIG, weights[0]) as communicator:
        backup = HostBackup(communicator, weights, whole)
        backup = HostBackup.nothing_kept(communicator, weights) if member.rank == joins else backup.over(communicator)
        old = whole.copy()
        old[np.isin(old, [1, 4])] = EMPTY
        fill(weights, old, member.rank)
        Rearranger(communicator, weights).run(old, new, loader=backup, verify="full")
    return wrong_slots(weights, new, member.rank)


def is_renewed(member: Member) -> list[Any]:
    """Load other weights, keep them, and lose them."""
    weights = mixed_layers(member.device)
    placement = random_placement(np.random.default_rng(4), LAYERS, member.world_size)
    fill(weights, placement * 0 + 17, member.rank)
    with member.communicator(CONFIG, weights[0]) as communicator:
        with torch.inference_mode():
            backup = HostBackup(communicator, weights, placement)
        fill(weights, placement, member.rank)
        backup.renew(placement)
        nothing = np.full_like(placement, EMPTY)
        fill(weights, nothing, member.rank)
        Rearranger(communicator, weights).run(nothing, placement, loader=backup)
        found: list[Any] = list(wrong_slots(weights, placement, member.rank))
        other = backup.over(communicator)
        refused = error_of(lambda: other.renew(placement))["text"]
        return found + ([] if "make a new HostBackup" in refused else [refused])


def disagrees(member: Member, what: str) -> str:
    weights = mixed_layers(member.device)
    placement = random_placement(np.random.default_rng(5), LAYERS, member.world_size)
    fill(weights, placement, member.rank)
    last = member.rank == member.world_size - 1
    given: dict[str, Callable[[], Any]] = {
        "placement": lambda: (weights, placement[:, ::-1] if last else placement, 1),
        "copies": lambda: (weights, placement, 2 if last else 1),
        "argument": lambda: (weights, placement, 0 if last else 1),
        "shape": lambda: (weights, placement[:, : -member.world_size] if last else placement, 1),
    }
    weights_given, placement_given, copies = given[what]()
    with member.communicator(CONFIG, weights[0]) as communicator:
        return str(error_of(lambda: HostBackup(communicator, weights_given, placement_given, copies=copies))["text"])


SCENARIOS = [
    Scenario("restored", functools.partial(loses, joins=None)),
    Scenario("restored where a rank has joined", functools.partial(loses, joins=0)),
    Scenario("renewed", is_renewed),
    *(Scenario(f"another {what}", disagrees, (what,)) for what in ("placement", "copies", "argument", "shape")),
]


@pytest.fixture(scope="module", params=[2, 3])
def ran(request: pytest.FixtureRequest) -> tuple[int, Report]:
    return request.param, run_scenarios(request.param, SCENARIOS)


@pytest.mark.parametrize("name", ["restored", "restored where a rank has joined", "renewed"])
def test_experts_that_no_slot_holds_are_restored_bit_for_bit(ran: tuple[int, Report], name: str) -> None:
    ranks, report = ran
    assert report.returned(name) == [[]] * ranks


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("placement", "different weights, placements or numbers of copies"),
        ("copies", "different weights, placements or numbers of copies"),
        ("argument", "at least 1 host, not 0"),
        ("shape", "shape"),
    ],
)
def test_ranks_that_differ_are_told_so_on_all_of_them(ran: tuple[int, Report], what: str, said: str) -> None:
    ranks, report = ran
    answers = report.returned(f"another {what}")
    assert len(answers) == ranks
    assert all(said in answer or "arguments of the host backup failed" in answer for answer in answers)
    assert any(said in answer for answer in answers)


# --- rounds ----------------------------------------------------------------------------------------------------------


def passage(source: int, destination: int, nbytes: int) -> Passage:
    return Passage(source, destination, 0, 0, 0, nbytes)


def test_a_round_stays_within_the_limit_on_every_rank_and_takes_one_expert_at_least() -> None:
    passages = [passage(0, 1, 60), passage(2, 1, 30), passage(0, 3, 40), passage(0, 2, 1), passage(3, 2, 500)]
    assert [[each.nbytes for each in members] for members in rounds(passages, 100)] == [[60, 30, 40], [1], [500]]
    assert list(rounds([], 100)) == []


def test_too_little_host_memory_is_an_error_on_every_rank() -> None:
    outcomes = collect_local_ranks(has_no_memory, 2, timeout_s=LIMIT_S)
    assert all(outcome.succeeded for outcome in outcomes), [outcome.trace for outcome in outcomes]
    assert all("keep fewer copies" in outcome.result for outcome in outcomes)


def has_no_memory(environment: RankEnvironment) -> str:
    def refuse(*_: Any) -> None:
        raise OSError("no memory left")

    os.posix_fallocate = refuse
    weights = mixed_layers(torch.device("cpu"))
    placement = random_placement(np.random.default_rng(1), LAYERS, 2)
    group = StatelessGroup(environment.rank, 2, dist.PrefixStore("little", environment.store))
    with create_eplb_communicator(group, CONFIG, weights[0]) as communicator:
        return str(error_of(lambda: HostBackup(communicator, weights, placement))["text"])
