"""Tests whether `pynccl` works here without an engine: a communicator of one rank sends to itself."""

from __future__ import annotations

import importlib.util

import torch

from eplb_backends.pynccl.exchange import CudaLane, NcclExchange
from eplb_backends.pynccl.transport import OwnTransport
from eplb_core.contract.backend import ProbeResult
from eplb_core.transport.coalesce import Message
from eplb_core.transport.streams import on_stream

_BYTES = 1 << 20
_PATIENCE_S = 20.0


def probe(device_type: str) -> ProbeResult:
    """Send a MiB of random bytes from one GPU to itself; a `BackendProbe`."""
    if device_type != "cuda":
        return ProbeResult(False, f"NCCL does not move {device_type} tensors")
    if not torch.cuda.is_available():
        return ProbeResult(False, "torch sees no CUDA device")
    if importlib.util.find_spec("nccl") is None:
        return ProbeResult(False, "nccl4py is not installed; an engine that has an NCCL communicator needs none")
    device = torch.device("cuda", torch.cuda.current_device())
    transport = OwnTransport(OwnTransport.unique_id(), 0, 1, device, _PATIENCE_S)
    try:
        with on_stream(device, None):
            expected = torch.randint(0, 256, (_BYTES,), dtype=torch.uint8, device=device)
            landed = torch.zeros_like(expected)
            exchange = NcclExchange(transport, CudaLane(device), device, _PATIENCE_S, abort=True)
            exchange.run([Message(expected, 0)], [Message(landed, 0)])
            if not torch.equal(landed, expected):
                return ProbeResult(False, "sending 1 MiB brought wrong bytes")
        return ProbeResult(True, "sent 1 MiB over NCCL to this GPU itself, every byte right")
    finally:
        transport.close()
