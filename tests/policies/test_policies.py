"""The published algorithm, and how policies are found."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eplb_core.errors import InputError, PlacementError, PolicyError
from eplb_core.planning.placement import check_placement, imbalance
from eplb_core.policies import BalancePolicy
from eplb_core.policies.deepseek import POLICY, replicate_experts, spread_copies_over_ranks, spread_groups_over_nodes
from eplb_core.registry.policies import available_policies, load_policy
from tests.support.examples import examples


def test_the_published_example_gives_the_published_placement() -> None:
    loads = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    placement = POLICY.rebalance(loads, num_slots=16, num_ranks=8, num_nodes=2, num_groups=4)
    assert placement.dtype == np.int64
    assert placement.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_step_1_puts_the_heaviest_groups_on_different_nodes() -> None:
    order = spread_groups_over_nodes(np.array([[9.0, 9, 8, 8, 1, 1, 2, 2]]), 4, 2)
    assert order.tolist() == [[0, 1, 4, 5, 2, 3, 6, 7]]


def test_step_2_replicates_the_expert_with_the_highest_load_per_copy() -> None:
    expert, copies = replicate_experts(np.array([[10.0, 6.0, 1.0]]), 6)
    assert expert.tolist() == [[0, 1, 2, 0, 1, 0]]  # 10, then 6 (against 10/2), then 10/2 (against 6/2)
    assert copies.tolist() == [[3, 2, 1]]


def test_step_3_fills_the_lightest_rank_that_has_room() -> None:
    replicas = spread_copies_over_ranks(np.array([[1.0, 5.0, 4.0, 2.0]]), 2)
    assert replicas.tolist() == [[1, 0, 2, 3]]


@examples(50)
@given(st.data())
def test_every_expert_is_placed_and_groups_stay_on_one_node(data: st.DataObject) -> None:
    num_nodes = data.draw(st.sampled_from([1, 2, 4]))
    num_groups = num_nodes * data.draw(st.integers(1, 3))
    num_logical = num_groups * data.draw(st.integers(1, 4))
    num_ranks = num_nodes * data.draw(st.integers(1, 4))
    per_rank = -(-num_logical // num_ranks) + data.draw(st.integers(0, 3))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    loads = random.integers(0, 50, (3, num_logical)) * random.integers(0, 2, (3, 1))

    placement = POLICY.rebalance(
        loads, num_slots=num_ranks * per_rank, num_ranks=num_ranks, num_nodes=num_nodes, num_groups=num_groups
    )

    check_placement(placement, num_ranks, num_logical=num_logical)
    for row in placement:
        assert set(row.tolist()) == set(range(num_logical))
        node_of_group = {
            (expert // (num_logical // num_groups), slot // (num_ranks // num_nodes * per_rank))
            for slot, expert in enumerate(row.tolist())
        }
        assert len(node_of_group) == num_groups


def test_groups_that_the_nodes_cannot_share_make_the_policy_global() -> None:
    loads = np.random.default_rng(0).integers(1, 100, (2, 12))
    sizes = {"num_slots": 16, "num_ranks": 8}
    expected = POLICY.rebalance(loads, **sizes, num_nodes=1, num_groups=1)
    assert POLICY.rebalance(loads, **sizes, num_nodes=2, num_groups=3).tolist() == expected.tolist()


def test_without_redundancy_every_expert_has_one_slot() -> None:
    placement = POLICY.rebalance(np.arange(8)[None], num_slots=8, num_ranks=2)
    assert sorted(placement[0].tolist()) == list(range(8))


def test_without_any_load_replicas_are_spread_over_the_experts() -> None:
    placement = POLICY.rebalance(np.zeros((1, 4)), num_slots=8, num_ranks=2)
    assert Counter(placement[0].tolist()) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_float_and_integer_loads_give_the_same_placement() -> None:
    loads = np.random.default_rng(1).integers(0, 1000, (4, 16))
    whole = POLICY.rebalance(loads, num_slots=24, num_ranks=4)
    assert POLICY.rebalance(loads.astype(np.float32), num_slots=24, num_ranks=4).tolist() == whole.tolist()


def test_a_busy_expert_is_copied_until_every_rank_bears_the_same() -> None:
    # Of 8 slots expert 0 gets 5, so that each rank holds one copy of it, but for one rank that holds two.
    placement = POLICY.rebalance([[50, 10, 10, 10]], num_slots=8, num_ranks=4)
    assert imbalance(placement, [[50, 10, 10, 10]], 4).tolist() == [1.0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_slots": 17, "num_ranks": 8}, "17 slots cannot be shared evenly by 8 ranks"),
        ({"num_slots": 16, "num_ranks": 8, "num_nodes": 3}, "8 ranks cannot be shared evenly by 3 nodes"),
        ({"num_slots": 16, "num_ranks": 8, "num_groups": 5}, "12 logical experts cannot be shared evenly by 5 groups"),
        ({"num_slots": 8, "num_ranks": 8}, "8 slots cannot hold 12 logical experts"),
        ({"num_slots": 16, "num_ranks": 0}, "by 0 ranks"),
    ],
)
def test_counts_that_do_not_fit_are_refused_with_both_numbers(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        POLICY.rebalance(np.ones((1, 12)), **sizes)


def test_negative_loads_are_refused() -> None:
    with pytest.raises(InputError, match="layer 0, expert 1"):
        POLICY.rebalance([[1, -1]], num_slots=2, num_ranks=2)


# --- discovery -----------------------------------------------------------------------------------


def install(site: Path, distribution: str, entry: str, source: str = "") -> None:
    """Lay out an installed distribution with one policy entry point and the module that it names."""
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[eplb.policies]\n{entry}\n")
    (site / f"{entry.split('=')[1].split(':')[0].strip()}.py").write_text(source)


POLICY_SOURCE = """
class Policy:
    name, summary = "keep", "leaves everything where it is"
    def rebalance(self, loads, *, num_slots, num_ranks, num_nodes=1, num_groups=1, old=None):
        return old
