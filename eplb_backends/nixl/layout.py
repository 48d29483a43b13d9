"""Decides for every queued tensor how it travels: in place, packed, or refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from eplb_backends.nixl.inbox import SCATTER_BYTES, Incoming
from eplb_backends.nixl.memory import Regions
from eplb_backends.nixl.outbox import Outgoing
from eplb_backends.nixl.prepared import Places, Rows
from eplb_core.coalesce import as_bytes
from eplb_core.errors import TransferError
from eplb_core.queues import Transfer

FEW_SMALL = {"DRAM": 0, "VRAM": 128}
"""Up to so many small tensors of a pair are read in place. Packing takes a launch, a wait for it on both sides and two
messages more: where 4 ranks shared an H200, reading every scale in place moved 176 instead of 128 GB/s, and 82 instead
of 53 with small experts."""


def outgoing(
    sends: Sequence[Transfer], registered: Regions, rows: Rows, mode: str, few_small: int = 0
) -> dict[int, Outgoing]:
    """Return destination -> what it is sent.

    Registered tensors are announced by their number, or else by their address. The others are packed, and with
    `mode=auto` so are small ones, if a pair has more than `few_small`: descriptors would cost more than the copy.
    """
    plan: dict[int, Outgoing] = {}
    for peer, transfers in _by_peer(sends):
        addresses, packed = [], []
        small = sum(0 < transfer.nbytes < SCATTER_BYTES for transfer in transfers)
        least = SCATTER_BYTES if small > few_small else 1
        for transfer in transfers:
            if not transfer.nbytes:
                continue
            address = transfer.tensor.data_ptr()
            said = 0
            if mode == "direct" or (mode == "auto" and transfer.nbytes >= least):
                number = rows.number(address, transfer.nbytes)
                if number >= 0:
                    said = ~number
                elif registered.contain(address, transfer.nbytes):
                    said = address
            addresses.append(said)
            if not said:
                packed.append(as_bytes(transfer.tensor))
        plan[peer] = Outgoing(len(transfers), _digest(transfers), np.array(addresses, np.int64), packed)
    return plan


def incoming(recvs: Sequence[Transfer], landing: Regions, places: Places) -> dict[int, Incoming]:
    """Return source -> what it sends. Only declared landing memory is read into directly."""
    plan: dict[int, Incoming] = {}
    for peer, transfers in _by_peer(recvs):
        with_bytes = [transfer for transfer in transfers if transfer.nbytes]
        in_place, numbers = [], []
        for transfer in with_bytes:
            at = transfer.tensor.data_ptr(), transfer.nbytes
            number = places.numbers.get(at)
            in_place.append(number is not None or landing.contain(*at))
            if number is None:
                number = places.add(*at) if in_place[-1] else -1
            numbers.append(number)
        plan[peer] = Incoming(
            len(transfers),
            _digest(transfers),
            [as_bytes(transfer.tensor) for transfer in with_bytes],
            in_place,
            numbers,
        )
    return plan


def unregistered(sends: Sequence[Transfer], registered: Regions) -> TransferError | None:
    """Return the reason why `mode=direct` refuses these sends, or None if it does not."""
    missing = [s for s in sends if s.nbytes and not registered.contain(s.tensor.data_ptr(), s.nbytes)]
    if not missing:
        return None
    return TransferError(
        f"{len(missing)} of {len(sends)} tensors to send are not registered, and mode=direct sends no other",
        peers={transfer.peer for transfer in missing},
        phase="pack",
        usable=True,
        remedy="register(tensors) first, or use mode=auto",
    )


def describe(transfers: Iterable[Transfer]) -> str:
    """Return sizes and dtypes, in words, of the first few."""
    entries = [f"{t.nbytes} bytes of {str(t.tensor.dtype).removeprefix('torch.')}" for t in transfers]
    more = f" and {len(entries) - 8} more" if len(entries) > 8 else ""
    return f"{len(entries)} tensors ({', '.join(entries[:8])}{more})" if entries else "nothing"


def _by_peer(transfers: Sequence[Transfer]) -> list[tuple[int, list[Transfer]]]:
    peers: dict[int, list[Transfer]] = {}
    for transfer in transfers:
        peers.setdefault(transfer.peer, []).append(transfer)
    return sorted(peers.items())


def _digest(transfers: Sequence[Transfer]) -> bytes:
    text = ";".join(f"{transfer.nbytes} {transfer.tensor.dtype}" for transfer in transfers)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
