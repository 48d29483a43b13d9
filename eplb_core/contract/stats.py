"""Statistics of a transfer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class TransferStats:
    """What one `execute()` did on this rank.

    Attributes:
        seconds: wall time from the call to the return.
        bytes_sent: payload bytes that left this rank.
        bytes_received: payload bytes that reached this rank.
        messages: tensors sent and received.
        phases: phase name -> seconds, in the order in which they ran.
        paths: peer rank -> the transport that its bytes took, if the backend knows it.
        descriptors: memory ranges that a one-sided transport read.
        descriptors_merged: how many remained after adjacent ranges were merged.
    """

    seconds: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    messages: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=dict)
    descriptors: int = 0
    descriptors_merged: int = 0
