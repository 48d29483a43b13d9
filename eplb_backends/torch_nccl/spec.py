"""Registers the `torch_nccl` backend. Imports nothing heavy."""

from __future__ import annotations

from eplb_core.contract.backend import PLUGIN_API_VERSION, BackendSpec, Capabilities

BACKEND = BackendSpec(
    name="torch_nccl",
    summary="torch.distributed over NCCL on the device group; CPU tensors go over the CPU group",
    api_version=PLUGIN_API_VERSION,
    factory="eplb_backends.torch_nccl.communicator:create",
    options="eplb_backends.torch_nccl.options:TorchNcclOptions",
    # No background: beside other NCCL traffic on another stream it can deadlock (pytorch#174288).
    capabilities=Capabilities(device_types=("cpu", "cuda"), device_group=True),
    requires=("torch",),
    install="pip install torch",
    priority=10,
    stateless_substitute="pynccl",
)
