"""How the stand-in registers itself: the backend `cuda_ipc_standin`, for the tests alone."""

from __future__ import annotations

import dataclasses

from eplb_cuda_ipc.spec import BACKEND as REAL

from eplb_core import Capabilities

BACKEND = dataclasses.replace(
    REAL,
    name="cuda_ipc_standin",
    summary="cuda_ipc over host memory, to test all of it but CUDA",
    factory="standin:create",
    capabilities=Capabilities(device_types=("cpu",), stateless_groups=True, background=True),
    requires=("torch",),
    probe=None,
)
