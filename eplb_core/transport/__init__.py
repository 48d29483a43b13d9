"""The public toolkit for authors of backends: a communicator to derive from, and helpers that move bytes."""

from __future__ import annotations

from eplb_core.contract.payload import Payload, Payloads
from eplb_core.transport.checksums import checksums
from eplb_core.transport.coalesce import Message, as_bytes, coalesce
from eplb_core.transport.copies import copy_all
from eplb_core.transport.deadline import call_within, wait_until
from eplb_core.transport.failure import as_transfer_error
from eplb_core.transport.match import check_match
from eplb_core.transport.process_group import exchange
from eplb_core.transport.queue import TransferQueue
from eplb_core.transport.queued import QueuedCommunicator, in_order, nbytes_of
from eplb_core.transport.same_host import HostIdentity
from eplb_core.transport.streams import mark, on_stream, ordinal_of, synchronize

__all__ = [
    "HostIdentity",
    "Message",
    "Payload",
    "Payloads",
    "QueuedCommunicator",
    "TransferQueue",
    "as_bytes",
    "as_transfer_error",
    "call_within",
    "check_match",
    "checksums",
    "coalesce",
    "copy_all",
    "exchange",
    "in_order",
    "mark",
    "nbytes_of",
    "on_stream",
    "ordinal_of",
    "synchronize",
    "wait_until",
]
