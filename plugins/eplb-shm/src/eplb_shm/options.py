"""The options of the `shm` backend, as written in a config string."""

from __future__ import annotations

from dataclasses import dataclass, field

from eplb_core import ByteSize, CommonOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ShmOptions(CommonOptions):
    """Options of the `shm` backend.

    Attributes:
        window: bytes of shared memory of a rank, for any number of ranks.
    """

    window: ByteSize = field(
        default=ByteSize(64 << 20), metadata={"help": "shared memory of a rank, for any number of ranks", "min": 4096}
    )
