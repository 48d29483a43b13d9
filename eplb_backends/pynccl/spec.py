"""Registers the `pynccl` backend. Imports nothing heavy."""

from __future__ import annotations

from eplb_core.contract.backend import PLUGIN_API_VERSION, BackendSpec, Capabilities

NCCL_DTYPES = (
    "bool",  # NCCL's uint8, as in torch.distributed
    "int8",
    "uint8",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "float8_e4m3fn",
    "float8_e5m2",
)
"""The dtypes that NCCL supports, by torch's names. With `reinterpret=bytes` all others are moved too."""

BACKEND = BackendSpec(
    name="pynccl",
    summary="NCCL send and recv without torch.distributed: the engine's communicator, or one made with nccl4py",
    api_version=PLUGIN_API_VERSION,
    factory="eplb_backends.pynccl.communicator:create",
    options="eplb_backends.pynccl.options:PyNcclOptions",
    # No background: beside other NCCL traffic on another stream it can deadlock (pytorch#174288).
    capabilities=Capabilities(device_types=("cuda",), stateless_groups=True, dtypes=NCCL_DTYPES),
    # nccl4py is not among these: an engine that has a communicator needs none.
    requires=("torch",),
    install='pip install "eplb[nccl]"',
    probe="eplb_backends.pynccl.probe:probe",
    priority=5,
)
