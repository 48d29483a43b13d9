"""Registers the `cuda_ipc` backend. Imports nothing heavy."""

from __future__ import annotations

from eplb_core import BackendSpec, Capabilities

BACKEND = BackendSpec(
    name="cuda_ipc",
    summary="GPUs of one host: peers' memory mapped by CUDA IPC, one copy, no NCCL",
    api_version=(1, 0),
    factory="eplb_cuda_ipc.communicator:create",
    options="eplb_cuda_ipc.options:CudaIpcOptions",
    capabilities=Capabilities(device_types=("cuda",), stateless_groups=True, background=True),
    requires=("torch", "cuda"),
    install="pip install eplb-cuda-ipc",
    probe="eplb_cuda_ipc.probe:probe",
    # The fastest between GPUs of one host. Elsewhere its construction fails, and `auto` takes the next backend.
    priority=30,
)
