"""What every rank does once at start: read a page and then a block from each peer, compare them, and time the block.

It proves the path and its bytes, and it warms the connections: the first READ from a peer costs 12 to 35 ms. In large
groups a rank reads one small page of a peer instead, together with the first bytes that it wants from it.
"""

from __future__ import annotations

import torch

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.errors import IntegrityError
from eplb_core.transport.pattern import pattern

LARGEST_WORLD = 16
"""In larger groups links are opened when they are first used: nobody waits for peers that it never talks to."""

PAGE_BYTES = 1024
"""Of the page that every rank offers to be read; it fits into the smallest slot."""

_PAGE = 4096
_BLOCK = 8 << 20  # enough to judge a link by; reading and comparing a whole window took most of a communicator's start
_TIMES = 2  # that a block is read again only for its time; a link is judged by the fastest
_POISON = 0xEE


def read_from_every_peer(
    communicator: EplbCommunicator, source: torch.Tensor, landing: torch.Tensor, rank: int, world_size: int
) -> None:
    """Exchange pages, then blocks, with one peer after the other; compare every byte, then read blocks for their time.

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
    """Raise `IntegrityError` unless `page`, uint8 `[PAGE_BYTES]`, is what a rank offers to be read."""
    if not torch.equal(page, pattern(PAGE_BYTES, page.device, peer)):
        raise wrong_bytes(peer, "probe")


def wrong_bytes(peer: int, phase: str) -> IntegrityError:
    """Return the error for bytes of a probe that came wrong."""
    return IntegrityError(
        f"the first bytes that were read from rank {peer} are wrong",
        peers=[peer],
        phase=phase,
        remedy="memory that was allocated with expandable_segments is known to do this",
    )
