"""What every rank does once at start: read a page and then a block from each peer, compare them, and time the block.

It proves the path and its bytes, and it warms the connections: the first READ from a peer costs 12 to 35 ms.
"""

from __future__ import annotations

import torch

from eplb_core.communicator import EplbCommunicator
from eplb_core.errors import IntegrityError

LARGEST_WORLD = 16
"""In larger groups links are opened when they are first used: nobody waits for peers that it never talks to."""

_PAGE = 4096
_TIMES = 3  # a link is judged by the fastest of these
_POISON = 0xEE


def read_from_every_peer(
    communicator: EplbCommunicator, source: torch.Tensor, landing: torch.Tensor, rank: int, world_size: int
) -> None:
    """Exchange pages, then blocks, with one peer after the other, and compare every byte.

    Args:
        communicator: reads in place from `source` to `landing`.
        source: uint8 `[bytes]`, overwritten; the same size on every rank.
        landing: uint8 `[bytes]`, of the same size, overwritten.
        rank: this rank.
        world_size: the number of ranks.

    Raises:
        IntegrityError: bytes came wrong; it names the rank.
        TransferError: a transfer failed.
    """
    source.copy_(_pattern(rank, len(source), source.device))
    for nbytes in (min(_PAGE, len(source)), *[len(source)] * _TIMES):
        for distance in range(1, world_size):
            to, peer = (rank + distance) % world_size, (rank - distance) % world_size
            landing.fill_(_POISON)
            communicator.add_send(source[:nbytes], to)
            communicator.add_recv(landing[:nbytes], peer)
            communicator.execute()
            if not torch.equal(landing[:nbytes], _pattern(peer, len(landing), landing.device)[:nbytes]):
                raise IntegrityError(
                    f"bytes that were read from rank {peer} at start are wrong",
                    peers=[peer],
                    phase="self-test",
                    remedy="memory that was allocated with expandable_segments is known to do this",
                )


def _pattern(rank: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """Return a rank's block; every rank computes all of them, so that nothing is compared with itself."""
    words = torch.arange(nbytes // 4, dtype=torch.int32, device=device)
    return words.mul_(2 * rank + 0x9E3779B1 - (1 << 32)).add_(rank).view(torch.uint8)
