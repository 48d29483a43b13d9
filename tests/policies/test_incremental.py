"""The policy that starts from the old placement: as good as a fresh plan, for a fraction of its moves."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_core.errors import ConfigError, InputError, PlacementError
from eplb_core.planning.placement import EMPTY, check_placement, imbalance, load_per_rank
from eplb_core.policies import PlacementRequest, decide, slots_anew
from eplb_core.policies.deepseek import POLICY as FRESH
from eplb_core.policies.incremental import POLICY, IncrementalOptions
from eplb_core.registry.policies import load_policy
from tests.support.examples import examples

MANY = examples(50)


def drifted(loads: np.ndarray, share: float, seed: int) -> np.ndarray:
    return loads * np.exp(np.random.default_rng(seed).normal(0, share, loads.shape))


def lognormal(layers: int, experts: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 1, (layers, experts))


def anew_by_hand(old: np.ndarray, new: np.ndarray, num_ranks: int) -> int:
    """Count slots whose expert its rank did not hold before, copy by copy."""
    count = 0
    for before, after in zip(old, new, strict=True):
        for rank in range(num_ranks):
            own = slice(rank * len(before) // num_ranks, (rank + 1) * len(before) // num_ranks)
            held = before[own].tolist()
            for expert in after[own].tolist():
                if expert in held:
                    held.remove(expert)
                else:
                    count += 1
    return count


@st.composite
def cases(draw, with_nodes: bool = False):
    """Loads of any kind and an old placement of any kind, with second copies on a rank and empty slots."""
    num_nodes = draw(st.sampled_from([2, 3])) if with_nodes else 1
    num_groups = num_nodes * draw(st.integers(1, 3)) if with_nodes else 1
    num_logical = num_groups * draw(st.integers(1, 5))
    num_ranks = num_nodes * draw(st.integers(1, 4))
    per_rank = -(-num_logical // num_ranks) + draw(st.integers(0, 3))
    num_slots = num_ranks * per_rank
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["whole", "wide", "zeros", "equal"]))
    loads = {
        "whole": random.integers(0, 50, (3, num_logical)),
        "wide": random.lognormal(0, 3, (3, num_logical)),
        "zeros": random.integers(0, 3, (3, num_logical)) * random.integers(0, 2, (3, 1)),
        "equal": np.full((3, num_logical), 2.0**60),
    }[kind].astype(float)
    before = random.lognormal(0, 1, loads.shape)
    sizes = {"num_slots": num_slots, "num_ranks": num_ranks, "num_nodes": num_nodes, "num_groups": num_groups}
    if draw(st.booleans()):
        old = FRESH.rebalance(before, **sizes)
    else:
        rest = random.integers(0, num_logical, (3, num_slots - num_logical))
        old = np.concatenate([np.tile(np.arange(num_logical), (3, 1)), rest], axis=1)
        old = random.permuted(np.where(random.random(old.shape) < 0.1, EMPTY, old), axis=1)
    return loads, old, sizes


@MANY
@given(cases())
def test_no_layer_is_worse_than_the_fresh_plan(case) -> None:
    loads, old, sizes = case
    new = POLICY.rebalance(loads, old=old, **sizes)
    check_placement(new, sizes["num_ranks"], num_logical=loads.shape[1])
    assert all(set(row.tolist()) == set(range(loads.shape[1])) for row in new)
    fresh = imbalance(FRESH.rebalance(loads, **sizes), loads, sizes["num_ranks"])
    assert (imbalance(new, loads, sizes["num_ranks"]) <= fresh * (1 + 1e-11)).all()


@MANY
@given(cases(with_nodes=True))
def test_groups_stay_on_one_node_and_no_layer_is_worse_than_the_fresh_plan(case) -> None:
    loads, old, sizes = case
    new = POLICY.rebalance(loads, old=old, **sizes)
    fresh = imbalance(FRESH.rebalance(loads, **sizes), loads, sizes["num_ranks"])
    assert (imbalance(new, loads, sizes["num_ranks"]) <= fresh * (1 + 1e-11)).all()
    for row in new:
        assert set(row.tolist()) == set(range(loads.shape[1]))
        nodes = {
            (int(expert) * sizes["num_groups"] // loads.shape[1], slot * sizes["num_nodes"] // len(row))
            for slot, expert in enumerate(row)
        }
        assert len(nodes) == sizes["num_groups"]


@MANY
@given(cases())
def test_it_never_receives_more_than_the_fresh_plan_with_its_ranks_relabelled(case) -> None:
    loads, old, sizes = case
    decision = POLICY.decide(PlacementRequest(loads=loads, old=old, **sizes))
    relabelled = slots_anew(old, minimal(old, FRESH.rebalance(loads, **sizes), sizes), sizes["num_ranks"]).sum(axis=1)
    ours = slots_anew(old, decision.placement, sizes["num_ranks"]).sum(axis=1)
    searched = np.array([plan == "fresh relabelled" for plan in decision.plans])
    assert (ours <= relabelled)[searched].all()


def minimal(old: np.ndarray, new: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
    from eplb_core.policies import minimize_movement

    return minimize_movement(old, new, sizes["num_ranks"])


@pytest.mark.parametrize(
    ("ranks", "slots", "drift", "share"),
    [(8, 288, 0.2, 1 / 10), (32, 288, 0.05, 1 / 7), (32, 288, 0.5, 1 / 3.4), (64, 320, 0.2, 1 / 5)],
)
def test_it_receives_a_fraction_of_what_a_fresh_plan_does(ranks: int, slots: int, drift: float, share: float) -> None:
    loads = lognormal(6, 256, seed=1)
    old = FRESH.rebalance(loads, num_slots=slots, num_ranks=ranks)
    loads = drifted(loads, drift, seed=2)
    new = POLICY.rebalance(loads, num_slots=slots, num_ranks=ranks, old=old)
    fresh = FRESH.rebalance(loads, num_slots=slots, num_ranks=ranks)
    assert anew_by_hand(old, new, ranks) < share * anew_by_hand(old, fresh, ranks)
    assert slots_anew(old, new, ranks).sum() == anew_by_hand(old, new, ranks)


def test_one_swap_is_made_where_one_swap_is_enough() -> None:
    # Ranks bear 9 and 5; 4 for 2 makes 7 and 7, which no other change of one expert for another does.
    decision = POLICY.decide(
        PlacementRequest(loads=[[5, 4, 3, 2]], num_slots=4, num_ranks=2, old=np.array([[0, 1, 2, 3]]))
    )
    assert sorted(map(sorted, decision.placement.reshape(2, 2).tolist())) == [[0, 3], [1, 2]]
    assert slots_anew(np.array([[0, 1, 2, 3]]), decision.placement, 2).tolist() == [[1, 1]]
    assert decision.plans == ("incremental",)


def test_a_further_copy_takes_the_place_of_a_redundant_one() -> None:
    # Expert 0 alone has 12 of 20; expert 3 has a copy that nothing needs.
    old = np.array([[0, 1, 2, 3, 3, 4]])
    decision = POLICY.decide(PlacementRequest(loads=[[12, 2, 2, 2, 2]], num_slots=6, num_ranks=3, old=old))
    assert slots_anew(old, decision.placement, 3).sum() == 1
    assert np.bincount(decision.placement[0]).tolist() == [2, 1, 1, 1, 1]
    assert imbalance(decision.placement, [[12, 2, 2, 2, 2]], 3).tolist() == [1.2]  # 8, 4 and 8


def test_what_is_as_good_as_a_fresh_plan_already_is_kept() -> None:
    loads = lognormal(3, 32, seed=3)
    old = FRESH.rebalance(loads, num_slots=48, num_ranks=4)
    decision = POLICY.decide(PlacementRequest(loads=loads, num_slots=48, num_ranks=4, old=old))
    assert np.array_equal(decision.placement, old)
    assert decision.ran() == "kept"


def test_without_an_old_placement_it_is_the_fresh_plan_and_says_so() -> None:
    loads = lognormal(2, 16, seed=4)
    decision = POLICY.decide(PlacementRequest(loads=loads, num_slots=16, num_ranks=4))
    assert np.array_equal(decision.placement, FRESH.rebalance(loads, num_slots=16, num_ranks=4))
    assert decision.ran() == "fresh global"


def test_what_stays_on_a_rank_keeps_its_slot() -> None:
    loads = lognormal(4, 64, seed=5)
    old = FRESH.rebalance(loads, num_slots=80, num_ranks=4)
    new = POLICY.rebalance(drifted(loads, 0.3, 6), num_slots=80, num_ranks=4, old=old)
    assert int((new != old).sum()) == anew_by_hand(old, new, 4)


# --- targets and budgets ---------------------------------------------------------------------------------------------


def planned(options: IncrementalOptions, drift: float = 0.3, **request: object):
    loads = lognormal(8, 64, seed=7)
    old = FRESH.rebalance(loads, num_slots=96, num_ranks=8)
    loads = drifted(loads, drift, seed=8)
    asked = PlacementRequest(loads=loads, num_slots=96, num_ranks=8, old=old, **request)
    return loads, old, POLICY.with_options(options).decide(asked)


def test_within_a_share_of_the_fresh_plan_less_moves() -> None:
    loads, old, exact = planned(IncrementalOptions())
    _, _, loose = planned(IncrementalOptions(within=0.05))
    fresh = imbalance(FRESH.rebalance(loads, num_slots=96, num_ranks=8), loads, 8)
    assert (imbalance(loose.placement, loads, 8) <= 1.05 * fresh + 1e-9).all()
    assert anew_by_hand(old, loose.placement, 8) < anew_by_hand(old, exact.placement, 8)


def test_a_given_imbalance_is_reached_also_where_the_fresh_plan_is_worse() -> None:
    loads = lognormal(6, 64, seed=9)
    old = FRESH.rebalance(loads, num_slots=128, num_ranks=64)
    loads = drifted(loads, 0.3, seed=10)
    fresh = imbalance(FRESH.rebalance(loads, num_slots=128, num_ranks=64), loads, 64)
    new = POLICY.with_options(IncrementalOptions(imbalance=1.05)).rebalance(loads, num_slots=128, num_ranks=64, old=old)
    assert imbalance(new, loads, 64).mean() < fresh.mean()


def test_an_imbalance_that_cannot_be_reached_gets_the_best_that_was_found() -> None:
    loads = [[100.0, 1, 1, 1]]
    policy = POLICY.with_options(IncrementalOptions(imbalance=1.0))
    new = policy.rebalance(loads, num_slots=4, num_ranks=2, old=np.array([[0, 1, 2, 3]]))
    assert load_per_rank(new, loads, 2).max() == 101


@pytest.mark.parametrize("most", [0, 1, 5, 20])
def test_no_rank_receives_more_slots_than_the_budget_and_no_layer_gets_worse(most: int) -> None:
    loads, old, decision = planned(IncrementalOptions(max_moves=most))
    assert slots_anew(old, decision.placement, 8).sum(axis=0).max() <= most
    before, after = imbalance(old, loads, 8), imbalance(decision.placement, loads, 8)
    assert (after <= before * (1 + 1e-11)).all()
    assert (after.mean() < before.mean()) == (most > 0)


def test_with_a_budget_of_bytes_small_experts_come_first() -> None:
    small = np.array([1_000_000] * 4 + [10_000] * 4)
    loads, old, decision = planned(IncrementalOptions(max_bytes=1_000_000), expert_bytes=small)
    received = slots_anew(old, decision.placement, 8)
    assert (received * small[:, None]).sum(axis=0).max() <= 1_000_000
    assert received[4:].sum() > received[:4].sum()
    assert imbalance(decision.placement, loads, 8).mean() < imbalance(old, loads, 8).mean()


def test_a_budget_that_is_large_enough_reaches_the_target() -> None:
    loads, _, decision = planned(IncrementalOptions(max_moves=10**6), drift=0.1)
    fresh = imbalance(FRESH.rebalance(loads, num_slots=96, num_ranks=8), loads, 8)
    assert (imbalance(decision.placement, loads, 8) <= fresh * (1 + 1e-11)).all()


def test_a_budget_of_bytes_without_sizes_is_refused() -> None:
    with pytest.raises(InputError, match="needs the size of an expert"):
        planned(IncrementalOptions(max_bytes=1))


# --- noise -----------------------------------------------------------------------------------------------------------


def test_sampling_noise_moves_nothing_if_loads_are_counts() -> None:
    random = np.random.default_rng(11)
    true = lognormal(10, 256, seed=12)
    true *= 64_000 * 256 / true.sum(axis=1, keepdims=True)
    old = FRESH.rebalance(random.poisson(true), num_slots=288, num_ranks=32)
    sample = random.poisson(true)
    new = load_policy("incremental?counts=on").rebalance(sample, num_slots=288, num_ranks=32, old=old)
    assert np.array_equal(old, new)
    assert not np.array_equal(old, POLICY.rebalance(sample, num_slots=288, num_ranks=32, old=old))


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_sampling_noise_moves_nothing_where_the_fresh_plan_of_one_sample_happens_to_be_better(seed: int) -> None:
    # Two slots a rank: a fresh plan for another sample is up to 2 % better or worse, by chance.
    random = np.random.default_rng(seed)
    true = random.lognormal(0, 1, (58, 256))
    true *= 64_000 * 256 / true.sum(axis=1, keepdims=True)
    old = FRESH.rebalance(random.poisson(true), num_slots=512, num_ranks=256)
    window = random.poisson(true / 16, (16, *true.shape))
    sizes = {"num_slots": 512, "num_ranks": 256, "old": old}
    assert np.array_equal(POLICY.decide(PlacementRequest(loads=window, **sizes)).placement, old)
    counts = load_policy("incremental?counts=on").rebalance(window.sum(axis=0), **sizes)
    assert np.array_equal(counts, old)


def test_a_window_says_how_much_is_noise() -> None:
    random = np.random.default_rng(13)
    true = lognormal(10, 256, seed=14) * 1000
    old = FRESH.rebalance(random.poisson(true * 16), num_slots=288, num_ranks=32)
    window = random.poisson(true, (16, *true.shape))
    request = PlacementRequest(loads=window, num_slots=288, num_ranks=32, old=old)
    assert np.array_equal(POLICY.decide(request).placement, old)
    shifted = replace(request, loads=window * drifted(np.ones(true.shape), 0.5, 15))
    assert not np.array_equal(POLICY.decide(shifted).placement, old)


def test_experts_with_bursts_count_for_more_if_asked() -> None:
    # Both pairs have a mean of 10 and 10, but expert 0 comes in bursts: it gets the further copy.
    window = [[[20.0, 10, 10, 10]], [[0.0, 10, 10, 10]]]
    old = np.array([[0, 1, 2, 3, 3]])
    policy = POLICY.with_options(IncrementalOptions(bursts=1, z=0))
    new = policy.decide(PlacementRequest(loads=window, num_slots=5, num_ranks=5, old=old)).placement
    assert np.bincount(new[0]).tolist() == [2, 1, 1, 1]


# --- the same everywhere ---------------------------------------------------------------------------------------------

PLANS = """
import sys
if {blocked}: sys.modules["numba"] = None
import hashlib, numpy as np
from eplb_core.policies.compiled import COMPILES
from eplb_core.policies.deepseek import POLICY as FRESH
from eplb_core.policies.incremental import POLICY
from eplb_core.policies.movement import minimize_movement
found = hashlib.sha256()
cases = [(4, 24, 1, 1, 0.5), (16, 48, 1, 1, 0.5), (8, 24, 4, 8, 0.3), (32, 64, 1, 1, 1)]
for ranks, slots, nodes, groups, drift in cases:
    random = np.random.default_rng(ranks)
    sizes = dict(num_slots=slots, num_ranks=ranks, num_nodes=nodes, num_groups=groups)
    loads = random.lognormal(0, 1, (4, 16))
    old = FRESH.rebalance(loads, **sizes)
    loads = loads * np.exp(random.normal(0, drift, loads.shape))
    found.update(POLICY.rebalance(loads, old=old, **sizes).tobytes())
    found.update(minimize_movement(old, FRESH.rebalance(loads, **sizes), ranks).tobytes())