POLICY = Policy()
"""


def test_the_published_policy_is_found_by_its_entry_point() -> None:
    assert load_policy("deepseek") is POLICY
    assert isinstance(POLICY, BalancePolicy)
    assert [(e.distribution, e.target) for e in available_policies() if e.name == "deepseek"] == [
        ("eplb", "eplb_core.policies.deepseek:POLICY")
    ]


def test_an_installed_policy_is_listed_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "acme-eplb", "keep-all = acme_found:POLICY", POLICY_SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    assert ("keep_all", "acme-eplb", "1.0") in [(e.name, e.distribution, e.version) for e in available_policies()]
    assert load_policy("keep_all").summary == "leaves everything where it is"
    assert load_policy("keep-all").name == "keep"


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(PolicyError, match=r"a policy 'deepseak'(.|\n)*did you mean deepseek\?") as caught:
        load_policy("deepseak")
    assert caught.value.name == "deepseak"


def test_metadata_that_cannot_be_read_hides_no_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "rotten-eplb", "rotten = rotten_eplb:POLICY")
    (tmp_path / "rotten_eplb-1.0.dist-info" / "entry_points.txt").write_bytes(b"[eplb.policies]\n\xff\xfe = \n")
    (tmp_path / "rotten_eplb-1.0.dist-info" / "METADATA").write_bytes(b"\xff\xfe")
    monkeypatch.syspath_prepend(tmp_path)
    assert "deepseek" in [entry.name for entry in available_policies()]
    assert load_policy("deepseek").name == "deepseek"


def test_two_distributions_with_one_name_are_an_error_only_when_it_is_selected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "acme-eplb", "keep = acme_one:POLICY", POLICY_SOURCE)
    install(tmp_path, "zeta-eplb", "keep = zeta_one:POLICY", POLICY_SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_policy("deepseek") is POLICY
    with pytest.raises(PolicyError, match=r"acme-eplb \(acme_one:POLICY\) and zeta-eplb(.|\n)*write keep@acme-eplb"):
        load_policy("keep")
    assert type(load_policy("keep@zeta_EPLB")).__module__ == "zeta_one"


def test_a_broken_policy_is_listed_and_fails_only_when_it_is_selected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "acme-eplb", "broken = acme_broken:POLICY", "raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "broken" in [entry.name for entry in available_policies()]
    assert load_policy("deepseek") is POLICY
    with pytest.raises(PolicyError, match=r"broken:POLICY of acme-eplb 1\.0, .*broken\.py:1\): RuntimeError: no lic"):
        load_policy("broken")


@pytest.mark.parametrize("source", ["POLICY = 3", POLICY_SOURCE + "POLICY = Policy"])
def test_something_else_than_a_policy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    module = f"acme_wrong_{len(source)}"
    install(tmp_path, "acme-eplb", f"wrong = {module}:POLICY", source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PolicyError, match="'wrong' is not a BalancePolicy"):
        load_policy("wrong")


def test_listing_policies_imports_none_of_them() -> None:
    code = (
        "import sys; from eplb_core.registry.policies import available_policies; assert available_policies(); "
        "print(*[m for m in ('numpy', 'torch', 'eplb_core.policies.deepseek') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
