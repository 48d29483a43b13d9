"""What the conformance kit does not ask of the backends: exact texts, numbers and deaths, between real processes."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eplb_backends.torch_gloo import communicator as gloo_communicator
from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.contract.context import Binding
from eplb_core.errors import CommunicatorClosedError, InvalidTransferError
from eplb_core.launch.local_ranks import Outcome, RankEnvironment, collect_local_ranks
from tests.support.ranks import (
    Member,
    Report,
    Scenario,
    Sent,
    bytes_of,
    content,
    error_of,
    exchange,
    ring,
    run_scenarios,
)

BACKENDS = (
    "torch_gloo",
    "torch_nccl",
    "nixl?window=4MiB",
    "nixl?mode=packed&window=1MiB",
    "nixl?mode=direct&window=1MiB",
)
WINDOW_BYTES = {BACKENDS[2]: 4 << 20, BACKENDS[3]: 1 << 20, BACKENDS[4]: 1 << 20}
TIMEOUT_S = 1.0
PATIENCE_S = 4.0  # what a rank may need beyond the timeout to notice, on a busy machine


def two_communicators_do_not_disturb_one_another(member: Member, config: str) -> None:
    with member.communicator(config) as first, member.communicator(config) as second:
        exchange(member, first, ring(member.world_size, 500), epoch=1)
        exchange(member, second, ring(member.world_size, 500), epoch=2)
        landing = {}
        for number, communicator in enumerate((first, second)):
            tensor = torch.from_numpy(content(0, 1, 0, number, 800).copy())
            landing[number] = torch.full_like(tensor, 0xEE)
            communicator.register([tensor, landing[number]])
            if member.rank == 0:
                communicator.add_send(tensor, 1)
            elif member.rank == 1:
                communicator.add_recv(landing[number], 0)
        second.execute()
        first.execute()
        for number in (0, 1) if member.rank == 1 else ():
            assert bytes_of(landing[number]) == content(0, 1, 0, number, 800).tobytes()
        first.close()
        exchange(member, second, ring(member.world_size, 900), epoch=3)


# --- what is refused -------------------------------------------------------------------------------------------------


def _mismatch(member: Member, config: str, sent: list[tuple], expected: list[tuple]) -> dict[str, Any]:
    """Let rank 0 send and rank 1 expect `(bytes, dtype)`; return the error, after the communicator was used again."""
    with member.shared(config) as communicator:
        landing = [torch.full((nbytes,), 0xEE, dtype=torch.uint8).view(dtype) for nbytes, dtype in expected]
        outgoing = [torch.zeros(nbytes, dtype=torch.uint8).view(dtype) for nbytes, dtype in sent]
        communicator.register([*landing, *outgoing])
        for tensor in outgoing if member.rank == 0 else ():
            communicator.add_send(tensor, 1)
        for tensor in landing if member.rank == 1 else ():
            communicator.add_recv(tensor, 0)
        error = error_of(communicator.execute)
        assert all(set(bytes_of(tensor)) <= {0xEE} for tensor in landing), "bytes were moved all the same"
        exchange(member, communicator, ring(member.world_size, 300))
    return error


def another_count_is_a_mismatch_on_every_rank(member: Member, config: str) -> dict[str, Any]:
    return _mismatch(member, config, [(4, torch.uint8), (4, torch.uint8)], [(4, torch.uint8)])


def another_size_is_a_mismatch_on_every_rank(member: Member, config: str) -> dict[str, Any]:
    return _mismatch(member, config, [(4, torch.uint8), (100, torch.uint8)], [(4, torch.uint8), (96, torch.uint8)])


def another_dtype_is_a_mismatch_on_every_rank(member: Member, config: str) -> dict[str, Any]:
    return _mismatch(member, config, [(8, torch.bfloat16)], [(8, torch.float16)])


def a_receive_that_nobody_sends_is_a_mismatch_on_every_rank(member: Member, config: str) -> dict[str, Any]:
    return _mismatch(member, config, [], [(0, torch.float32)])


MISMATCHES = {
    another_count_is_a_mismatch_on_every_rank: ("2 tensors", "1 are expected"),
    another_size_is_a_mismatch_on_every_rank: ("transfer 1", "100 bytes", "96 bytes"),
    another_dtype_is_a_mismatch_on_every_rank: ("transfer 0", "bfloat16", "float16"),
    a_receive_that_nobody_sends_is_a_mismatch_on_every_rank: ("0 tensors", "1 are expected"),
}


def what_is_refused_leaves_the_queue_as_it_was(member: Member, config: str) -> None:
    tensor = torch.zeros(4, 4)
    peer = (member.rank + 1) % member.world_size
    refused: list[tuple[Any, Any]] = [
        (tensor, member.rank),
        (tensor, member.world_size),
        (tensor, -1),
        (tensor, True),
        (tensor, float(peer)),
        (tensor, None),
        (tensor.t()[:, 1:], peer),
        (tensor.to_sparse(), peer),
        (torch.zeros(4, dtype=torch.complex64).conj(), peer),
        (torch.zeros(1, dtype=torch.complex64).conj().imag, peer),
        (tensor.to("meta"), peer),
        ([1.0, 2.0], peer),
        (None, peer),
    ]
    with member.shared(config) as communicator:
        for what, rank in refused:
            for add in (communicator.add_send, communicator.add_recv):
                with pytest.raises(InvalidTransferError):
                    add(what, rank)
        exchange(member, communicator, ring(member.world_size, 64))


# --- closing ---------------------------------------------------------------------------------------------------------


def after_closing_everything_but_closing_is_refused(member: Member, config: str) -> None:
    communicator = member.communicator(config)
    exchange(member, communicator, ring(member.world_size, 64))
    communicator.close()
    communicator.close()
    peer = (member.rank + 1) % member.world_size
    for call in (
        lambda: communicator.add_send(torch.zeros(1), peer),
        lambda: communicator.add_recv(torch.zeros(1), peer),
        communicator.execute,
    ):
        with pytest.raises(CommunicatorClosedError, match="closed"):
            call()
    assert communicator.staging_bytes == 0


# --- what it tells ---------------------------------------------------------------------------------------------------


def the_statistics_count_the_payload_of_this_rank(member: Member, config: str) -> None:
    messages = [Sent(0, 1, 1000), Sent(0, 1, 24), Sent(1, 0, 100_000), Sent(0, 1, 0)]
    with member.shared(config) as communicator:
        exchange(member, communicator, messages)
        stats = communicator.last_stats
        assert stats is not None
        expected = {0: (1024, 100_000, 4), 1: (100_000, 1024, 4)}.get(member.rank, (0, 0, 0))
        assert (stats.bytes_sent, stats.bytes_received, stats.messages) == expected
        assert set(stats.paths) == {0: {1}, 1: {0}}.get(member.rank, set())
        assert 0 < sum(stats.phases.values()) <= stats.seconds
        communicator.execute()
        assert communicator.last_stats is not None
        assert communicator.last_stats.bytes_sent == 0


def staging_stays_within_what_is_configured(member: Member, config: str) -> None:
    with member.communicator(config) as communicator:
        for epoch in range(3):
            exchange(member, communicator, ring(member.world_size, 1 << 20), epoch)
        if config in WINDOW_BYTES:
            together = communicator.staging_bytes + communicator.staging_limit_bytes
            assert 0 < communicator.staging_bytes < together <= WINDOW_BYTES[config]
        else:
            assert communicator.staging_bytes == 0, "CPU tensors need no staging"


def a_rank_that_does_not_execute_is_named_by_the_others(member: Member, config: str) -> dict[str, Any]:
    missing = member.world_size - 1
    separator = "&" if "?" in config else "?"
    with member.communicator(f"{config}{separator}timeout={TIMEOUT_S:g}s") as communicator:
        tensor = torch.zeros(8)
        communicator.register([tensor])
        peer = (member.rank + 1) % member.world_size
        communicator.add_send(tensor, peer)
        if member.rank == missing:
            member.environment.store.wait([f"{config} timed out on {rank}" for rank in range(missing)])
            return {}
        error = error_of(communicator.execute)
        member.environment.store.set(f"{config} timed out on {member.rank}", "")
        error["later"] = [error_of(communicator.execute), error_of(lambda: communicator.add_send(tensor, peer))]
        return error


CONTRACT = (
    two_communicators_do_not_disturb_one_another,
    what_is_refused_leaves_the_queue_as_it_was,
    after_closing_everything_but_closing_is_refused,
    the_statistics_count_the_payload_of_this_rank,
    staging_stays_within_what_is_configured,
)


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=pytest.mark.nightly), 4], ids=lambda ranks: f"{ranks} ranks"
)
def report(request: pytest.FixtureRequest) -> Report:
    """Everything below, in one set of processes for each number of ranks. The conformance kit takes 3 every day."""
    functions = [*CONTRACT, *MISMATCHES]
    if request.param == 4:
        functions.append(a_rank_that_does_not_execute_is_named_by_the_others)
    scenarios = [
        Scenario(f"{function.__name__} {config}", function, (config,)) for config in BACKENDS for function in functions
    ]
    return run_scenarios(request.param, scenarios)


@pytest.mark.parametrize("config", BACKENDS)
@pytest.mark.parametrize("promise", [function.__name__ for function in CONTRACT])
def test_contract(report: Report, promise: str, config: str) -> None:
    report.returned(f"{promise} {config}")


@pytest.mark.parametrize("config", BACKENDS)
@pytest.mark.parametrize("mismatch", list(MISMATCHES), ids=lambda function: function.__name__)
def test_a_mismatch_names_the_pair_and_moves_nothing(report: Report, mismatch: Any, config: str) -> None:
    errors = report.returned(f"{mismatch.__name__} {config}")
    for error in errors:
        assert error["type"] == "TransferMismatchError"
        assert error["peers"] == (0, 1)
        assert error["usable"]
        for words in ("rank 0 to rank 1", *MISMATCHES[mismatch]):
            assert words in error["text"]


@pytest.mark.parametrize("report", [4], ids=["4 ranks"], indirect=True)
@pytest.mark.parametrize("config", BACKENDS)
def test_a_rank_that_does_not_execute_is_named_within_the_timeout(report: Report, config: str) -> None:
    *waiting, _ = report.returned(f"{a_rank_that_does_not_execute_is_named_by_the_others.__name__} {config}")
    for error in waiting:
        assert error["type"] == "TransferTimeoutError"
        assert error["peers"] == (3,)
        assert not error["usable"]
        assert TIMEOUT_S <= error["seconds"] < TIMEOUT_S + PATIENCE_S
        assert [later["type"] for later in error["later"]] == ["CommunicatorClosedError"] * 2


def test_every_rank_exits_in_order(report: Report) -> None:
    assert report.exit_codes == [0] * len(report.outcomes)


# --- ranks that die --------------------------------------------------------------------------------------------------

DEATHS = ("torch_gloo", "torch_nccl", "nixl?window=1MiB")


def dies_before_executing(environment: RankEnvironment) -> dict[str, dict[str, Any]]:
    """All ranks make a communicator of each backend and use it; then rank 1 is gone."""
    environment.init_process_group(30)
    member = Member(environment, torch.device("cpu"))
    communicators = {}
    for config in DEATHS:
        separator = "&" if "?" in config else "?"
        communicators[config] = member.communicator(f"{config}{separator}timeout={TIMEOUT_S:g}s")
        exchange(member, communicators[config], ring(3, 1000))
    if environment.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    errors = {}
    for config, communicator in communicators.items():
        error = error_of(lambda: exchange(member, communicator, ring(3, 1000)))  # noqa: B023 - called at once
        errors[config] = {**error, "later": error_of(communicator.execute)["type"]}
        communicator.close()
    return errors


def dies_after_agreeing(environment: RankEnvironment, config: str) -> dict[str, Any]:
    """Rank 1 dies when all have compared what they queued, and the others begin to send."""
    environment.init_process_group(30)
    member = Member(environment, torch.device("cpu"))
    with member.communicator(f"{config}?timeout=3s") as communicator:
        exchange(member, communicator, ring(3, 1000))
        if environment.rank == 1:
            gloo_communicator.exchange = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        error = error_of(lambda: exchange(member, communicator, ring(3, 3 << 20)))
        return {**error, "later": error_of(communicator.execute)["type"]}


@pytest.fixture(scope="module")
def bereaved() -> list[Outcome]:
    return collect_local_ranks(dies_before_executing, 3, timeout_s=60, grace_s=30)


@pytest.mark.parametrize("config", DEATHS)
def test_survivors_name_the_rank_that_died_and_exit_in_order(bereaved: list[Outcome], config: str) -> None:
    assert [outcome.exit_code for outcome in bereaved] == [0, -signal.SIGKILL, 0]
    for outcome in (bereaved[0], bereaved[2]):
        error = outcome.result[config]
        assert error["type"] in ("TransferTimeoutError", "PeerLostError")
        assert error["peers"] == (1,)
        assert error["seconds"] < TIMEOUT_S + PATIENCE_S
        assert error["later"] == "CommunicatorClosedError"


def test_survivors_of_a_death_in_the_middle_name_the_rank_that_died() -> None:
    outcomes = collect_local_ranks(dies_after_agreeing, 3, ("torch_gloo",), timeout_s=60, grace_s=30)
    assert [outcome.exit_code for outcome in outcomes] == [0, -signal.SIGKILL, 0]
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.result["type"] in ("TransferTimeoutError", "PeerLostError")
        assert outcome.result["peers"] == (1,)
        assert outcome.result["later"] == "CommunicatorClosedError"


@pytest.mark.parametrize(("device", "accepted"), [("cuda:1", True), ("cuda:0", False)])
def test_a_stream_of_another_device_is_refused(device: str, accepted: bool) -> None:
    context = SimpleNamespace(rank=0, world_size=2, device=torch.device("cuda:1"))
    communicator = Untouched()
    communicator.bind(Binding("untouched", context))  # type: ignore[arg-type]
    stream = SimpleNamespace(device=torch.device(device))
    if accepted:
        communicator.set_stream(stream)  # type: ignore[arg-type]
    else:
        with pytest.raises(InvalidTransferError, match="cannot use a stream of cuda:0"):
            communicator.set_stream(stream)  # type: ignore[arg-type]
    assert (communicator._stream is stream) == accepted
    communicator.set_stream(None)


class Untouched(EplbCommunicator):
    """Has the contract's defaults."""

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        raise NotImplementedError

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        raise NotImplementedError

    def execute(self) -> None:
        raise NotImplementedError
