"""The options of the `pynccl` backend, as written in a config string."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from eplb_core.contract.option_types import ByteSize, CommonOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class PyNcclOptions(CommonOptions):
    """Options of the `pynccl` backend. It accepts those of `torch_nccl`, which it replaces in stateless groups.

    Attributes:
        communicator: which NCCL communicator carries the bytes: `engine` is that of the group coordinator, `own` is
            made with nccl4py, `auto` takes the engine's if there is one.
        reinterpret: how to treat dtypes that NCCL does not support: `off` refuses them, `bytes` moves the bytes.
        coalesce: tensors below this size are joined into one message per peer; 0B joins none.
        warm_up: what is connected when the communicator is made: every pair of ranks (`peers`), or only what NCCL
            connects by itself (`group`, `off`). Otherwise NCCL connects a pair at its first transfer, which has no
            deadline.
        abort: whether a transfer that timed out aborts an `own` communicator, so that its kernels leave the GPU. Only
            the engine can abort its communicator.
    """

    communicator: Literal["auto", "engine", "own"] = field(
        default="auto", metadata={"help": "the engine's NCCL communicator, or one of our own made with nccl4py"}
    )
    reinterpret: Literal["off", "bytes"] = field(
        default="off", metadata={"help": "move dtypes that NCCL does not know as bytes, or refuse them"}
    )
    coalesce: ByteSize = field(
        default=ByteSize(64 << 10), metadata={"help": "join tensors below this size into one message for each peer"}
    )
    warm_up: Literal["peers", "group", "off"] = field(
        default="peers", metadata={"help": "what NCCL connects at the start: every pair of ranks, the group, nothing"}
    )
    abort: bool = field(default=True, metadata={"help": "abort our own NCCL communicator when a transfer times out"})
