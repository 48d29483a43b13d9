"""Registers the `mooncake` backend. Imports nothing heavy."""

from __future__ import annotations

from eplb_core import BackendSpec, Capabilities

BACKEND = BackendSpec(
    name="mooncake",
    summary="one-sided READs through Mooncake's Transfer Engine, over tcp or RDMA",
    api_version=(1, 0),
    factory="eplb_mooncake.communicator:create",
    options="eplb_mooncake.options:MooncakeOptions",
    capabilities=Capabilities(device_types=("cpu",), stateless_groups=True, background=True),
    requires=("torch", "mooncake"),
    install='pip install "eplb-mooncake[cpu]"',
    probe="eplb_mooncake.probe:probe",
    priority=-10,  # `auto` takes it if nothing else works
)
