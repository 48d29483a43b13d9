"""A call that one rank misses, or makes with arguments that cannot be used, ruins none of the later ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from eplb_core.errors import EplbError
from eplb_core.rearrange.rearranger import Rearranger
from tests.support.experts import PLACES, Experts, everybody_is_here
from tests.support.ranks import Member, Report, Scenario, error_of, run_scenarios

BACKENDS = ("torch_gloo?timeout=2s", "nixl?window=1MiB&timeout=2s")
WHO = 1


def skips(member: Member, config: str, place: str, calls: int) -> dict[str, Any]:
    """One rank misses some calls; the others time out in them, and then all make the same ones."""
    experts = Experts(member, config, place)
    missed = []
    if member.rank != WHO:
        missed = [error_of(lambda: experts.rearranger.run(experts.first, experts.second)) for _ in range(calls)]
    held = experts.rearranger.placement
    everybody_is_here(member, f"missed {config} {place} {calls}")
    return {
        "missed": missed,
        "held": None if held is None else np.array_equal(held, experts.first),
        "untouched": experts.wrong(experts.first) == [],
        **experts.goes_on(),
    }


Call = Callable[[Experts], object]
LOCAL: dict[str, tuple[Call, str]] = {
    "a verify that does not exist": (
        lambda ex: ex.rearranger.run(ex.first, ex.second, verify="well"),  # type: ignore[arg-type]
        "InputError: verify must be one of",
    ),
    "a ragged placement": (lambda ex: ex.rearranger.run([[1, 2], [3]], ex.second), "PlacementError: "),
    "no new placement": (
        lambda ex: ex.rearranger.run(ex.first, None),  # type: ignore[arg-type]
        "PlacementError: the new placement is None",
    ),
    "a mapping that is a list": (
        lambda ex: ex.rearranger.run(ex.first, ex.second, ranks_before=[0, 1]),  # type: ignore[arg-type]
        "PlacementError: a mapping from rank to rank is a list",
    ),
    "a mapping of text": (
        lambda ex: ex.rearranger.run(ex.first, ex.second, ranks_after={"0": 0}),  # type: ignore[dict-item]
        "PlacementError: the mapping names rank '0'",
    ),
    "an argument that raises": (
        lambda ex: ex.rearranger.run(Raises(), ex.second),  # type: ignore[arg-type]
        "InputError: an argument cannot be used: ZeroDivisionError",
    ),
    "an old placement that is known to be stale": (
        lambda ex: _stale(ex),
        "InputError: `old` says that slot",
    ),
    "a pace that is no rate": (
        lambda ex: ex.rearranger.start(ex.first, ex.second, pace=True),
        "InputError: a pace must be above 0 bytes a second, not True",
    ),
    "a pace that looks like death": (
        lambda ex: ex.rearranger.start(ex.first, ex.second, pace="1kB/s"),
        "would seem to be dead",
    ),
    "no layer in flight": (
        lambda ex: ex.rearranger.start(ex.first, ex.second, max_inflight_layers=0),
        "InputError: max_inflight_layers must be a whole number of at least 1",
    ),
    "an endless wait for commits": (
        lambda ex: ex.rearranger.start(ex.first, ex.second, commit_timeout_s=float("inf")),
        "InputError: commit_timeout_s must be",
    ),
    "start instead of run": (lambda ex: ex.rearranger.start(ex.first, ex.second), "call"),
}


class Raises:
    """As an array whose device is gone."""

    def __array__(self, *arguments: object, **keywords: object) -> object:
        raise ZeroDivisionError


def _stale(experts: Experts) -> object:
    experts.rearranger._hold(experts.second)
    try:
        return experts.rearranger.run(experts.first, experts.second)
    finally:
        experts.rearranger._known = False


def gives_something_else(member: Member, place: str, kind: str) -> dict[str, Any]:
    """One rank's argument cannot be used; the others are given what is right."""
    experts = Experts(member, BACKENDS[0], place)
    call = LOCAL[kind][0] if member.rank == WHO else lambda ex: ex.rearranger.run(ex.first, ex.second)
    error = error_of(lambda: call(experts))
    return {"error": error, "untouched": experts.wrong(experts.first) == [], **experts.goes_on()}


CONSTRUCTOR: dict[str, tuple[dict[str, Any], str]] = {
    "memory that is shared": ({}, "two tensors share memory"),
    "a window below nothing": ({"window_bytes": -5}, "window_bytes must be a whole number of at least 1, not -5"),
    "a window in words": ({"window_bytes": "64MiB"}, "window_bytes must be a whole number"),
    "nodes of other ranks": ({"node_of_rank": [0]}, "node_of_rank has 1 numbers"),
    "nodes that are no numbers": ({"node_of_rank": ["a", "b", "c"]}, "cannot be used"),
}


