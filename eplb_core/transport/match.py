"""Compares the queues of both sides of every pair of ranks, before a byte moves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import msgspec

from eplb_core.contract.payload import Payload, Payloads
from eplb_core.control.agreement import all_say, failed_ranks
from eplb_core.control.plane import ControlPlane
from eplb_core.control.wire import UNREADABLE
from eplb_core.errors import ControlPlaneError, TransferError, TransferMismatchError
from eplb_core.transport.failure import as_transfer_error

_SUM_BYTES = 16


class _Queued(msgspec.Struct, array_like=True):
    """A rank's queue, as sent to its peers: peer rank -> `(bytes, dtype)` of each tensor in order."""

    sends: dict[int, list[tuple[int, str]]]
    recvs: dict[int, list[tuple[int, str]]]


def check_match(
    control: ControlPlane,
    sends: Payloads,
    recvs: Payloads,
    timeout_s: float,
    problem: TransferError | None = None,
    note: bytes = b"",
) -> list[bytes]:
    """Compare this rank's queue with that of every peer, before a byte moves.

    Each send adds a hash of (source, destination, index, bytes, dtype) to its rank's sum, and each receive subtracts
    the hash of the send that it expects. So the sums of all ranks add up to zero exactly if everything matches, except
    with probability 2^-128. Only if they do not, the ranks exchange what they queued.

    Args:
        control: the group's control plane.
        sends: destination -> what this rank sends there, in order.
        recvs: source -> what this rank receives from there, in order.
        timeout_s: the longest wait for the slowest rank, in seconds.
        problem: an error of this rank. It is raised here, and makes every other rank raise a `TransferMismatchError`
            with its text, so that none of them waits for this one.
        note: a few bytes from the backend for every other rank, sent with the message.

    Returns:
        The note of every rank, in rank order.

    Raises:
        TransferMismatchError: on every rank, naming the ranks, the index and the sizes.
        TransferTimeoutError: a rank did not call `execute()` in time.
    """
    rank = control.rank
    total = 0
    if problem is None:
        total += sum(number for peer, payloads in sends.items() for number in _hashes(rank, peer, payloads))
        total -= sum(number for peer, payloads in recvs.items() for number in _hashes(peer, rank, payloads))
    said = b"" if problem else (total % 2**128).to_bytes(_SUM_BYTES, "big") + note
    try:
        answers = all_say(control, "what each rank queued", timeout_s, value=said, problem=problem)
        refused = failed_ranks(answers)
        sums = [answer.value for answer in answers]
        if not refused:
            if sum(int.from_bytes(value[:_SUM_BYTES], "big") for value in sums) % 2**128 == 0:
                return [value[_SUM_BYTES:] for value in sums]
            mine = msgspec.msgpack.encode(_Queued(_entries(sends), _entries(recvs)))
            details = control.all_gather("the details of transfers that do not match", mine, timeout_s)
    except ControlPlaneError as error:
        raise as_transfer_error(error, "agree") from error
    if problem is not None:
        raise problem
    if refused:
        raise TransferMismatchError(
            f"rank {refused[0]} refused its transfers: {answers[refused[0]].problem}",
            peers=refused,
            phase="agree",
            usable=True,
        )
    try:
        queued = [msgspec.msgpack.decode(value, type=_Queued) for value in details]
    except UNREADABLE as error:
        raise TransferMismatchError(
            "the ranks queued transfers that do not match",
            phase="agree",
            why=f"what a rank queued cannot be read: {error}",
            remedy="install the same eplb on every rank",
        ) from error
    raise _first_difference(queued)


def _hashes(source: int, destination: int, payloads: Sequence[Payload]) -> Iterator[int]:
    for index, payload in enumerate(payloads):
        text = b"%d %d %d %s" % (source, destination, index, payload.kind)
        yield int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "big")


def _entries(payloads: Payloads) -> dict[int, list[tuple[int, str]]]:
    return {peer: [(each.nbytes, str(each.tensor.dtype)) for each in queued] for peer, queued in payloads.items()}


def _first_difference(queued: Sequence[_Queued]) -> TransferMismatchError:
    for source in range(len(queued)):
        for destination in range(len(queued)):
            sent = queued[source].sends.get(destination, [])
            expected = queued[destination].recvs.get(source, [])
            if sent == expected:
                continue
            pair = f"rank {source} to rank {destination}"
            what = f"{pair}: {len(sent)} tensors are sent, {len(expected)} are expected"
            if len(sent) == len(expected):
                at = next(i for i, (ours, theirs) in enumerate(zip(sent, expected, strict=True)) if ours != theirs)
                what = f"{pair}, transfer {at}: {_describe(sent[at])} is sent, {_describe(expected[at])} is expected"
            return TransferMismatchError(
                what, peers=(source, destination), phase="agree", usable=True, why="no byte was moved"
            )
    return TransferMismatchError("the ranks queued transfers that do not match", phase="agree", usable=True)


def _describe(entry: tuple[int, str]) -> str:
    return f"{entry[0]} bytes of {entry[1]}"
