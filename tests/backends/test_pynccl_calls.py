"""In which order `pynccl` calls an NCCL communicator, seen by a fake one that records. Nothing here moves a byte."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist

from eplb_backends.pynccl.bootstrap import open_transport
from eplb_backends.pynccl.communicator import PyNcclCommunicator, create
from eplb_backends.pynccl.options import PyNcclOptions
from eplb_backends.pynccl.transport import EngineTransport, OwnTransport, Transport
from eplb_core.contract.context import BackendContext
from eplb_core.contract.option_types import Duration
from eplb_core.control.agreement import Answer
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import (
    BackendUnavailableError,
    CommunicatorClosedError,
    InvalidTransferError,
    PeerLostError,
    TransferMismatchError,
    TransferTimeoutError,
)
from eplb_core.transport import queued

TIMEOUT_S = 0.2


class RecordingCommunicator:
    """Stands for an engine's communicator: writes down what is called, and fails where it is told to."""

    disabled = False
    available = True

    def __init__(self, fails_at: str = "") -> None:
        self.calls: list[str] = []
        self.fails_at = fails_at

    def _called(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fails_at:
            raise RuntimeError(f"{call} failed")

    def group_start(self) -> None:
        self._called("group_start")

    def group_end(self) -> None:
        self._called("group_end")

    def send(self, tensor: torch.Tensor, dst: int, stream: object = None) -> None:
        self._called(f"send {tensor.numel()} to {dst}")

    def recv(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        self._called(f"recv {tensor.numel()} from {src}")


class RecordingLane:
    """Stands for a CUDA stream: writes down what is done with it, into the same list."""

    stream = None

    def __init__(self, calls: list[str], ends: bool = True) -> None:
        self.calls = calls
        self.ends = ends
        self.kept: list[torch.Tensor] = []

    def enter(self) -> None:
        self.calls.append("enter")

    def mark(self) -> None:
        self.calls.append("mark")

    def finished(self) -> bool:
        return self.ends

    def leave(self) -> None:
        self.calls.append("leave")

    def keep(self, tensor: torch.Tensor) -> None:
        self.kept.append(tensor)


class AbortableTransport(EngineTransport):
    """Adds what only a communicator of our own can do."""

    def __init__(self, communicator: RecordingCommunicator, failure: str = "") -> None:
        super().__init__(communicator)
        self._calls = communicator.calls
        self._failure = failure

    def failure(self) -> str:
        return self._failure

    def abort(self) -> bool:
        self._calls.append("abort")
        return True

    def close(self) -> None:
        self._calls.append("close")


def context_of(num_ranks: int = 1, **more: Any) -> BackendContext:
    control = ControlPlane(dist.HashStore(), 0, num_ranks)
    return BackendContext(rank=0, world_size=num_ranks, device=torch.device("cpu"), control=control, **more)


def communicator_of(
    transport: Transport, lane: RecordingLane, monkeypatch: pytest.MonkeyPatch, *, matches: bool = True, **options: Any
) -> PyNcclCommunicator:
    """Return rank 0 of three; the comparison with the others, which are not there, is left out or fails."""

    def check(*_: object) -> None:
        if not matches:
            raise TransferMismatchError("another size", peers=[1], usable=True)

    monkeypatch.setattr(queued, "check_match", check)
    return PyNcclCommunicator(context_of(3), PyNcclOptions(timeout=Duration(TIMEOUT_S), **options), transport, lane)


def queue(communicator: PyNcclCommunicator) -> None:
    communicator.add_send(torch.zeros(100_000, dtype=torch.uint8), 1)
    communicator.add_send(torch.zeros(70_000, dtype=torch.uint8), 2)
    communicator.add_recv(torch.zeros(30_000, dtype=torch.float32), 2)


def test_everything_queued_is_issued_inside_one_group_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = RecordingCommunicator()
    communicator = communicator_of(EngineTransport(fake), RecordingLane(fake.calls), monkeypatch)
    queue(communicator)
    assert fake.calls == []

    communicator.execute()

    issued = ["recv 120000 from 2", "send 100000 to 1", "send 70000 to 2"]
    assert fake.calls == ["enter", "group_start", *issued, "group_end", "mark", "leave"]


def test_small_tensors_of_a_peer_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = RecordingCommunicator()
    communicator = communicator_of(EngineTransport(fake), RecordingLane(fake.calls), monkeypatch)
    for size in (5, 6, 7):
        communicator.add_send(torch.zeros(size, dtype=torch.float64), 1)
    communicator.execute()
    assert [call for call in fake.calls if "send" in call] == ["send 144 to 1"]


def test_nothing_is_joined_where_coalescing_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = RecordingCommunicator()
    communicator = communicator_of(EngineTransport(fake), RecordingLane(fake.calls), monkeypatch, coalesce=0)
    for size in (5, 6):
        communicator.add_send(torch.zeros(size, dtype=torch.uint8), 1)
    communicator.execute()
    assert [call for call in fake.calls if "send" in call] == ["send 5 to 1", "send 6 to 1"]


def test_nothing_queued_is_nothing_called(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = RecordingCommunicator()
    communicator_of(EngineTransport(fake), RecordingLane(fake.calls), monkeypatch).execute()
    assert fake.calls == []


def test_a_mismatch_calls_nothing_and_leaves_the_communicator_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = RecordingCommunicator()
    communicator = communicator_of(EngineTransport(fake), RecordingLane(fake.calls), monkeypatch, matches=False)
    queue(communicator)
    with pytest.raises(TransferMismatchError):
        communicator.execute()
    assert fake.calls == []
    queue(communicator)


@pytest.mark.parametrize("fails_at", ["recv 120000 from 2", "send 70000 to 2"])
def test_a_failure_inside_the_group_still_closes_it(fails_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = RecordingCommunicator(fails_at)
    lane = RecordingLane(fake.calls)
    communicator = communicator_of(AbortableTransport(fake), lane, monkeypatch)
    queue(communicator)

    with pytest.raises(PeerLostError, match=f"{fails_at} failed") as raised:
        communicator.execute()

    assert fake.calls[-3:] == [fails_at, "group_end", "abort"]
    assert raised.value.peers == (1, 2)
    with pytest.raises(CommunicatorClosedError):
        queue(communicator)


def test_a_group_that_cannot_be_closed_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = RecordingCommunicator("group_end")
    communicator = communicator_of(AbortableTransport(fake), RecordingLane(fake.calls), monkeypatch)
    queue(communicator)
    with pytest.raises(PeerLostError, match="group_end failed"):
        communicator.execute()
    assert fake.calls[-2:] == ["group_end", "abort"]


def test_a_group_that_does_not_open_is_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = RecordingCommunicator("group_start")
    communicator = communicator_of(EngineTransport(fake), RecordingLane(fake.calls), monkeypatch)
    queue(communicator)
    with pytest.raises(PeerLostError):
        communicator.execute()
    assert fake.calls == ["enter", "group_start"]


def test_a_transfer_that_does_not_end_names_the_peers_and_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = RecordingCommunicator()
    lane = RecordingLane(fake.calls, ends=False)
    communicator = communicator_of(AbortableTransport(fake), lane, monkeypatch)
    queue(communicator)

    with pytest.raises(TransferTimeoutError, match="ranks 1, 2") as raised:
        communicator.execute()

    assert fake.calls[-2:] == ["mark", "abort"]
    assert raised.value.peers == (1, 2)
    assert not raised.value.usable


def test_memory_of_a_transfer_that_does_not_end_is_kept_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = RecordingCommunicator()
    lane = RecordingLane(fake.calls, ends=False)
    communicator = communicator_of(EngineTransport(fake), lane, monkeypatch)
    queue(communicator)
    with pytest.raises(TransferTimeoutError, match="still on the GPU"):
        communicator.execute()
    assert sorted(tensor.numel() for tensor in lane.kept) == [70_000, 100_000, 120_000]


def test_abort_off_leaves_the_communicator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = RecordingCommunicator()
    lane = RecordingLane(fake.calls, ends=False)
    communicator = communicator_of(AbortableTransport(fake), lane, monkeypatch, abort=False)
    queue(communicator)
    with pytest.raises(TransferTimeoutError):
        communicator.execute()
    assert "abort" not in fake.calls


def test_an_error_that_nccl_reports_while_waiting_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = RecordingCommunicator()
    lane = RecordingLane(fake.calls, ends=False)
    communicator = communicator_of(AbortableTransport(fake, "remote process exited"), lane, monkeypatch)
    queue(communicator)
    with pytest.raises(PeerLostError, match="remote process exited"):
        communicator.execute()
    assert fake.calls[-1] == "abort"


def test_closing_closes_the_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = RecordingCommunicator()
    communicator_of(AbortableTransport(fake), RecordingLane(fake.calls), monkeypatch).close()
    assert fake.calls == ["close"]


# --- dtypes ----------------------------------------------------------------------------------------------------------


def test_a_dtype_that_nccl_cannot_carry_is_refused_when_it_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = RecordingCommunicator()
    communicator = communicator_of(EngineTransport(fake), RecordingLane(fake.calls), monkeypatch)
    for add in (communicator.add_send, communicator.add_recv):
        with pytest.raises(InvalidTransferError, match=r"float8_e8m0fnu.*\n.*reinterpret=bytes"):
            add(torch.zeros(4, dtype=torch.uint8).view(torch.float8_e8m0fnu), 1)
    communicator.execute()
    assert fake.calls == []


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.int16, torch.complex64])
def test_its_bytes_travel_where_reinterpret_is_bytes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = RecordingCommunicator()
    lane = RecordingLane(fake.calls)
    communicator = communicator_of(EngineTransport(fake), lane, monkeypatch, reinterpret="bytes")
    communicator.add_send(torch.zeros(80_000, dtype=torch.uint8).view(dtype), 1)
    communicator.execute()
    assert "send 80000 to 1" in fake.calls


def test_the_factory_lists_what_nccl_cannot_carry_sorted_and_once() -> None:
    context = BackendContext(
        rank=0, world_size=1, device=torch.device("cuda", 0), control=ControlPlane(dist.HashStore(), 0, 1)
    )
    weights = [torch.zeros(1, dtype=dtype) for dtype in (torch.int16, torch.float32, torch.complex64, torch.int16)]
    with pytest.raises(BackendUnavailableError, match=r"dtypes complex64, int16\n.*reinterpret=bytes") as raised:
        create(context, PyNcclOptions(), weights)
    assert isinstance(raised.value, RuntimeError)


def test_the_factory_refuses_other_devices_by_name() -> None:
    with pytest.raises(BackendUnavailableError, match="CUDA-like devices only: these are on cpu"):
        create(context_of(), PyNcclOptions(), [])


# --- whose communicator it is -----------------------------------------------------------------------------------------


def carried(**attributes: Any) -> Any:
    fake = RecordingCommunicator()
    for name, value in attributes.items():
        setattr(fake, name, value)
    return SimpleNamespace(pynccl_comm=fake)


def test_the_engines_communicator_is_taken_if_there_is_one() -> None:
    assert isinstance(open_transport(context_of(device_communicator=carried()), PyNcclOptions()), EngineTransport)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"disabled": True}, "disabled"),
        ({"available": False}, "not available"),
        ({"world_size": 8}, "another group"),
        ({"rank": 3}, "another group"),
    ],
)
def test_one_that_cannot_be_used_is_refused(attributes: dict[str, Any], words: str) -> None:
    context = context_of(device_communicator=carried(**attributes))
    with pytest.raises(BackendUnavailableError, match=words):
        open_transport(context, PyNcclOptions())