def makes_none(member: Member, kind: str, place: str, all_again: bool) -> dict[str, Any]:
    """One rank's rearranger cannot be made; those of the others hear of it when they are called."""
    experts = Experts(member, BACKENDS[0], place)
    more, _ = CONSTRUCTOR[kind]

    def make_and_run() -> None:
        if member.rank == WHO:
            weights = [experts.weights[0], experts.weights[0]] if not more else experts.weights
            Rearranger(experts.communicator, weights, **more)
        else:
            experts.rearranger = Rearranger(experts.communicator, experts.weights)
            experts.rearranger.run(experts.first, experts.second)

    error = error_of(make_and_run)
    everybody_is_here(member, f"{kind} {place} {all_again}")
    if all_again or member.rank == WHO:
        experts.rearranger = Rearranger(experts.communicator, experts.weights)
    return {"error": error, "untouched": experts.wrong(experts.first) == [], **experts.goes_on()}


def none_is_made_anywhere_at_first(member: Member, place: str) -> dict[str, Any]:
    """As a loop that tries window after window, on all ranks."""
    experts = Experts(member, BACKENDS[0], place)
    errors = [error_of(lambda: Rearranger(experts.communicator, experts.weights, window_bytes=-1)) for _ in range(5)]
    experts.rearranger = Rearranger(experts.communicator, experts.weights)
    return {"errors": [error["type"] for error in errors], **experts.goes_on()}


def says_what_the_slots_hold(member: Member) -> dict[str, Any]:
    experts = Experts(member, BACKENDS[0])
    unknown = error_of(lambda: experts.rearranger.run(None, experts.second))
    on_a_device = experts.rearranger.run(torch.from_numpy(experts.first), torch.from_numpy(experts.second).int())
    stale = error_of(lambda: experts.rearranger.run(experts.first, experts.second))
    still = experts.wrong(experts.second)
    back = experts.rearranger.run(None, experts.first)
    wrong = experts.wrong(experts.first)
    experts.fill(experts.second)
    changed = experts.rearranger.run(experts.second, experts.first, weights_changed=True)
    wrong += experts.wrong(experts.first)
    forgotten = experts.first.copy()
    forgotten[0, 0] = -1  # an engine may give a slot up
    experts.rearranger.run(forgotten, np.where(forgotten < 0, -1, experts.first))
    experts.communicator.close()
    return {
        "unknown": unknown["text"],
        "stale": (stale["type"], stale["text"]),
        "still": still,
        "wrong": wrong,
        "moved": [result.moved > 0 for result in (on_a_device, back, changed)],
    }


