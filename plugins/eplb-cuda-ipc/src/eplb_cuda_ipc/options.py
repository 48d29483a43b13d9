"""The options of the `cuda_ipc` backend, as they stand in a config string."""

from __future__ import annotations

from dataclasses import dataclass, field

from eplb_core import ByteSize, CommonOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaIpcOptions(CommonOptions):
    """Options of the `cuda_ipc` backend.

    Attributes:
        window: staging memory of a rank, that of a rearrangement included.
        packed: the part of it that is kept for packing tensors that peers cannot map.
    """

    window: ByteSize = field(
        default=ByteSize(256 << 20),
        metadata={"help": "staging memory of a rank, that of a rearrangement included", "min": 128 << 10},
    )
    # Small, because whatever is registered does not need it, and a rearrangement has the more for it: with 256 MiB,
    # six experts of DeepSeek-V3 (42 MiB each) fit into the rest.
    packed: ByteSize = field(
        default=ByteSize(4 << 20),
        metadata={"help": "the part of it for packing tensors that peers cannot map", "min": 4096},
    )

    def __post_init__(self) -> None:
        """Refuse to pack in more than there is."""
        if self.packed > self.window // 2:
            raise ValueError("packed has to be at most half of window")
