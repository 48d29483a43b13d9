"""The options of the `pynccl` backend, as they stand in a config string."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from eplb_core.contract.option_types import ByteSize, CommonOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class PyNcclOptions(CommonOptions):
    """Options of the `pynccl` backend. It knows those of `torch_nccl`, for which it stands in in stateless groups.

    Attributes:
        communicator: whose NCCL communicator carries the bytes: `engine` is the one that the group coordinator
            carries, `own` is made with nccl4py, `auto` takes the engine's where there is one.
        reinterpret: what becomes of dtypes that NCCL has no number for: `off` refuses them, `bytes` moves the bytes.
        coalesce: tensors below this size travel together, one message for each peer; 0B joins none.
        warm_up: what is connected when the communicator is made: every pair of ranks (`peers`), or nothing more than
            NCCL does by itself (`group`, `off`). NCCL connects a pair at its first transfer otherwise, and that has
            no deadline.
        abort: whether a transfer that timed out aborts an `own` communicator, so that its kernels leave the GPU.
            Nobody but its engine can abort the engine's.
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
