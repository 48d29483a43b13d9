"""What is asked for again is not worked out again, takes no message to the store, and comes out right all the same."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eplb_core.errors import EplbError, HandshakeError, PlacementError
from eplb_core.planning.placement import IntArray
from eplb_core.planning.plan import RearrangementPlan, plan_rearrangement
from eplb_core.rearrange import rearranger as rearranger_module
from eplb_core.rearrange.known_plan import KnownPlans
from eplb_core.rearrange.rearranger import Rearranger
from tests.support.ranks import Member, Report, Scenario, run_scenarios

SLOTS, EXPERT_BYTES, LAYERS = 4, 640, 3
BACKEND = "torch_gloo?timeout=20s"
MESSAGES = ("set", "get", "add", "wait", "check", "compare_set", "multi_get", "delete_key")

# --- plans of one process --------------------------------------------------------------------------------------------

OLD = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
NEW = np.array([[2, 1, 0, 3], [3, 2, 1, 0]])


class Counted:
    """Makes plans, and counts them."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, old: object, new: object, **how: Any) -> Callable[[], RearrangementPlan]:
        def make() -> RearrangementPlan:
            self.made += 1
            return plan_rearrangement(old, new, 2, **how)  # type: ignore[arg-type]

        return make


def test_a_plan_is_made_once_for_equal_placements_in_other_arrays() -> None:
    plans, make = KnownPlans(), Counted()
    first = plans.find(OLD, NEW, (), make(OLD, NEW))
    assert plans.find(OLD.copy(), NEW.copy(), (), make(OLD, NEW)) is first
    assert make.made == 1
    assert first.plan == plan_rearrangement(OLD, NEW, 2)


def test_an_array_that_its_owner_has_changed_is_another_placement() -> None:
    plans, make = KnownPlans(), Counted()
    mine = NEW.copy()
    plans.find(OLD, mine, (), make(OLD, mine))
    mine[0] = OLD[0]
    assert plans.find(OLD, mine, (), make(OLD, mine)).plan.num_moves == 0
    assert plans.find(OLD, NEW, (), make(OLD, NEW)).plan.num_moves == 2
    assert make.made == 2


def test_what_a_plan_depends_on_besides_makes_it_another_one() -> None:
    plans, make = KnownPlans(), Counted()
    turned = OLD[:, [1, 0, 3, 2]]
    moved = plans.find(OLD, turned, False, make(OLD, turned))
    kept = plans.find(OLD, turned, True, make(OLD, turned, keep_slots=True))
    assert (moved.plan.num_moves, kept.plan.num_moves) == (8, 0)


@pytest.mark.parametrize("wrong", [NEW + 0.0, NEW.tolist()[:1], NEW - 2], ids=["floats", "a layer less", "below -1"])
def test_what_a_plan_refuses_is_refused_again(wrong: Any) -> None:
    plans, make = KnownPlans(), Counted()
    plans.find(OLD, NEW, (), make(OLD, NEW))
    for _ in range(2):
        with pytest.raises(PlacementError):
            plans.find(OLD, wrong, (), make(OLD, wrong))


def test_only_the_last_few_are_kept_those_that_are_used_longest() -> None:
    plans, make = KnownPlans(), Counted()
    others = [np.roll(OLD, shift, axis=1) for shift in (1, 2, 3)] + [np.roll(NEW, shift, axis=1) for shift in (1, 2)]
    for other in others:
        plans.find(OLD, NEW, (), make(OLD, NEW))
        plans.find(OLD, other, (), make(OLD, other))
    assert make.made == 1 + len(others)
    plans.find(OLD, others[0], (), make(OLD, others[0]))
    assert make.made == 2 + len(others)


# --- ranks -----------------------------------------------------------------------------------------------------------


def placements(ranks: int) -> list[IntArray]:
    """Return two placements of which each layer differs, every expert on one rank."""
    slots = ranks * SLOTS
    first = np.stack([np.roll(np.arange(slots), layer) for layer in range(LAYERS)])
    return [first, np.roll(first, SLOTS + 1, axis=1)]


def byte_of(layer: int, expert: int) -> int:
    return 1 + layer * 64 + expert


def weights_of(rank: int, placement: IntArray) -> list[list[torch.Tensor]]:
    mine = placement[:, rank * SLOTS : (rank + 1) * SLOTS]
    return [
        [torch.stack([torch.full((EXPERT_BYTES,), byte_of(layer, int(e)), dtype=torch.uint8) for e in mine[layer]])]
        for layer in range(LAYERS)
    ]


