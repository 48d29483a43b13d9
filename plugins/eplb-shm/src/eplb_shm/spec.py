"""Registers the `shm` backend. Imports nothing heavy."""

from __future__ import annotations

from eplb_core import BackendSpec, Capabilities

BACKEND = BackendSpec(
    name="shm",
    summary="shared memory between CPU ranks of one host: one copy in, one copy out",
    api_version=(1, 0),
    factory="eplb_shm.communicator:create",
    options="eplb_shm.options:ShmOptions",
    capabilities=Capabilities(device_types=("cpu",), stateless_groups=True, background=True),
    requires=("torch",),
    install="pip install eplb-shm",
    probe="eplb_shm.window:probe",
    priority=0,
)
