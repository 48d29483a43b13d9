"""Puts the rank that it is about into every error of NIXL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from eplb_backends.nixl.agent import NixlError
from eplb_core.errors import PeerLostError, TransferError


@contextlib.contextmanager
def naming(rank: int, phase: str) -> Iterator[None]:
    """Turn a `NixlError` into the transfer error that names the rank and the phase."""
    try:
        yield
    except NixlError as error:
        kind = PeerLostError if error.disconnected else TransferError
        what = f"rank {rank} is gone" if error.disconnected else f"the transfer with rank {rank} failed"
        raise kind(what, peers=[rank], phase=phase, why=str(error)) from error


def ranks_text(ranks: Iterable[int]) -> str:
    """Return `rank 3` or `ranks 1, 3`."""
    numbers = sorted(ranks)
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))
