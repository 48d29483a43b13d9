"""The self-test at start: each rank reads a page and a block from each peer, compares them, and times the block.

It proves the path and its bytes, and it warms up the connections: the first READ from a peer costs 12 to 35 ms. In
large groups a rank only reads a small page of a peer, together with the first bytes that it needs from it.
"""

from __future__ import annotations

import torch

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.errors import IntegrityError
from eplb_core.transport.pattern import pattern

LARGEST_WORLD = 16
"""In larger groups links are opened on first use: no rank waits for peers that it never contacts."""

PAGE_BYTES = 1024
"""Size of the page that every rank offers; it fits into the smallest slot."""

_PAGE = 4096
_BLOCK = 8 << 20  # enough to judge a link; reading and comparing a whole window took most of a communicator's start
_TIMES = 2  # further reads of a block for timing; a link is judged by the fastest
_POISON = 0xEE


def read_from_every_peer(
    communicator: EplbCommunicator, source: torch.Tensor, landing: torch.Tensor, rank: int, world_size: int
) -> None:
    """Exchange pages, then blocks, with one peer after another; compare every byte, then read blocks for timing.

    Args:
        communicator: reads in place from `source` to `landing`.
        source: uint8 `[bytes]`, overwritten; the same size on every rank.
        landing: uint8 `[bytes]`, of the same size, overwritten.
        rank: this rank.
        world_size: the number of ranks.

    Raises:
        IntegrityError: wrong bytes arrived; it names the rank.
        TransferError: a transfer failed.
    """
    block = min(_BLOCK, len(source))
    source[:block].copy_(pattern(block, source.device, rank))
    peers = [((rank + distance) % world_size, (rank - distance) % world_size) for distance in range(1, world_size)]
    for nbytes in (min(_PAGE, block), block):
        for to, peer in peers:
            landing[:nbytes].fill_(_POISON)
            _read(communicator, source[:nbytes], to, landing[:nbytes], peer)
            if not torch.equal(landing[:nbytes], pattern(nbytes, landing.device, peer)):
                raise wrong_bytes(peer, "self-test")
    for _ in range(_TIMES):
        for to, peer in peers:
            _read(communicator, source[:block], to, landing[:block], peer)


def _read(communicator: EplbCommunicator, source: torch.Tensor, to: int, landing: torch.Tensor, peer: int) -> None:
    communicator.add_send(source, to)
    communicator.add_recv(landing, peer)
    communicator.execute()


def check_page(page: torch.Tensor, peer: int) -> None:
    """Raise `IntegrityError` unless `page`, uint8 `[PAGE_BYTES]`, is the page that a rank offers."""
    if not torch.equal(page, pattern(PAGE_BYTES, page.device, peer)):
        raise wrong_bytes(peer, "probe")


def wrong_bytes(peer: int, phase: str) -> IntegrityError:
    """Return the error for wrong bytes in a self-test."""
    return IntegrityError(
        f"the first bytes read from rank {peer} are wrong",
        peers=[peer],
        phase=phase,
        remedy="memory that was allocated with expandable_segments is known to do this",
    )
