"""The options of the `torch_gloo` backend, as written in a config string."""

from __future__ import annotations

from dataclasses import dataclass, field

from eplb_core.contract.option_types import ByteSize, CommonOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class GlooOptions(CommonOptions):
    """Options of the `torch_gloo` backend.

    Attributes:
        pin_memory: whether the buffers that device tensors are staged in are page-locked.
        window: bytes of host memory that a rank may stage device tensors in; CPU tensors need none.
    """

    pin_memory: bool = field(default=True, metadata={"help": "page-lock the buffers that device tensors are staged in"})
    window: ByteSize = field(
        default=ByteSize(256 << 20),
        metadata={"help": "host memory that device tensors are staged in; CPU tensors need none", "min": 4096},
    )
