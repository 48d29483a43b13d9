"""The options of the `nixl` backend, as they stand in a config string."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from eplb_core.backend import ByteSize, CommonOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class NixlOptions(CommonOptions):
    """Options of the `nixl` backend.

    Attributes:
        window: bytes of staging memory that a rank may use, send and receive side together.
        mode: `direct` reads from and into registered memory without a copy and refuses other tensors; `packed` copies
            every sent tensor into the send window first; `auto` reads registered tensors directly and packs the rest.
        progress: whether NIXL runs a progress thread of its own. `auto` is off: a rank that executes polls anyway,
            and on few cores the thread competes with that (measured two to three times slower on 2 cores).
    """

    window: ByteSize = field(
        default=ByteSize(256 << 20),
        metadata={"help": "staging memory of a rank, send and receive side together", "min": 4096},
    )
    mode: Literal["auto", "packed", "direct"] = field(
        default="auto", metadata={"help": "read registered tensors in place (direct), copy through a window (packed)"}
    )
    progress: Literal["auto", "on", "off"] = field(
        default="auto", metadata={"help": "NIXL's own progress thread; auto = off, a rank polls while it executes"}
    )
