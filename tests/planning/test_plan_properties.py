"""Plans and schedules of any two placements, by the thousand, against what can be said about them without either.

Redundancy from none to as many copies as experts, empty slots, nodes of any size, relays, kept slots, lost experts, and
windows from one expert to everything. Steps are performed by the model in `tests/support/step_model.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_core.planning.placement import align_slots
from eplb_core.planning.plan import RearrangementPlan, plan_rearrangement
from eplb_core.scheduling.schedule import ALIGNMENT, Step, schedule_steps
from tests.support.examples import examples
from tests.support.step_model import Model


@dataclass
class Case:
    """What to rearrange, and how."""

    old: np.ndarray
    new: np.ndarray
    num_ranks: int
    nodes: list[int]
    sizes: list[int]
    relay: bool
    keep_slots: bool
    window: int
    send_limit: int | None
    recv_limit: int | None
    in_place_from: int | None

    @property
    def per_rank(self) -> int:
        return self.old.shape[1] // self.num_ranks

    def plan(self) -> RearrangementPlan:
        return plan_rearrangement(
            self.old,
            self.new,
            self.num_ranks,
            self.nodes,
            relay=self.relay,
            keep_slots=self.keep_slots,
            missing="leave_empty",
        )

    def steps(self, plan: RearrangementPlan) -> list[Step]:
        return schedule_steps(
            plan,
            self.sizes,
            window_bytes=self.window,
            send_limit_bytes=self.send_limit,
            recv_limit_bytes=self.recv_limit,
            in_place_from=self.in_place_from,
        )

    def reachable(self) -> np.ndarray:
        """Return the new placement without the experts that have no copy."""
        held = [set(row.tolist()) for row in self.old]
        return np.array([[e if e in have else -1 for e in row] for row, have in zip(self.new, held, strict=True)])

    def ranks_that_hold(self, placement: np.ndarray) -> set[tuple[int, int, int]]:
        """Return `(layer, expert, rank)` for every expert that a rank holds."""
        return {(la, int(e), slot // self.per_rank) for (la, slot), e in np.ndenumerate(placement) if e >= 0}

    def crossings_needed(self) -> tuple[Counter[tuple[int, int, int]], set[tuple[int, int, int]]]:
        """Return what each rank lacks, and what each node lacks, as `(layer, expert, rank or node)`."""
        held = self.ranks_that_hold(self.old)
        needed = self.ranks_that_hold(self.reachable()) - held
        on_node = {(layer, expert, self.nodes[rank]) for layer, expert, rank in held}
        return Counter(needed), {(layer, expert, self.nodes[rank]) for layer, expert, rank in needed} - on_node


@st.composite
def cases(draw) -> Case:
    num_ranks, per_rank, num_layers = draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    num_slots = num_ranks * per_rank
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_logical = max(1, round(num_slots / (1 + draw(st.sampled_from([0, 0, 0.1, 0.5, 1.0])))))
    empty = draw(st.sampled_from([0, 0, 0.1, 0.5]))
    kind = draw(st.sampled_from(["any", "any", "permutation", "drift", "rotated"]))
    loses = draw(st.sampled_from([False, False, True]))

    def placed() -> np.ndarray:
        extra = random.integers(0, num_logical, num_slots - num_logical)
        extra = np.where(random.random(len(extra)) < empty, -1, extra)
        return random.permutation(np.concatenate([np.arange(num_logical), extra]))

    old, new = [], []
    for _ in range(num_layers):
        row = placed()
        if loses:
            row = np.where(row == random.integers(0, num_logical), -1, row)
        target = row.copy()
        if kind == "permutation":
            target = random.permutation(row)
        elif kind == "rotated":
            target = np.roll(row, random.integers(0, num_slots))
        elif kind == "drift":
            some = random.integers(0, num_slots, random.integers(0, 5))
            target[some] = row[random.permutation(some)] if len(set(some)) == len(some) else target[some]
        else:
            target = placed()
        old.append(row)
        new.append(target)
    num_nodes = draw(st.integers(1, 3))
    sizes = random.integers(1, 4 * ALIGNMENT, num_layers).tolist()
    largest = max(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    limits = st.sampled_from([1, 1, 2, 3, 5, None])
    window, send, receive = draw(limits), draw(limits), draw(limits)
    return Case(
        old=np.array(old),
        new=np.array(new),
        num_ranks=num_ranks,
        nodes=random.integers(0, num_nodes, num_ranks).tolist(),
        sizes=sizes,
        relay=draw(st.booleans()),
        keep_slots=draw(st.booleans()),
        window=10**7 if window is None else window * largest,
        send_limit=send and send * largest,
        recv_limit=receive and receive * largest,
        in_place_from=draw(st.sampled_from([None, 1, 1, 1000, 4000])),
    )


def check_plan(case: Case, plan: RearrangementPlan) -> None:
    """Check who gets what from whom, and that this is as little as it can be."""
    needed, crossings = case.crossings_needed()
    columns = (plan.transfer_layer, plan.transfer_expert, plan.transfer_src_rank, plan.transfer_dst_rank)
    transfers = list(zip(*(column.tolist() for column in columns), strict=True))
    assert Counter((layer, expert, dst) for layer, expert, _, dst in transfers) == needed
    between = [
        (layer, expert, case.nodes[dst]) for layer, expert, src, dst in transfers if case.nodes[src] != case.nodes[dst]
    ]
    assert set(between) == crossings
    assert plan.num_between_nodes == len(between)
    if case.relay:
        assert len(between) == len(crossings)
    else:
        assert plan.num_relayed == 0
    reached = case.reachable()
    if not case.keep_slots:
        assert plan.new.tolist() == reached.tolist()
    wanted = {(layer, int(e)) for layer, row in enumerate(case.new) for e in row if e >= 0}
    held = {(layer, int(e)) for layer, row in enumerate(case.old) for e in row}
    assert {(layer, expert) for layer, _, expert in plan.lost.tolist()} == wanted - held


def check_steps(case: Case, plan: RearrangementPlan, steps: list[Step]) -> None:
    """Perform the steps; the model checks the rules of each, and that nothing is lost between them."""
    model = Model(case.old, plan.new, case.num_ranks, case.sizes, case.window)
    model.run(steps)
    placement = case.old
    for step in steps:
        placement = step.apply(placement)
    assert placement.tolist() == plan.new.tolist()
    assert model.most_staged <= case.window
    assert model.most_sent <= (case.send_limit or np.inf)
    assert model.most_received <= (case.recv_limit or np.inf)
    needed, crossings = case.crossings_needed()
    assert Counter((layer, expert, dst) for layer, expert, _, dst in model.transfers) == needed
    between = [
        (layer, expert, case.nodes[dst])
        for layer, expert, src, dst in model.transfers
        if case.nodes[src] != case.nodes[dst]
    ]
    if case.relay:
        assert Counter(between) == Counter(crossings)
    assert set(between) <= crossings
    assert len(between) <= plan.num_between_nodes


def check_kept_slots(case: Case, aligned: np.ndarray) -> None:
    """Check that each rank has the experts that it was given, and that no order of them keeps more slots."""
    for before, wanted, now in zip(case.old, case.new, aligned, strict=True):
        for rank in range(case.num_ranks):
            own = slice(rank * case.per_rank, (rank + 1) * case.per_rank)
            assert Counter(now[own].tolist()) == Counter(wanted[own].tolist())
            kept = sum((Counter(before[own].tolist()) & Counter(wanted[own].tolist())).values())
            assert np.count_nonzero(before[own] == now[own]) == kept
    asked_and_possible = (case.old == case.new) & (case.new == aligned)
    assert (asked_and_possible == (case.old == case.new)).all()


def check(case: Case) -> None:
    plan = case.plan()
    check_plan(case, plan)
    check_kept_slots(case, align_slots(case.old, case.new, case.num_ranks))
    check_steps(case, plan, case.steps(plan))


@examples(300)
@given(cases())
def test_any_rearrangement_is_planned_and_cut_as_it_should_be(case: Case) -> None:
    check(case)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@examples(40_000)
@given(cases())
def test_many_more_rearrangements_are_planned_and_cut_as_they_should_be(case: Case) -> None:
    check(case)
