"""Where the tensors of a round lie: in memory that peers map, or packed into chunks of a window.

Both sides of a pair cut what is packed alike, and say nothing about it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eplb_core.transport import Payload
from eplb_cuda_ipc.memory import Numbers

_ALIGNMENT = 256  # in a window; what GPUs copy fastest


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """The tensors of one pair of ranks, in the order queued.

    Attributes:
        address: `[N]`.
        nbytes: `[N]`.
        digest: of sizes and dtypes, to compare.
        dtypes: in words, those that there are.
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
    # A rearrangement queues hundreds of small tensors, so that whatever is done for each of them counts.
    return Pieces(
        np.array([payload.place[0] for payload in payloads], np.int64),
        np.array([payload.nbytes for payload in payloads], np.int64),
        hashlib.blake2b(b"".join([payload.kind for payload in payloads]), digest_size=16).digest(),
        ", ".join(sorted({str(payload.tensor.dtype) for payload in payloads})),
    )


class Cut:
    """Tensors that lie one behind the other in a stream of bytes, which is cut into chunks.

    Args:
        address: `[N]`, where they lie.
        nbytes: `[N]`.
        chunk_bytes: the size of all chunks but the last.

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
        """Return the pieces of a chunk: where each lies, its offset in the chunk, and its bytes."""
        first, end = number * self._chunk_bytes, (number + 1) * self._chunk_bytes
        low = int(np.searchsorted(self._ends, first, side="right"))
        high = int(np.searchsorted(self._begins, end, side="left"))
        begins = self._begins[low:high]
        within = np.maximum(begins, first)
        nbytes = np.minimum(begins + self._nbytes[low:high], end) - within
        some = nbytes > 0
        return (self._address[low:high] + within - begins)[some], (within - first)[some], nbytes[some]
