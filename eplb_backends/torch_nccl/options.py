"""The options of the `torch_nccl` backend, as written in a config string."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from eplb_core.contract.option_types import ByteSize, CommonOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchNcclOptions(CommonOptions):
    """Options of the `torch_nccl` backend. `pynccl`, which replaces it in stateless groups, accepts them too.

    Attributes:
        coalesce: tensors below this size are joined into one message per peer; 0B joins none.
        warm_up: what is connected when the communicator is made, on a GPU: every pair of ranks, only the group, or
            nothing. Otherwise NCCL connects a pair at its first transfer, which has no deadline.
        abort: whether a transfer that timed out aborts the group's NCCL communicator, so that its kernels leave the
            GPU. The engine cannot use that process group afterwards; without the abort it would hang there.
    """

    coalesce: ByteSize = field(
        default=ByteSize(64 << 10), metadata={"help": "join tensors below this size into one message for each peer"}
    )
    warm_up: Literal["peers", "group", "off"] = field(
        default="peers", metadata={"help": "what NCCL connects at the start: every pair of ranks, the group, nothing"}
    )
    abort: bool = field(default=True, metadata={"help": "abort the NCCL communicator when a transfer times out"})
