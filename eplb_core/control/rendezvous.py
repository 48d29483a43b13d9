"""How the ranks of a group find one another at a store, each time anew.

A store keeps what earlier attempts have left there, and no rank can tell by itself whether another's entry is from
this attempt or from one that failed. So each says who it is this time and whom it has seen, and goes on only once all
have seen the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import uuid
from collections.abc import Sequence

from torch.distributed import DistError

from eplb_core.control.store_connection import StoreConnection
from eplb_core.control.torch_timeout import torch_timeout
from eplb_core.errors import ControlPlaneError
from eplb_core.words import ranks_text

_NAP_S = 1e-3
_LONGEST_NAP_S = 10e-3
_CHECK_S = 1.0  # the most that asking the store who is missing may take


def meet(connection: StoreConnection, place: str, rank: int, world_size: int, timeout_s: float) -> str:
    """Return a name that is new, and the same on every rank, once every rank is here.

    Each rank leaves one entry of under 100 bytes at the store, which its next attempt overwrites.

    Args:
        connection: to a store that all ranks reach.
        place: where at the store these ranks meet; no others do.
        rank: this process's rank.
        world_size: the number of ranks.
        timeout_s: how long to wait for the slowest rank, in seconds.

    Raises:
        ControlPlaneError: a rank did not come in time (`missing` says which), or the store is gone.
    """
    keys = [f"{place}/{other}" for other in range(world_size)]
    entries: list[bytes] = []
    me = uuid.uuid4().hex.encode()
    seen = b""
    deadline = time.monotonic() + timeout_s
    nap_s = _NAP_S
    store = connection.store
    try:
        with connection.patient():
            store.set(keys[rank], me + b" ")  # type: ignore[arg-type]  # its stub says str
        with connection.patient(waits=True):
            store.wait(keys, torch_timeout(timeout_s))
        while True:
            with connection.patient():
                entries = [bytes(entry) for entry in store.multi_get(keys)]
            present = hashlib.sha256(b" ".join(entry.split(b" ")[0] for entry in entries)).hexdigest()[:32].encode()
            if present != seen:
                seen = present
                with connection.patient():
                    store.set(keys[rank], me + b" " + seen)  # type: ignore[arg-type]
                entries[rank] = me + b" " + seen
            if all(entry.endswith(b" " + seen) for entry in entries):
                return seen.decode()
            if time.monotonic() > deadline:
                break
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, _LONGEST_NAP_S)
    except DistError as error:
        missing = _absent(connection, keys)
        if not missing:
            raise ControlPlaneError(
                "the store that the ranks meet at is gone or does not answer",
                why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            ) from error
    else:
        missing = [other for other, entry in enumerate(entries) if not entry.endswith(b" " + seen)]
    ranks = ranks_text(missing)
    raise ControlPlaneError(
        f"{ranks} did not come within {timeout_s:g} s",
        missing=missing,
        why="dead, stopped, still busy, or not taking part in this call",
        remedy="look at the log of that rank; every rank of the group has to make this call",
    )


def _absent(connection: StoreConnection, keys: Sequence[str]) -> list[int]:
    absent = []
    deadline = time.monotonic() + _CHECK_S
    with contextlib.suppress(DistError), connection.patient(waits=True):
        for rank, key in enumerate(keys):
            if time.monotonic() > deadline:
                break
            if not connection.store.check([key]):
                absent.append(rank)
    return absent