def leaves_before_the_last_check(member: Member, place: str) -> dict[str, Any]:
    """One rank's engine is interrupted when all bytes have moved, and the others wait for its checksums."""
    experts = Experts(member, BACKENDS[0], place)
    rearranger = experts.rearranger
    inner, asked = rearranger._checksums, []

    def interrupted(*arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return inner(*arguments)

    if member.rank == WHO:
        rearranger._checksums = interrupted  # type: ignore[method-assign]
    placement = None
    try:
        rearranger.run(experts.first, experts.second, verify="sample")
        error = ""
    except KeyboardInterrupt:
        error = "KeyboardInterrupt"
    except EplbError as raised:
        error, placement = type(raised).__name__, getattr(raised, "placement", None)
    rearranger._checksums = inner  # type: ignore[method-assign]
    everybody_is_here(member, f"last check {place}")
    held = np.array_equal(rearranger.placement, experts.second)  # type: ignore[arg-type]
    told = placement is None or np.array_equal(placement, experts.second)
    wrong = experts.wrong(experts.second)
    rearranger.run(None, experts.first)
    return {"error": error, "held": held, "told": told, "wrong there": wrong, **experts.goes_on()}


def misses_a_look(member: Member) -> dict[str, Any]:
    """One rank does not come to look at the slots; then all do."""
    experts = Experts(member, BACKENDS[0])
    experts.rearranger.run(experts.first, experts.first)
    missed = {"type": "", "text": ""}
    if member.rank != WHO:
        missed = error_of(experts.rearranger.verify_live)
    everybody_is_here(member, "missed a look")
    return {"missed": missed, "looks": [str(experts.rearranger.verify_live()) for _ in range(2)], **experts.goes_on()}


@functools.cache
def report_of(num_ranks: int) -> Report:
    scenarios = [Scenario("holds", says_what_the_slots_hold), Scenario("look", misses_a_look)]
    for place in PLACES:
        scenarios += [
            Scenario(f"skips {calls} {config} {place}", skips, (config, place, calls))
            for config in BACKENDS
            for calls in (1, 2)
        ]
        scenarios += [Scenario(f"gives {kind} {place}", gives_something_else, (place, kind)) for kind in LOCAL]
        scenarios += [
            Scenario(f"makes {kind} {place} {again}", makes_none, (kind, place, again))
            for kind in CONSTRUCTOR
            for again in (True, False)
        ]
        scenarios.append(Scenario(f"none {place}", none_is_made_anywhere_at_first, (place,)))
        scenarios.append(Scenario(f"leaves {place}", leaves_before_the_last_check, (place,)))
    return run_scenarios(num_ranks, scenarios)


@pytest.fixture(scope="module", params=(2, 3), ids=("2 ranks", "3 ranks"))
def report(request: pytest.FixtureRequest) -> Report:
    return report_of(request.param)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("config", BACKENDS)
def test_after_calls_that_one_rank_missed_the_next_ones_move_every_byte_right(
    report: Report, config: str, place: str, calls: int
) -> None:
    for rank, one in enumerate(report.returned(f"skips {calls} {config} {place}")):
        assert [error["type"] for error in one["missed"]] == ["HandshakeError"] * (0 if rank == WHO else calls)
        for error in one["missed"]:
            assert f"rank {WHO} did not answer" in error["text"], error["text"]
        assert one["held"] is (None if rank == WHO and place == PLACES[0] else True)
        assert one["untouched"]
        assert (one["wrong"], one["moved"] > 0) == ([], True)


@pytest.mark.parametrize("kind", LOCAL)
def test_an_argument_that_is_wrong_on_one_rank_is_the_same_error_on_all_and_nothing_moves(
    report: Report, place: str, kind: str
) -> None:
    told = report.returned(f"gives {kind} {place}")
    for one in told:
        assert one["error"]["type"] == "HandshakeError", one["error"]
        assert LOCAL[kind][1] in one["error"]["text"]
        assert one["error"]["text"] == told[0]["error"]["text"]
        assert one["untouched"]
        assert (one["wrong"], one["moved"] > 0) == ([], True)


@pytest.mark.parametrize("all_again", [True, False], ids=["all make another", "that rank makes another"])
@pytest.mark.parametrize("kind", CONSTRUCTOR)
def test_a_rearranger_that_one_rank_cannot_make_is_an_error_on_all_at_the_next_call(
    report: Report, place: str, kind: str, all_again: bool
) -> None:
    for rank, one in enumerate(report.returned(f"makes {kind} {place} {all_again}")):
        assert one["error"]["type"] == ("InputError" if rank == WHO else "HandshakeError"), one["error"]
        assert CONSTRUCTOR[kind][1] in one["error"]["text"]
        assert one["untouched"]
        assert (one["wrong"], one["moved"] > 0) == ([], True)


def test_rearrangers_that_no_rank_could_make_are_forgotten(report: Report, place: str) -> None:
    for one in report.returned(f"none {place}"):
        assert one["errors"] == ["InputError"] * 5
        assert (one["wrong"], one["moved"] > 0) == ([], True)


def test_an_error_of_the_last_check_tells_what_the_slots_hold_and_the_next_call_goes_well(
    report: Report, place: str
) -> None:
    for rank, one in enumerate(report.returned(f"leaves {place}")):
        assert one["error"] == ("KeyboardInterrupt" if rank == WHO else "ControlPlaneError"), one
        assert (one["held"], one["told"], one["wrong there"]) == (True, True, [])
        assert (one["wrong"], one["moved"] > 0) == ([], True)


def test_a_look_at_the_slots_that_one_rank_missed_ruins_none_of_the_later_ones(report: Report) -> None:
    for rank, one in enumerate(report.returned("look")):
        assert one["missed"]["type"] == ("" if rank == WHO else "ControlPlaneError")
        assert all("slots are right" in text for text in one["looks"])
        assert (one["wrong"], one["moved"] > 0) == ([], True)


def test_an_old_placement_may_be_left_out_and_a_stale_one_is_refused(report: Report) -> None:
    for one in report.returned("holds"):
        assert "what the slots hold is not known yet" in one["unknown"]
        assert one["stale"][0] == "InputError"
        assert "`old` says that slot 0 of layer 0 holds expert 0; it holds expert" in one["stale"][1]
        assert "weights_changed=True" in one["stale"][1]
        assert (one["still"], one["wrong"]) == ([], [])
        assert one["moved"] == [True] * 3


def test_every_rank_exits_in_order(report: Report) -> None:
    assert report.exit_codes == [0] * len(report.outcomes)
