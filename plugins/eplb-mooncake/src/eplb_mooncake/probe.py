"""Tries Mooncake on this machine: one engine reads from another, over loopback."""

from __future__ import annotations

import numpy as np

from eplb_core import EplbError, ProbeResult
from eplb_mooncake.chunks import address_of
from eplb_mooncake.engine import Engine
from eplb_mooncake.options import MooncakeOptions

_HOST = "127.0.0.1"
_TIMEOUT_S = 10.0


def probe(device_type: str) -> ProbeResult:
    """Read bytes from one Transfer Engine through another over tcp and compare them; a `BackendProbe`."""
    source = np.arange(4096, dtype=np.uint8)
    landing = np.zeros_like(source)
    try:
        server, client = Engine(_HOST, MooncakeOptions()), Engine(_HOST, MooncakeOptions())
        server.register(address_of(source), source.nbytes, source)
        client.register(address_of(landing), landing.nbytes, landing)
        client.open({0: (server.name, address_of(source), source.tobytes())}, landing, _TIMEOUT_S)
    except EplbError as error:
        return ProbeResult(False, f"{error.what}: {error.why}")
    return ProbeResult(True, "4096 bytes were read through Mooncake over tcp")
