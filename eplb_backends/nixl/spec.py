"""Registers the `nixl` backend. Imports nothing heavy."""

from __future__ import annotations

from eplb_core.contract.backend import PLUGIN_API_VERSION, BackendSpec, Capabilities

BACKEND = BackendSpec(
    name="nixl",
    summary="NIXL READ, driven by the receiver: direct from registered weights, or through packed windows",
    api_version=PLUGIN_API_VERSION,
    factory="eplb_backends.nixl.communicator:create",
    options="eplb_backends.nixl.options:NixlOptions",
    capabilities=Capabilities(device_types=("cpu", "cuda"), stateless_groups=True, background=True),
    requires=("nixl|nixl_rocm|rixl",),
    install='pip install "eplb[nixl]"',
    probe="eplb_backends.nixl.probe:probe",
    priority=20,
)
