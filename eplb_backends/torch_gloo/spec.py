"""Registers the `torch_gloo` backend. Imports nothing heavy."""

from __future__ import annotations

from eplb_core.contract.backend import PLUGIN_API_VERSION, BackendSpec, Capabilities

BACKEND = BackendSpec(
    name="torch_gloo",
    summary="torch.distributed over gloo; device tensors go through pinned memory",
    api_version=PLUGIN_API_VERSION,
    factory="eplb_backends.torch_gloo.communicator:create",
    options="eplb_backends.torch_gloo.options:GlooOptions",
    capabilities=Capabilities(device_types=("cpu", "cuda"), background=True),
    requires=("torch",),
    install="pip install torch",
    priority=0,
)