print(COMPILES, found.hexdigest())
"""


def test_with_and_without_numba_the_plans_are_the_same() -> None:
    pytest.importorskip("numba", reason="the extra eplb[policies] is not installed")
    said = [
        subprocess.run(
            [sys.executable, "-c", PLANS.format(blocked=blocked)],
            capture_output=True,
            text=True,
            timeout=110,
            check=True,
        ).stdout.split()
        for blocked in (False, True)
    ]
    assert [compiles for compiles, _ in said] == ["True", "False"]
    assert said[0][1] == said[1][1]
    assert len(said[0][1]) == len(hashlib.sha256().hexdigest())


@examples(30)
@given(cases(), st.integers(0, 2**32 - 1))
def test_loops_and_arrays_find_the_same_change(case, seed: int) -> None:
    from eplb_core.policies import incremental_candidates as candidates
    from eplb_core.policies.incremental_layer import UNLIMITED, WAYS, fill_slots
    from eplb_core.policies.incremental_search import make_layer
    from eplb_core.policies.movement import copies_on_ranks

    loads, old, sizes = case
    num_ranks, random = sizes["num_ranks"], np.random.default_rng(seed)
    for row, load in zip(old, loads, strict=True):
        place = fill_slots(row, load)
        if place is None:
            continue
        held = copies_on_ranks(random.permutation(row), num_ranks, len(load))
        room = random.integers(0, 2, num_ranks) * UNLIMITED
        layer = make_layer(place, held, load, room, np.zeros(len(load), dtype=np.int64), num_ranks)
        hot = int(layer.rank_load.argmax())
        aim = candidates.Aim(0.0, WAYS[0][0], False, True, 1, 1e-9 * max(load.sum(), 1e-300))
        spares = [candidates._spare_copies_loops(layer, hot), candidates._spare_copies_arrays(layer, hot)]
        for one, other in zip(*spares, strict=True):
            assert np.array_equal(one, other)
        for name in ("swap", "put", "via"):
            arguments = {
                "swap": (layer, aim, hot, np.inf),
                "put": (layer, aim, hot, np.inf, spares[0]),
                "via": (layer, aim, hot, spares[0]),
            }[name]
            loops, arrays = (getattr(candidates, f"_best_{name}_{kind}")(*arguments) for kind in ("loops", "arrays"))
            assert tuple(map(float, loops)) == tuple(map(float, arrays))


# --- many times ------------------------------------------------------------------------------------------------------


def rebalance_often(times: int, layers: int) -> tuple[list[float], list[float]]:
    """Return by how much each plan is worse than a fresh one, and the share of slots it received."""
    random = np.random.default_rng(16)
    spread, level = random.normal(0, 1, (layers, 64)), 0.9
    old = FRESH.rebalance(np.exp(spread), num_slots=80, num_ranks=16)
    worse, share = [], []
    for _ in range(times):
        spread = level * spread + np.sqrt(1 - level**2) * random.normal(0, 1, spread.shape)
        loads = np.exp(spread)
        new = POLICY.rebalance(loads, num_slots=80, num_ranks=16, old=old)
        fresh = imbalance(FRESH.rebalance(loads, num_slots=80, num_ranks=16), loads, 16)
        worse.append(float((imbalance(new, loads, 16) - fresh).max()))
        share.append(float(slots_anew(old, new, 16).sum() / old.size))
        old = new
    return worse, share


def check_no_wear(times: int, layers: int) -> None:
    worse, share = rebalance_often(times, layers)
    assert max(worse) < 1e-9
    quarter = times // 4
    assert np.mean(share[-quarter:]) < 1.15 * np.mean(share[:quarter])


def test_many_rebalances_in_a_row_do_not_wear_the_placement() -> None:
    check_no_wear(100, 8)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_a_thousand_rebalances_in_a_row_do_not_wear_the_placement() -> None:
    check_no_wear(1000, 8)


# --- options and errors ----------------------------------------------------------------------------------------------


def test_options_are_typed_and_come_from_a_config_string() -> None:
    policy = load_policy("incremental?within=0.01&max_moves=12&max_bytes=1GiB&groups=ignore")
    assert policy.values == IncrementalOptions(within=0.01, max_moves=12, max_bytes=2**30, groups="ignore")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("incremental?withn=0.01", "policy 'incremental' has no option 'withn', did you mean 'within'"),
        ("incremental?within=-1", "option 'within' cannot be '-1'"),
        ("incremental?max_bytes=12", "the unit is missing"),
        ("incremental?imbalance=0.9", "at least 1"),
    ],
)
def test_wrong_options_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_policy(text)


def test_options_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPLB_POLICY__INCREMENTAL__WITHIN", "0.02")
    assert load_policy("incremental").values.within == 0.02


def test_an_old_placement_of_another_shape_is_refused() -> None:
    with pytest.raises(PlacementError, match=r"shape \[1, 4\], but there are 1 layers of 8 slots"):
        POLICY.rebalance([[1, 1]], num_slots=8, num_ranks=2, old=np.array([[0, 1, 0, 1]]))


def test_groups_that_must_be_kept_and_cannot_are_refused() -> None:
    policy = POLICY.with_options(IncrementalOptions(groups="keep"))
    with pytest.raises(PlacementError, match="3 groups cannot be kept on 2 nodes"):
        policy.rebalance(np.ones((1, 6)), num_slots=8, num_ranks=4, num_nodes=2, num_groups=3)


def test_a_policy_that_only_rebalances_gets_the_sum_of_a_window() -> None:
    class Plain:
        name, summary = "plain", "for this test"

        def rebalance(self, loads, **sizes):
            self.seen = loads
            return np.array([[0, 1]])

    plain = Plain()
    decision = decide(plain, PlacementRequest(loads=[[[1, 2]], [[3, 4]]], num_slots=2, num_ranks=2))
    assert plain.seen.tolist() == [[4, 6]]
    assert decision.ran() == "plain"
