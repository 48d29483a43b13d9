"""The options of the `nixl` backend, as written in a config string."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from eplb_core.contract.option_types import ByteSize, CommonOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class NixlOptions(CommonOptions):
    """Options of the `nixl` backend.

    Attributes:
        window: bytes of staging memory that a rank may use, for the send window, the receive window and the window of
            a rearrangement together. None is 256 MiB on a CPU; on a GPU a thirty-second part of its memory, between
            that and 1 GiB.
        mode: `direct` reads from registered memory without a copy and refuses other tensors; `packed` copies every sent
            tensor into the send window first; `auto` reads large registered tensors directly and packs the rest.
        progress: whether NIXL runs a progress thread. `auto` is off: an executing rank polls anyway, and on few cores
            the thread competes with that (measured two to three times slower on 2 cores).
        verify: compare a checksum computed at the source with one at the destination: of 64 blocks of each message
            (`sample`), or of all bytes (`full`).
        min_gbps: a link slower than this, in GB/s, is an error; 0 means that a slow link only causes a warning.
    """

    window: ByteSize | None = field(
        default=None,
        metadata={"help": "staging memory of a rank, all parts together; none = by device", "min": 64 << 10},
    )
    mode: Literal["auto", "packed", "direct"] = field(
        default="auto", metadata={"help": "read registered tensors in place (direct), copy through a window (packed)"}
    )
    progress: Literal["auto", "on", "off"] = field(
        default="auto", metadata={"help": "NIXL's own progress thread; auto = off, a rank polls while it executes"}
    )
    verify: Literal["off", "sample", "full"] = field(
        default="off", metadata={"help": "compare checksums of source and destination"}
    )
    min_gbps: float = field(default=0.0, metadata={"help": "a link slower than this, in GB/s, is an error", "min": 0})
