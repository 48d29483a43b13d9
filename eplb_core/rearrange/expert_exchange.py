"""Whole experts from rank to rank as one message each, through staging memory, in rounds that all ranks cut alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.transport.streams import on_stream


@dataclass(frozen=True, slots=True)
class Passage:
    """One expert that goes from one rank to another.

    Attributes:
        source: the rank that has it.
        destination: the rank that gets it.
        layer: which layer.
        expert: which expert.
        slot: where it goes: a slot counted over all ranks, or -1 where that is the receiver's own affair.
        nbytes: bytes of all its tensors.
    """

    source: int
    destination: int
    layer: int
    expert: int
    slot: int
    nbytes: int


def exchange_experts(
    communicator: EplbCommunicator,
    passages: Sequence[Passage],
    rank: int,
    limit_bytes: int,
    read: Callable[[Passage, torch.Tensor], object],
    write: Callable[[Passage, torch.Tensor], object],
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Send experts and receive them. Every rank calls this with the same passages and limit.

    Args:
        communicator: between the ranks.
        passages: what goes where; no rank to itself.
        rank: this rank.
        limit_bytes: the most that a rank sends, or receives, in one round; more only where one expert is larger.
        read: puts an expert's bytes, one tensor behind the other, into uint8 `[bytes]`.
        write: takes them from there.
        stream: where copies go on a GPU.

    Raises:
        TransferError: a round failed. What was not written yet has not arrived.
    """
    device = communicator.binding.context.device
    mine = [each for each in passages if rank in (each.source, each.destination)]
    room = max((each.nbytes for each in mine), default=0)
    room = max(room, min(limit_bytes, sum(each.nbytes for each in mine)))
    with torch.inference_mode(False):  # what is made under an engine's inference mode, nobody can write to outside
        staging = torch.empty(2 * room, dtype=torch.uint8, device=device)
    for members in rounds(passages, limit_bytes):
        arrivals: list[tuple[Passage, torch.Tensor]] = []
        sent, received = 0, room
        with on_stream(device, stream):
            for each in members:
                if each.source == rank:
                    part = staging[sent : sent + each.nbytes]
                    sent += each.nbytes
                    read(each, part)
                    communicator.add_send(part, each.destination)
                elif each.destination == rank:
                    part = staging[received : received + each.nbytes]
                    received += each.nbytes
                    communicator.add_recv(part, each.source)
                    arrivals.append((each, part))
        communicator.execute()
        with on_stream(device, stream):
            for each, part in arrivals:
                write(each, part)


def rounds(passages: Sequence[Passage], limit_bytes: int) -> Iterator[list[Passage]]:
    """Yield the passages in order, as many at a time as stay within the limit on every rank, at least one."""
    members: list[Passage] = []
    sent: dict[int, int] = {}
    received: dict[int, int] = {}
    for each in passages:
        out = sent.get(each.source, 0) + each.nbytes
        into = received.get(each.destination, 0) + each.nbytes
        if members and max(out, into) > limit_bytes:
            yield members
            members, sent, received = [], {}, {}
            out = into = each.nbytes
        members.append(each)
        sent[each.source], received[each.destination] = out, into
    if members:
        yield members
