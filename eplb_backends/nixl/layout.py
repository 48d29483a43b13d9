"""Decides for every queued tensor whether it is read in place, packed, or refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from eplb_backends.nixl.inbox import SCATTER_BYTES, Incoming
from eplb_backends.nixl.memory import Regions
from eplb_backends.nixl.outbox import Outgoing
from eplb_backends.nixl.prepared import LandingPieces, Rows
from eplb_core.contract.payload import Payload, Payloads
from eplb_core.errors import TransferError
from eplb_core.transport.coalesce import as_bytes

_NONE_IS_AS_LARGE = 1 << 63

FEW_SMALL = {"DRAM": 0, "VRAM": 128}
"""Up to this many small tensors per pair are read in place. Packing costs a launch, a wait for it on both sides and two
more messages: with 4 ranks on one H200, reading every scale in place moved 176 instead of 128 GB/s, and 82 instead of
53 with small experts."""


def outgoing(sends: Payloads, registered: Regions, rows: Rows, mode: str, few_small: int = 0) -> dict[int, Outgoing]:
    """Return destination -> its messages.

    Registered tensors are announced by their number, or else by their address. The others are packed. With `mode=auto`
    so are small ones, if a pair has more than `few_small`: descriptors would cost more than the copy.
    """
    plan: dict[int, Outgoing] = {}
    for peer, payloads in sends.items():
        addresses, packed = [], []
        small = sum(0 < payload.nbytes < SCATTER_BYTES for payload in payloads)
        least = {"direct": 1, "auto": SCATTER_BYTES if small > few_small else 1}.get(mode, _NONE_IS_AS_LARGE)
        for payload in payloads:
            said = 0
            if payload.nbytes >= least:
                number = rows.number(payload.place)
                if number >= 0:
                    said = ~number
                elif registered.contain(*payload.place):
                    said = payload.place[0]
            elif not payload.nbytes:
                continue
            addresses.append(said)
            if not said:
                packed.append(as_bytes(payload.tensor))
        plan[peer] = Outgoing(len(payloads), _digest(payloads), np.array(addresses, np.int64), packed)
    return plan


def incoming(recvs: Payloads, landing: Regions, places: LandingPieces) -> dict[int, Incoming]:
    """Return source -> its messages. Only declared landing memory is read into directly."""
    plan: dict[int, Incoming] = {}
    for peer, payloads in recvs.items():
        with_bytes = [payload for payload in payloads if payload.nbytes]
        in_place, numbers = [], []
        for payload in with_bytes:
            number = places.numbers.get(payload.place)
            lands = number is not None or landing.contain(*payload.place)
            if number is None:
                number = places.add(*payload.place) if lands else -1
            in_place.append(lands)
            numbers.append(number)
        plan[peer] = Incoming(len(payloads), _digest(payloads), with_bytes, in_place, numbers)
    return plan


def unregistered(sends: Payloads, registered: Regions) -> TransferError | None:
    """Return why `mode=direct` refuses these sends, or None if it does not."""
    missing = [peer for peer, each in sends.items() for p in each if p.nbytes and not registered.contain(*p.place)]
    if not missing:
        return None
    total = sum(map(len, sends.values()))
    return TransferError(
        f"{len(missing)} of {total} tensors to send are not registered, but mode=direct sends no others",
        peers=set(missing),
        phase="pack",
        usable=True,
        remedy="register(tensors) first, or use mode=auto",
    )


def describe(payloads: Iterable[Payload]) -> str:
    """Return sizes and dtypes, in words, of the first few."""
    entries = [f"{p.nbytes} bytes of {str(p.tensor.dtype).removeprefix('torch.')}" for p in payloads]
    more = f" and {len(entries) - 8} more" if len(entries) > 8 else ""
    return f"{len(entries)} tensors ({', '.join(entries[:8])}{more})" if entries else "nothing"


def _digest(payloads: Sequence[Payload]) -> bytes:
    return hashlib.blake2b(b"".join([payload.kind for payload in payloads]), digest_size=16).digest()
