"""What one GPU can show of the NCCL backends. NCCL refuses two ranks on one GPU, but lets a rank send to itself."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from eplb_backends.pynccl.bootstrap import open_transport
from eplb_backends.pynccl.dtypes import NCCL_DTYPES, name_of
from eplb_backends.pynccl.exchange import CudaLane, NcclExchange
from eplb_backends.pynccl.options import PyNcclOptions
from eplb_backends.pynccl.probe import probe
from eplb_backends.pynccl.transport import OwnTransport
from eplb_backends.torch_nccl.device_exchange import DeviceExchange
from eplb_core.contract.context import BackendContext
from eplb_core.contract.payload import Payload
from eplb_core.control.groups import StatelessGroup, TorchGroups
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import PeerLostError, TransferError, TransferTimeoutError
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.factory.profiling import reserve_profile_buffers
from eplb_core.launch.local_ranks import RankEnvironment, run_local_ranks
from eplb_core.rearrange.rearranger import Rearranger
from eplb_core.transport.coalesce import Message, as_bytes, coalesce

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
needs_nccl4py = pytest.mark.skipif(importlib.util.find_spec("nccl") is None, reason="nccl4py is not installed")

TIMEOUT_S = 30.0
PATIENCE_S = 2.0  # what a timeout may take beyond its time
ALL_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
QUANTIZED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
DTYPES = [dtype for dtype in ALL_DTYPES if dtype not in QUANTIZED]


def device() -> torch.device:
    return torch.device("cuda", 0)


def sleep_on_stream(seconds: float) -> None:
    """Keep the current stream busy for about this long, at 2 GHz or less for longer."""
    for _ in range(10):
        torch.cuda._sleep(int(seconds * 2e8))


@pytest.fixture
def transport() -> Iterator[OwnTransport]:
    """An NCCL communicator of this rank alone."""
    own = OwnTransport(OwnTransport.unique_id(), 0, 1, device(), TIMEOUT_S)
    yield own
    own.close()


def exchange_over(transport: OwnTransport, timeout_s: float = TIMEOUT_S) -> NcclExchange:
    return NcclExchange(transport, CudaLane(device()), device(), timeout_s, abort=True)


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).cuda()


# --- nccl4py ---------------------------------------------------------------------------------------------------------


@needs_nccl4py
def test_a_communicator_is_bootstrapped_over_the_control_plane_alone() -> None:
    assert not dist.is_initialized()
    context = BackendContext(rank=0, world_size=1, device=device(), control=ControlPlane(dist.HashStore(), 0, 1))
    own = open_transport(context, PyNcclOptions())
    assert isinstance(own, OwnTransport)
    assert own.failure() == ""
    own.close()


@needs_nccl4py
def test_the_probe_says_that_it_works() -> None:
    result = probe("cuda")
    assert result.available, result.reason


@needs_nccl4py
@pytest.mark.parametrize("dtype", sorted(NCCL_DTYPES, key=str), ids=name_of)
def test_every_dtype_that_nccl_carries_arrives_as_it_is(transport: OwnTransport, dtype: torch.dtype) -> None:
    raw = random_bytes(8192)
    sent = (raw & 1).bool() if dtype == torch.bool else raw.view(dtype)
    landed = torch.zeros_like(sent)
    exchange_over(transport).run([Message(sent, 0)], [Message(landed, 0)])
    assert torch.equal(as_bytes(landed), as_bytes(sent))


@needs_nccl4py
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d not in NCCL_DTYPES], ids=name_of)
def test_every_other_dtype_arrives_as_bytes(transport: OwnTransport, dtype: torch.dtype) -> None:
    sent = random_bytes(160_000).view(dtype)
    landed = random_bytes(160_000, seed=1).view(dtype)
    exchange_over(transport).run(coalesce({0: [Payload(sent)]}), coalesce({0: [Payload(landed)]}))
    assert torch.equal(as_bytes(landed), as_bytes(sent))


@needs_nccl4py
def test_small_tensors_of_several_dtypes_are_joined_and_taken_apart(transport: OwnTransport) -> None:
    sent = [
        random_bytes(480, seed).view(dtype) for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.int8))
    ]
    landed = [torch.zeros_like(tensor) for tensor in sent]
    outgoing, incoming = (coalesce({0: [*map(Payload, tensors)]}) for tensors in (sent, landed))
    assert len(outgoing) == 1
    exchange_over(transport).run(outgoing, incoming)
    assert all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(sent, landed, strict=True))


@needs_nccl4py
def test_many_messages_of_one_pair_keep_their_order(transport: OwnTransport) -> None:
    sent = [random_bytes(100_000 + index, index) for index in range(40)]
    landed = [torch.zeros_like(tensor) for tensor in sent]
    exchange_over(transport).run([Message(each, 0) for each in sent], [Message(each, 0) for each in landed])
    assert all(torch.equal(a, b) for a, b in zip(sent, landed, strict=True))


@needs_nccl4py
def test_tensors_of_inference_mode_are_moved(transport: OwnTransport) -> None:
    with torch.inference_mode():
        sent, landed = torch.ones(100, device=device()), torch.zeros(100, device=device())
        small_sent, small_landed = torch.ones(3, device=device()), torch.zeros(3, device=device())
        outgoing = coalesce({0: [Payload(sent), Payload(small_sent)]})
        exchange_over(transport).run(outgoing, coalesce({0: [Payload(landed), Payload(small_landed)]}))
    assert bool((landed == 1).all())
    assert bool((small_landed == 1).all())


# --- streams ---------------------------------------------------------------------------------------------------------


@needs_nccl4py
def test_work_enqueued_before_is_seen_and_work_enqueued_after_sees_the_result(transport: OwnTransport) -> None:
    exchange = exchange_over(transport)
    with torch.cuda.stream(torch.cuda.Stream()):
        sent, landed = torch.zeros(1 << 20, device=device()), torch.zeros(1 << 20, device=device())
        for value in range(1, 6):
            sleep_on_stream(0.02)
            sent.fill_(value)
            exchange.run([Message(sent, 0)], [Message(landed, 0)])
            copy = landed.clone()
            sent.fill_(-1.0)
            assert bool((copy == value).all())


@needs_nccl4py
def test_a_communicator_uses_the_stream_that_it_was_given() -> None:
    weights = [torch.zeros(4, 8, device=device())]
    with create_eplb_communicator(StatelessGroup(0, 1, dist.HashStore()), "pynccl", weights) as communicator:
        communicator.set_stream(torch.cuda.Stream())
        communicator.execute()
        assert communicator.last_stats is not None


# --- groups that fail ------------------------------------------------------------------------------------------------


@needs_nccl4py
def test_a_dtype_that_nccl_does_not_know_fails_inside_the_group_which_is_closed(transport: OwnTransport) -> None:
    import nccl.core

    strange = random_bytes(64).view(torch.float8_e8m0fnu)
    with pytest.raises((TypeError, BufferError, nccl.core.NcclInvalid)):
        transport.launch([Message(strange, 0)], [], torch.cuda.current_stream())

    sent, landed = random_bytes(1000), torch.zeros(1000, dtype=torch.uint8, device=device())
    exchange_over(transport).run([Message(sent, 0)], [Message(landed, 0)])
    assert torch.equal(sent, landed)


@needs_nccl4py
def test_a_rank_that_does_not_exist_fails_the_whole_group() -> None:
    own = OwnTransport(OwnTransport.unique_id(), 0, 1, device(), TIMEOUT_S)
    sent, landed = random_bytes(1000), torch.zeros(1000, dtype=torch.uint8, device=device())
    with pytest.raises(PeerLostError) as raised:
        exchange_over(own).run([Message(sent, 0), Message(sent, 5)], [Message(landed, 0)])
    assert raised.value.peers == (0, 5)
    assert not raised.value.usable
    torch.cuda.synchronize()
    assert not landed.any(), "something of the group was launched"
    own.close()


@needs_nccl4py
def test_a_receive_that_nobody_sends_ends_in_an_error() -> None:
    own = OwnTransport(OwnTransport.unique_id(), 0, 1, device(), TIMEOUT_S)
    landed = torch.zeros(1000, dtype=torch.uint8, device=device())
    began = time.monotonic()
    with pytest.raises(TransferError):
        exchange_over(own, timeout_s=1.0).run([], [Message(landed, 0)])
    assert time.monotonic() - began < 1.0 + PATIENCE_S
    own.close()


@needs_nccl4py
def test_a_transfer_that_does_not_end_raises_in_time_and_a_new_communicator_works() -> None:
    own = OwnTransport(OwnTransport.unique_id(), 0, 1, device(), TIMEOUT_S)
    sent, landed = random_bytes(1000), torch.zeros(1000, dtype=torch.uint8, device=device())
    sleep_on_stream(4.0)  # work that is ahead of the transfer, and does not end in time
    began = time.monotonic()
    with pytest.raises(TransferTimeoutError, match="rank 0") as raised:
        exchange_over(own, timeout_s=0.3).run([Message(sent, 0)], [Message(landed, 0)])
    assert time.monotonic() - began < 0.3 + PATIENCE_S
    assert raised.value.peers == (0,)
    own.close()

    torch.cuda.synchronize()
    following = OwnTransport(OwnTransport.unique_id(), 0, 1, device(), TIMEOUT_S)
    landed.zero_()
    exchange_over(following).run([Message(sent, 0)], [Message(landed, 0)])
    assert torch.equal(sent, landed)
    following.close()


@needs_nccl4py
def test_closing_and_aborting_in_any_order_is_fine() -> None:
    for steps in (("close", "close"), ("abort", "close"), ("close", "abort")):
        own: Any = OwnTransport(OwnTransport.unique_id(), 0, 1, device(), TIMEOUT_S)
        for step in steps:
            getattr(own, step)()


@needs_nccl4py
def test_a_new_communicator_works_beside_an_old_one_and_after_it(transport: OwnTransport) -> None:
    following = OwnTransport(OwnTransport.unique_id(), 0, 1, device(), TIMEOUT_S)
    sent, landed = random_bytes(1000), torch.zeros(1000, dtype=torch.uint8, device=device())
    exchange_over(transport).run([Message(sent, 0)], [Message(landed, 0)])
    exchange_over(following).run([Message(sent, 0)], [Message(landed, 0)])
    transport.close()
    landed.zero_()
    exchange_over(following).run([Message(sent, 0)], [Message(landed, 0)])
    assert torch.equal(sent, landed)
    following.close()


# --- whole communicators, one rank -----------------------------------------------------------------------------------


@needs_nccl4py
@pytest.mark.parametrize("config", ["pynccl", "torch_nccl", "pynccl?warm_up=off", "pynccl?reinterpret=bytes"])
def test_experts_are_rearranged_on_a_stateless_group(config: str) -> None:
    weights = [[torch.arange(4.0, device=device()).reshape(4, 1).repeat(1, 3)]]
    with create_eplb_communicator(StatelessGroup(0, 1, dist.HashStore()), config, weights[0]) as communicator:
        Rearranger(communicator, weights).run([[0, 1, 2, 3]], [[3, 3, 0, 1]])
    assert weights[0][0][:, 0].tolist() == [3.0, 3.0, 0.0, 1.0]


def one_rank_of_torch_nccl(environment: RankEnvironment) -> list[str]:
    """Use torch_nccl at world size 1, in a process of its own."""
    torch.cuda.set_device(0)
    environment.init_process_group()
    weights = [torch.zeros(4, 8, device=device())]
    said = []
    for warm_up in ("peers", "group", "off"):
        groups = TorchGroups(device_group=dist.new_group(backend="nccl"))
        with create_eplb_communicator(groups, f"torch_nccl?warm_up={warm_up}", weights) as communicator:
            communicator.execute()
            grown = reserve_profile_buffers(communicator, weights)
            said.append(f"{type(communicator).__name__} {grown >= 0}")
    return said


def test_torch_nccl_works_with_one_rank() -> None:
    assert run_local_ranks(one_rank_of_torch_nccl, 1, timeout_s=100) == [["NcclCommunicator True"] * 3]


BUSY_S = 5.0
"""How long the device is busy. torch 2.11 waits for that inside `ProcessGroup.abort()`, and holds the interpreter lock
meanwhile, so the error comes only after it."""


def a_torch_group_that_is_stuck(environment: RankEnvironment) -> dict[str, Any]:
    """Let a transfer time out behind work that does not end, then use a new group in the same process."""
    torch.cuda.set_device(0)
    environment.init_process_group()
    group = dist.new_group(backend="nccl")
    DeviceExchange(group, device(), TIMEOUT_S, abort=True).warm_up(peers=True)
    stuck = DeviceExchange(group, device(), 0.5, abort=True)
    sleep_on_stream(BUSY_S)
    began = time.monotonic()
    try:
        stuck.warm_up(peers=True)
        raised = ""
    except TransferTimeoutError as error:
        raised = str(error)
    seconds = time.monotonic() - began
    torch.cuda.synchronize()
    following = TorchGroups(device_group=dist.new_group(backend="nccl"))
    with create_eplb_communicator(following, "torch_nccl", [torch.zeros(1, device=device())]) as communicator:
        communicator.execute()
    return {"raised": raised, "seconds": seconds}


def test_a_stuck_process_group_raises_in_time_and_the_process_goes_on() -> None:
    (said,) = run_local_ranks(a_torch_group_that_is_stuck, 1, timeout_s=100)
    assert "did not end within 0.5 s" in said["raised"]
    assert said["seconds"] < 0.5 + BUSY_S + PATIENCE_S
