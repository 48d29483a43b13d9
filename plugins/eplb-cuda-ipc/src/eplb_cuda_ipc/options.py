"""The options of the `cuda_ipc` backend, as written in a config string."""

from __future__ import annotations

from dataclasses import dataclass, field

from eplb_core import ByteSize, CommonOptions

_LEAST = 256 << 20  # of what the window is by default


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaIpcOptions(CommonOptions):
    """Options of the `cuda_ipc` backend.

    Attributes:
        window: staging memory of a rank, including that of a rearrangement. None is a thirty-second part of the GPU's,
            between 256 MiB and 1 GiB.
        packed: the part of it for packing tensors that peers cannot map.
    """

    window: ByteSize | None = field(
        default=None,
        metadata={
            "help": "staging memory of a rank, including that of a rearrangement; none = by device",
            "min": 128 << 10,
        },
    )
    # Small, because registered tensors do not need it, and it leaves more to a rearrangement: with 256 MiB, six
    # experts of DeepSeek-V3 (42 MiB each) fit into the rest.
    packed: ByteSize = field(
        default=ByteSize(4 << 20),
        metadata={"help": "the part of it for packing tensors that peers cannot map", "min": 4096},
    )

    def __post_init__(self) -> None:
        """Refuse a packing window that is too large."""
        if self.packed > (_LEAST if self.window is None else self.window) // 2:
            raise ValueError("packed must be at most half of window")