def is_right(weights: list[list[torch.Tensor]], rank: int, placement: IntArray) -> bool:
    expected = weights_of(rank, placement)
    return all(torch.equal(a[0], b[0]) for a, b in zip(weights, expected, strict=True))


def count_messages(counted: Counter[str]) -> None:
    """Count what this process asks the store."""
    for name in MESSAGES:
        asked = getattr(dist.PrefixStore, name)

        def ask(self: dist.Store, *arguments: object, name: str = name, asked: Any = asked) -> object:
            counted[name] += 1
            return asked(self, *arguments)

        setattr(dist.PrefixStore, name, ask)


def there_and_back(member: Member) -> dict[str, Any]:
    """Go there and back between two placements, in a window for two experts."""
    schedules = 0
    made = rearranger_module.schedule_steps

    def counting(*arguments: Any, **named: Any) -> Any:
        nonlocal schedules
        schedules += 1
        return made(*arguments, **named)

    rearranger_module.schedule_steps = counting
    here, there = placements(member.world_size)
    weights = weights_of(member.rank, here)
    right = []
    try:
        with member.communicator(BACKEND, weights[0]) as communicator:
            rearranger = Rearranger(communicator, weights, window_bytes=2 * 768)
            for number, (old, new) in enumerate(itertools.pairwise([here, there] * 4)):
                if number == 4 and member.rank == 1:
                    rearranger._plans = KnownPlans()  # as after an error that only this rank has seen
                result = rearranger.run(old, new)
                right.append(np.array_equal(result.placement, new) and is_right(weights, member.rank, new))
    finally:
        rearranger_module.schedule_steps = made
    return {"right": all(right), "steps": len(right), "schedules": schedules}


def nothing_moves(member: Member) -> dict[str, Any]:
    here, _ = placements(member.world_size)
    weights = weights_of(member.rank, here)
    counted: Counter[str] = Counter()
    with member.communicator(BACKEND, weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights)
        for _ in range(4):
            rearranger.run(here, here)
        count_messages(counted)
        for _ in range(10):
            result = rearranger.run(here.copy(), here.copy())
        messages = sum(counted.values())
    return {"messages": messages, "moved": result.moved, "right": is_right(weights, member.rank, here)}


def one_rank_is_asked_for_something_else(member: Member, how: str) -> list[Any]:
    """Agree often enough to gather on a board; then one rank is asked for something else, and then all for the same."""
    here, there = placements(member.world_size)
    weights = weights_of(member.rank, here)
    told = []
    with member.communicator(BACKEND, weights[0]) as communicator:
        rearranger = Rearranger(communicator, weights)
        for _ in range(5):
            rearranger.run(here, here)
        new = {"another placement": there, "a wrong one": here[:1]}[how] if member.rank == 1 else here
        try:
            rearranger.run(here, new)
        except HandshakeError as error:
            placement = None if error.placement is None else np.array_equal(error.placement, here)
            told = [sorted(error.table), error.why, placement]
        except EplbError as error:
            told = [type(error).__name__]
        result = rearranger.run(here, there)
        right = is_right(weights, member.rank, there) and result.moved > 0
    return [*told, right]


@pytest.fixture(scope="module", params=[2, 3, 4])
def report(request: pytest.FixtureRequest) -> Report:
    return run_scenarios(
        request.param,
        [
            Scenario("there and back", there_and_back),
            *(
                Scenario(how, one_rank_is_asked_for_something_else, (how,))
                for how in ("another placement", "a wrong one")
            ),
            Scenario("nothing", nothing_moves),
        ],
    )


def test_schedules_are_made_anew_only_where_a_rank_has_lost_one(report: Report) -> None:
    # Two before a rank forgets, and two after; every rank takes part in those, for the ranks share the work.
    for told in report.returned("there and back"):
        assert told == {"right": True, "steps": 7, "schedules": 4}


def test_what_moves_nothing_asks_the_store_nothing(report: Report) -> None:
    for told in report.returned("nothing"):
        assert told == {"messages": 0, "moved": 0, "right": True}


def test_ranks_that_differ_get_one_table_and_go_on(report: Report) -> None:
    for told in report.returned("another placement"):
        assert told == [["new placement"], "nothing was moved", True, True]


def test_a_rank_that_has_no_plan_is_told_to_all_and_they_go_on(report: Report) -> None:
    for rank, told in enumerate(report.returned("a wrong one")):
        assert told == [
            ["new placement", "old placement", "problem"],
            "nothing was moved",
            None if rank == 1 else True,
            True,
        ]
