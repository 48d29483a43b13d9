"""Messages whose bytes every rank can compute by itself: no check compares a transport with itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.testing.check import expect

if TYPE_CHECKING:
    from eplb_core.testing.context import RankContext

POISON = 0xEE
"""The byte that receive buffers are filled with."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Message:
    """One message. Its index is its place among those of the same pair, in the sequence that it stands in."""

    source: int
    destination: int
    nbytes: int
    dtype: torch.dtype = torch.uint8


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A tensor that this rank sends or receives, its peer, and the bytes (uint8 `[bytes]`) that belong in it."""

    tensor: torch.Tensor
    peer: int
    expected: Bytes

    def wrong(self) -> str:
        """Return what is wrong with the tensor's bytes, or nothing."""
        found = bytes_of(self.tensor)
        different = np.flatnonzero(found != self.expected)
        if not len(different):
            return ""
        poisoned = int((found[different] == POISON).sum())
        return (
            f"{len(different)} of {len(found)} bytes of a {self.tensor.dtype} tensor are wrong, the first at "
            f"{different[0]}, the last at {different[-1]}; {poisoned} of them were never written"
        )


class Traffic:
    """What one rank sends and receives in one `execute()`.

    Args:
        context: the rank.
        messages: those of all ranks.
        epoch: another number gives other bytes.
    """

    def __init__(self, context: RankContext, messages: Sequence[Message], epoch: int = 0) -> None:
        self.sends: list[Part] = []
        self.recvs: list[Part] = []
        self._registers = context.subject.must_register
        index: dict[tuple[int, int], int] = {}
        for message in messages:
            pair = (message.source, message.destination)
            index[pair] = index.get(pair, -1) + 1
            if context.rank not in pair:
                continue
            expected = content(*pair, index[pair], epoch, message.nbytes, message.dtype)
            if message.source == context.rank:
                tensor = tensor_of(expected, message.dtype, context.device)
                self.sends.append(Part(tensor, message.destination, expected))
            if message.destination == context.rank:
                poison = np.full(message.nbytes, POISON, np.uint8)
                tensor = tensor_of(poison, message.dtype, context.device)
                self.recvs.append(Part(tensor, message.source, expected))
        # Only the order within a pair counts, so each rank goes through its peers in another one.
        self.recvs.sort(key=lambda part: part.peer, reverse=bool(context.rank % 2))

    def queue(self, communicator: EplbCommunicator) -> None:
        """Queue half of the sends, the receives, and the other half."""
        if self._registers:
            communicator.register([part.tensor for part in self.sends])
            communicator.register([part.tensor for part in self.recvs], landing=True)
        half = len(self.sends) // 2
        for part in self.sends[:half]:
            communicator.add_send(part.tensor, part.peer)
        for part in self.recvs:
            communicator.add_recv(part.tensor, part.peer)
        for part in self.sends[half:]:
            communicator.add_send(part.tensor, part.peer)

    def verify_received(self) -> None:
        """Compare every received byte."""
        for part in self.recvs:
            wrong = part.wrong()
            expect(not wrong, f"from rank {part.peer}: {wrong}")

    def verify_sent(self) -> None:
        """Compare every byte of the tensors that were sent."""
        for part in self.sends:
            wrong = part.wrong()
            expect(not wrong, f"a tensor sent to rank {part.peer} was changed: {wrong}")

    def verify_nothing_arrived(self) -> None:
        """Look for the poison in every byte of the tensors that were to be received."""
        for part in self.recvs:
            touched = int((bytes_of(part.tensor) != POISON).sum())
            expect(not touched, f"{touched} bytes from rank {part.peer} arrived, though nothing was to move")


def exchange(
    context: RankContext, communicator: EplbCommunicator, messages: Sequence[Message], epoch: int = 0
) -> Traffic:
    """Send and receive `messages` in one `execute()`, compare every received byte, and return the traffic."""
    traffic = Traffic(context, messages, epoch)
    traffic.queue(communicator)
    communicator.execute()
    traffic.verify_received()
    return traffic


def content(
    source: int, destination: int, index: int, epoch: int, nbytes: int, dtype: torch.dtype = torch.uint8
) -> Bytes:
    """Return the bytes of a message, uint8 `[nbytes]`: random, and a function of nothing but the arguments."""
    raw = np.random.default_rng([source, destination, index, epoch]).integers(0, 256, nbytes, dtype=np.uint8)
    return (raw & 1).astype(np.uint8) if dtype == torch.bool else raw


def tensor_of(raw: Bytes, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor of `dtype` `[elements]` with these bytes."""
    if not len(raw):
        return torch.empty(0, dtype=dtype, device=device)  # view() refuses to look at nothing as another dtype
    return torch.from_numpy(raw.copy()).to(device).view(dtype)


def bytes_of(tensor: torch.Tensor) -> Bytes:
    """Return a contiguous tensor's bytes, uint8 `[bytes]`."""
    raw: Bytes = tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy()
    return raw


def all_pairs(num_ranks: int) -> list[tuple[int, int]]:
    """Return every pair of different ranks."""
    return [
        (source, destination)
        for source in range(num_ranks)
        for destination in range(num_ranks)
        if source != destination
    ]


def ring(num_ranks: int, nbytes: int, dtype: torch.dtype = torch.uint8, step: int = 1) -> list[Message]:
    """Return one message from every rank to the one `step` further on."""
    return [Message(rank, (rank + step) % num_ranks, nbytes, dtype) for rank in range(num_ranks)]