def test_asking_for_the_engines_where_there_is_none_is_an_error() -> None:
    with pytest.raises(BackendUnavailableError, match="carries no NCCL communicator"):
        open_transport(context_of(), PyNcclOptions(communicator="engine"))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Answer(value=b"own"), "rank 0 = engine, rank 1 = own"),
        (Answer(problem="it has no driver"), "rank 1 .*it has no driver"),
    ],
)
def test_ranks_with_different_communicators_are_told(other: Answer, words: str) -> None:
    store = dist.HashStore()
    store.set("0/1", msgspec.msgpack.encode(other))  # what rank 1 would say
    control = ControlPlane(store, 0, 2)
    context = BackendContext(
        rank=0, world_size=2, device=torch.device("cpu"), control=control, device_communicator=carried()
    )
    with pytest.raises(BackendUnavailableError, match=words):
        open_transport(context, PyNcclOptions(timeout=Duration(1.0)))


@pytest.mark.parametrize("unique_id", [b"", b"own", b"own" + bytes(127), b"own" + bytes(129)])
def test_an_id_of_another_length_is_refused(unique_id: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eplb_backends.pynccl.bootstrap._need_nccl4py", lambda: None)
    monkeypatch.setattr(OwnTransport, "unique_id", staticmethod(lambda: unique_id.removeprefix(b"own")))
    with pytest.raises(BackendUnavailableError, match="128 are expected"):
        open_transport(context_of(), PyNcclOptions())
