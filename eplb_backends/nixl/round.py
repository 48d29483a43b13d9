"""One round: all sends and receives of one transfer. Pairwise; several rounds may be in flight.

source                                   destination
READY  where the messages lie    ---->   compares sizes and dtypes
READs what can be read in place
packs a slot, CHUNK              ---->   READs the slot
frees the slot                   <----   TAKEN
may overwrite everything         <----   DONE
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from eplb_backends.nixl.inbox import Inbox, Incoming
from eplb_backends.nixl.memory import SlotPool
from eplb_backends.nixl.messages import Kind, Message, Writer
from eplb_backends.nixl.naming import naming
from eplb_backends.nixl.outbox import Outbox, Outgoing
from eplb_backends.nixl.peers import Peers
from eplb_core.errors import TransferError, TransferMismatchError


@dataclass(frozen=True, slots=True)
class Shared:
    """State shared by all rounds of a communicator.

    Attributes:
        peers: the other ranks.
        send_window: where sent tensors are packed.
        receive_window: where messages are read to that cannot be read in place.
        device: the device of the tensors.
        on_read: called with source, bytes and seconds of every finished READ.
    """

    peers: Peers
    send_window: SlotPool
    receive_window: SlotPool
    device: torch.device
    on_read: Callable[[int, int, float], None]


class Round:
    """The state of one round; `Engine` drives it.

    Args:
        shared: what all rounds share.
        epoch: the number of this round.
        outgoing: destination -> its messages.
        incoming: source -> its messages.
        stream: where copies are enqueued; None means the current stream.
        after: the round begins when this event is done; None begins it at once.
        expects: describes what is expected from a rank, for the error if the announcement differs.
    """

    def __init__(
        self,
        shared: Shared,
        epoch: int,
        outgoing: Mapping[int, Outgoing],
        incoming: Mapping[int, Incoming],
        stream: torch.cuda.Stream | None,
        after: torch.cuda.Event | None,
        expects: Callable[[int], str],
    ) -> None:
        self.epoch = epoch
        self.writer = Writer(shared.peers.token, epoch)
        self._peers = shared.peers
        self._outgoing = outgoing
        self._incoming = incoming
        self._expects = expects
        self._after = after
        self.begun = False
        # Not a method of this round: a reference cycle would keep tensors alive until the next garbage collection.
        send = functools.partial(_send, shared.peers)
        self._outbox = Outbox(outgoing, shared.send_window, self.writer, send, shared.device, stream)
        self._inbox = Inbox(
            incoming,
            shared.receive_window,
            shared.peers,
            self.writer,
            send,
            shared.device,
            stream,
            shared.on_read,
        )
        self.partners = {*outgoing, *incoming}
        self.progress = dict.fromkeys(self.partners, time.monotonic())
        self.created_at = time.monotonic()

    @property
    def waits_for(self) -> set[int]:
        """Return the ranks that this round waits for; none before it has begun."""
        return self._inbox.unread | self._outbox.unconfirmed if self.begun else set()

    @property
    def ended(self) -> bool:
        """Whether everything is read on both sides."""
        return self.begun and not self._inbox.unread and not self._outbox.unconfirmed

    @property
    def fully_packed(self) -> bool:
        """Whether this round needs no more slots of the send window."""
        return self.begun and self._outbox.fully_packed

    @property
    def descriptors(self) -> tuple[int, int]:
        """The number of pieces read, before and after merging neighbours."""
        return self._inbox.descriptors, self._inbox.merged_descriptors

    def advance(self, may_pack: bool) -> bool:
        """Do what can be done now; return whether there was anything.

        Args:
            may_pack: whether it may take slots of the send window. Earlier rounds come first, or two ranks could
                each wait for a slot that the other one's later round holds.
        """
        if not self.begun:
            if self._after is not None and not self._after.query():
                return False
            self.begun = True
            self.progress = dict.fromkeys(self.partners, time.monotonic())
            self._outbox.announce(self._peers.version)
        touched = self._inbox.advance()
        touched |= self._outbox.advance(may_pack)
        self._note(touched)
        return bool(touched)

    def handle(self, rank: int, message: Message) -> None:
        """Take a notification of this round."""
        self._note({rank})
        match message.kind:
            case Kind.DIFFER:
                raise TransferMismatchError(
                    f"rank {rank} expects something different from what it is sent",
                    peers=[rank],
                    phase="agree",
                    why=message.text(),
                )
            case Kind.DONE:
                self._outbox.unconfirmed.discard(rank)
            case Kind.TAKEN if rank in self._outgoing:
                self._outbox.taken(rank, message.taken())
            case Kind.READY | Kind.CHUNK | Kind.SUMS:
                self._receive(rank, message)

    def send(self, rank: int, raw: bytes) -> None:
        """Send a notification to a rank."""
        _send(self._peers, rank, raw)

    def undone(self, rank: int) -> tuple[str, str]:
        """Return the phase in which a rank is late, and what it has not done, in words."""
        incoming = self._incoming.get(rank)
        if incoming is not None and not incoming.announced:
            return "ready", f"rank {rank} did not announce what it sends"
        if rank in self._inbox.reading_from():
            return "read", f"a READ from rank {rank} did not end"
        if rank in self._inbox.unread:
            return "read", f"rank {rank} did not send the rest of its chunks"
        return "done", f"rank {rank} did not confirm that it has read"

    def _receive(self, rank: int, message: Message) -> None:
        """Take a message from a source."""
        incoming = self._incoming.get(rank)
        if incoming is None:
            raise self._refusal(rank, "nothing")
        if message.kind == Kind.SUMS:
            incoming.sums.append(message.sums())
            return
        try:
            if message.kind == Kind.CHUNK:
                self._inbox.chunk(rank, *message.chunk())
                return
            version, count, digest, addresses = message.ready()
            if (count, digest) != (incoming.count, incoming.digest):
                raise self._refusal(rank, self._expects(rank))
            self._peers.know(rank, version)
            self._inbox.announce(rank, addresses)
        except ValueError as error:
            raise TransferError(
                f"rank {rank} broke the protocol", peers=[rank], phase="read", why=str(error)
            ) from error

    def _refusal(self, rank: int, expected: str) -> TransferMismatchError:
        self.send(rank, self.writer.differ(f"it expects {expected}"))
        return TransferMismatchError(
            f"rank {rank} sends something different from what is expected",
            peers=[rank],
            phase="agree",
            why=f"this rank expects {expected}; none of it was read",
        )

    def _note(self, ranks: set[int]) -> None:
        if ranks:
            self.progress.update(dict.fromkeys(ranks & self.partners, time.monotonic()))


def _send(peers: Peers, rank: int, raw: bytes) -> None:
    with naming(rank, "notify"):
        peers.send(rank, raw)
