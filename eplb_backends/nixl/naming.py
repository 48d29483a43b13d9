"""Adds the rank concerned to every error of NIXL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
