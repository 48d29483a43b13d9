"""Moves device tensors through bounded host buffers, in rounds: the k-th part for every peer in the k-th round.

Both ranks of a pair split their data in the same way, so no message about it is needed. Every round waits for its own
parts only, so ranks with more rounds do not block others.
"""

from __future__ import annotations

import torch

from eplb_core.transport import Message, Payloads, as_bytes

Part = list[torch.Tensor]
"""Pieces of tensors, uint8 `[bytes]` each, that travel as one message."""


def cut(payloads: Payloads, part_bytes: int) -> list[dict[int, Part]]:
    """Return the rounds: peer -> its part. Every part of a peer except its last is `part_bytes` long."""
    rounds: list[dict[int, Part]] = []
    for peer, queued in payloads.items():
        filled = 0
        for payload in queued:
            rest = as_bytes(payload.tensor)
            while len(rest):
                number, used = divmod(filled, part_bytes)
                if number == len(rounds):
                    rounds.append({})
                piece = rest[: part_bytes - used]
                rounds[number].setdefault(peer, []).append(piece)
                filled += len(piece)
                rest = rest[len(piece) :]
    return rounds


class HostBuffer:
    """A reused host buffer that grows to the needs of a round, up to a limit.

    Args:
        limit: the most bytes that it may grow to.
        pin: whether it is page-locked.
    """

    def __init__(self, limit: int, pin: bool) -> None:
        self.limit = limit
        self._pin = pin
        self._memory: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        return 0 if self._memory is None else self._memory.numel()

    def part_bytes(self, peers: int) -> int:
        """Return the largest part size of which one per peer fits."""
        return max(self.limit // max(peers, 1), 1)

    def messages(self, parts: dict[int, Part]) -> list[Message]:
        """Return a message for each part of a round; payloads are in this buffer, pieces are views of the tensors."""
        sizes = [sum(map(len, part)) for part in parts.values()]
        if sum(sizes) > self.nbytes:
            self._memory = None  # free first, then allocate: never hold both
            self._memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self._pin)
        if self._memory is None:
            return []
        payloads = torch.split_with_sizes(self._memory[: sum(sizes)], sizes)
        messages = []
        for payload, (peer, part) in zip(payloads, parts.items(), strict=True):
            slots = torch.split_with_sizes(payload, [len(piece) for piece in part])
            messages.append(Message(payload, peer, tuple(zip(slots, part, strict=True))))
        return messages

    def release(self) -> None:
        """Free the memory."""
        self._memory = None
