"""Whether NIXL works here: two agents in one process, one READ between them, every byte compared."""

from __future__ import annotations

import time

import numpy as np
import torch

from eplb_backends.nixl.agent import Agent
from eplb_core.contract.backend import ProbeResult

_BYTES = 1 << 20
_PATIENCE_S = 15.0


def probe(device_type: str) -> ProbeResult:
    """Register memory of `device_type`, read a MiB of random bytes, and compare it; a `BackendProbe`."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return ProbeResult(False, "torch sees no CUDA device")
    device = torch.device(device_type)  # for CUDA, the current one
    source, reader = (Agent(f"eplb-probe-{side}", device, progress_thread=False) for side in ("source", "reader"))
    try:
        expected = torch.randint(0, 256, (_BYTES,), dtype=torch.uint8, device=device)
        landed = torch.full_like(expected, 0xEE)
        source.register([(expected.data_ptr(), _BYTES)], [expected])
        reader.register([(landed.data_ptr(), _BYTES)], [landed])
        reader.add_peer(source.name, source.metadata(), source.device_number)
        source.add_peer(reader.name, reader.metadata(), reader.device_number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.monotonic()
        remote, local, lengths = np.array([[expected.data_ptr()], [landed.data_ptr()], [_BYTES]], np.int64)
        read = reader.read(source.name, remote, local, lengths)
        while not reader.finished(read):
            source.notifications()
            if time.monotonic() - began > _PATIENCE_S:
                return ProbeResult(False, f"a READ of 1 MiB did not end within {_PATIENCE_S:g} s")
        if not torch.equal(landed, expected):
            return ProbeResult(False, "a READ of 1 MiB brought wrong bytes")
        return ProbeResult(True, f"read 1 MiB of {reader.memory_type} from another agent, every byte right")
    finally:
        reader.close()
        source.close()
