"""The options of the `cuda_ipc` backend, as written in a config string."""

from __future__ import annotations

from dataclasses import dataclass, field

from eplb_core import ByteSize, CommonOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaIpcOptions(CommonOptions):
    """Options of the `cuda_ipc` backend.

    Attributes:
        window: staging memory of a rank, including that of a rearrangement.
        packed: the part of it for packing tensors that peers cannot map.
    """

    window: ByteSize = field(
        default=ByteSize(256 << 20),
        metadata={"help": "staging memory of a rank, including that of a rearrangement", "min": 128 << 10},
    )
    # Small, because registered tensors do not need it, and it leaves more to a rearrangement: with 256 MiB, six
    # experts of DeepSeek-V3 (42 MiB each) fit into the rest.
    packed: ByteSize = field(
        default=ByteSize(4 << 20),
        metadata={"help": "the part of it for packing tensors that peers cannot map", "min": 4096},
    )

    def __post_init__(self) -> None:
        """Refuse a packing window that is too large."""
        if self.packed > self.window // 2:
            raise ValueError("packed must be at most half of window")
