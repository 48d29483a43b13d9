"""The location of the tensors of a round: in memory that peers map, or packed into chunks of a window.

Both sides of a pair split packed tensors in the same way, without a message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eplb_core.transport import Payload
from eplb_cuda_ipc.memory import Numbers

_ALIGNMENT = 256  # in a window; fastest for GPUs to copy


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """The tensors of one pair of ranks, in the order queued.

    Attributes:
        address: `[N]`.
        nbytes: `[N]`.
        digest: of sizes and dtypes, to compare.
        dtypes: in words, the dtypes that occur.
    """

    address: Numbers
    nbytes: Numbers
    digest: bytes
    dtypes: str

    @property
    def text(self) -> str:
        """How many, how large, and of which dtypes they are, in words."""
        return f"{len(self.nbytes)} tensors of {int(self.nbytes.sum())} bytes and of {self.dtypes}"


def pieces_of(payloads: Sequence[Payload]) -> Pieces:
    """Return the tensors of one pair."""
    # A rearrangement queues hundreds of small tensors, so any work per tensor counts.
    return Pieces(
        np.array([payload.place[0] for payload in payloads], np.int64),
        np.array([payload.nbytes for payload in payloads], np.int64),
        hashlib.blake2b(b"".join([payload.kind for payload in payloads]), digest_size=16).digest(),
        ", ".join(sorted(map(str, {payload.tensor.dtype for payload in payloads}))),
    )


class Cut:
    """Tensors laid end to end in a byte stream, which is split into chunks.

    Args:
        address: `[N]`, their addresses.
        nbytes: `[N]`.
        chunk_bytes: the size of all chunks except the last.

    Attributes:
        chunks: how many there are.
    """

    def __init__(self, address: Numbers, nbytes: Numbers, chunk_bytes: int) -> None:
        self._address = address
        self._nbytes = nbytes
        self._chunk_bytes = chunk_bytes
        aligned = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self._ends = np.cumsum(aligned)
        self._begins = self._ends - aligned
        self.chunks = -(-int(aligned.sum()) // chunk_bytes)

    def chunk(self, number: int) -> tuple[Numbers, Numbers, Numbers]:
        """Return the pieces of a chunk: the address of each, its offset in the chunk, and its bytes."""
        first, end = number * self._chunk_bytes, (number + 1) * self._chunk_bytes
        low = int(np.searchsorted(self._ends, first, side="right"))
        high = int(np.searchsorted(self._begins, end, side="left"))
        begins = self._begins[low:high]
        within = np.maximum(begins, first)
        nbytes = np.minimum(begins + self._nbytes[low:high], end) - within
        some = nbytes > 0
        return (self._address[low:high] + within - begins)[some], (within - first)[some], nbytes[some]
