"""One round of READs between this rank and the peers that it has traffic with. No collective, every wait bounded.

The source says READY with the addresses of its messages; the destination reads them all in one request per source and
says DONE, after which the source may overwrite them. A rank that gives up says FAILED to those that wait for it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from eplb_backends.nixl import messages
from eplb_backends.nixl.agent import Agent, NixlError, Read
from eplb_backends.nixl.messages import Kind, Message
from eplb_core.errors import PeerLostError, TransferError, TransferTimeoutError

_SPINS = 20  # polls in a row before the first nap
_NAP_S = 20e-6
_LONGEST_NAP_S = 500e-6  # while nothing happens a rank leaves the core to those that have work


@dataclass(frozen=True, slots=True)
class Incoming:
    """Where one source's messages go: int64 `[messages]` each, in the order in which they were queued."""

    addresses: np.ndarray
    lengths: np.ndarray


class Mailbox:
    """The notifications of one communicator, sorted by rank; those of a later epoch wait for their turn."""

    def __init__(self, agent: Agent, token: bytes, names: Mapping[int, str]) -> None:
        self.agent = agent
        self.token = token
        self.names = names
        self._ranks = {name: rank for rank, name in names.items()}
        self._early: list[tuple[int, Message]] = []

    def take(self, epoch: int) -> list[tuple[int, Message]]:
        """Return `(rank, message)` of this epoch, in the order in which each rank sent them."""
        arrived = self._early
        for name, raws in self.agent.notifications().items():
            rank = self._ranks.get(name)
            for raw in raws if rank is not None else ():
                message = messages.parse(self.token, raw)
                if message is not None and rank is not None:
                    arrived.append((rank, message))
        self._early = [(rank, message) for rank, message in arrived if message.epoch > epoch]
        return [(rank, message) for rank, message in arrived if message.epoch == epoch]

    def send(self, rank: int, raw: bytes) -> None:
        """Send one notification to a rank."""
        self.agent.notify(self.names[rank], raw)


class Exchange:
    """The state of one round.

    Args:
        mailbox: this communicator's notifications.
        epoch: the number of this round.
        outgoing: destination -> addresses of the messages for it, int64 `[messages]`.
        incoming: source -> where its messages go.
    """

    def __init__(
        self, mailbox: Mailbox, epoch: int, outgoing: Mapping[int, np.ndarray], incoming: Mapping[int, Incoming]
    ) -> None:
        self._mailbox = mailbox
        self._epoch = epoch
        self._outgoing = outgoing
        self._incoming = incoming
        self._announced: dict[int, list[np.ndarray]] = {source: [] for source in incoming}
        self._reading: dict[int, Read] = {}
        self._unread = set(incoming)
        self._unconfirmed = set(outgoing)
        self.descriptors = 0

    def run(self, timeout_s: float) -> None:
        """Return when everything is read on both sides.

        Raises:
            TransferTimeoutError: a peer did not do its part within `timeout_s` seconds.
            PeerLostError: a peer is gone.
            TransferError: a peer gave up, or NIXL failed.
        """
        try:
            self._run(timeout_s)
        except TransferError as error:
            self._tell_peers(error)
            raise

    def _run(self, timeout_s: float) -> None:
        for destination, addresses in self._outgoing.items():
            with self._naming(destination, "ready"):
                for raw in messages.ready(self._mailbox.token, self._epoch, addresses):
                    self._mailbox.send(destination, raw)
        deadline = time.monotonic() + timeout_s
        idle = 0
        while self._unread or self._unconfirmed:
            if self._advance():
                idle = 0
                continue
            if time.monotonic() > deadline:
                raise self._timeout(timeout_s)
            idle += 1
            if idle > _SPINS:
                time.sleep(min(_NAP_S * (idle - _SPINS), _LONGEST_NAP_S))

    def _advance(self) -> bool:
        """Look at every READ and every notification once; return whether anything had happened."""
        happened = False
        for rank, message in self._mailbox.take(self._epoch):
            happened = True
            self._handle(rank, message)
        for source, read in list(self._reading.items()):
            with self._naming(source, "read"):
                if self._mailbox.agent.finished(read):
                    happened = True
                    del self._reading[source]
                    self._unread.discard(source)
                    self._mailbox.send(source, messages.done(self._mailbox.token, self._epoch))
        return happened

    def _handle(self, rank: int, message: Message) -> None:
        if message.kind == Kind.FAILED:
            if rank in self._unread or rank in self._unconfirmed:
                raise TransferError(
                    f"rank {rank} gave up", peers=[rank], phase="read", why=message.payload.decode(errors="replace")
                )
        elif message.kind == Kind.DONE:
            self._unconfirmed.discard(rank)
        elif rank in self._unread and rank not in self._reading:
            parts = self._announced[rank]
            parts.append(message.addresses())
            if sum(map(len, parts)) >= len(self._incoming[rank].lengths):
                self._start_read(rank, np.concatenate(parts))

    def _start_read(self, source: int, remote: np.ndarray) -> None:
        incoming = self._incoming[source]
        if len(remote) != len(incoming.lengths):
            raise TransferError(
                f"rank {source} announced {len(remote)} messages, {len(incoming.lengths)} are expected",
                peers=[source],
                phase="ready",
            )
        pieces = merge(remote, incoming.addresses, incoming.lengths)
        self.descriptors += len(pieces[2])
        with self._naming(source, "read"):
            self._reading[source] = self._mailbox.agent.read(self._mailbox.names[source], *pieces)

    def _timeout(self, timeout_s: float) -> TransferError:
        silent = sorted(source for source in self._unread if source not in self._reading)
        slow = sorted(self._reading)
        unread = sorted(self._unconfirmed)
        parts = [
            f"{_ranks(silent)} did not announce what it sends" if silent else "",
            f"reading from {_ranks(slow)} did not finish" if slow else "",
            f"{_ranks(unread)} did not confirm that it has read" if unread else "",
        ]
        phase = "ready" if silent else "read" if slow else "done"
        return TransferTimeoutError(
            f"no end of the transfer within {timeout_s:g} s",
            peers=sorted({*silent, *slow, *unread}),
            phase=phase,
            why="; ".join(part for part in parts if part),
            remedy="look at the log of that rank; if it was only slow, raise the timeout option",
        )

    @contextlib.contextmanager
    def _naming(self, peer: int, phase: str):  # type: ignore[no-untyped-def]
        """Say in NIXL's errors which rank they are about."""
        try:
            yield
        except NixlError as error:
            kind = PeerLostError if error.disconnected else TransferError
            raise kind(
                f"rank {peer} is gone" if error.disconnected else f"the transfer with rank {peer} failed",
                peers=[peer],
                phase=phase,
                why=str(error),
            ) from error

    def _tell_peers(self, error: TransferError) -> None:
        for peer in {*self._outgoing, *self._incoming}.difference(error.peers):
            with contextlib.suppress(NixlError):
                self._mailbox.send(peer, messages.failed(self._mailbox.token, self._epoch, error.what))


def merge(remote: np.ndarray, local: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join neighbours: pieces that follow one another on both sides become one descriptor.

    Args:
        remote: int64 `[n]`, addresses at the source.
        local: int64 `[n]`, addresses here.
        lengths: int64 `[n]`, bytes, all positive.

    Returns:
        The same three arrays with m <= n entries.
    """
    ends_here = (remote[1:] != remote[:-1] + lengths[:-1]) | (local[1:] != local[:-1] + lengths[:-1])
    starts = np.flatnonzero(np.r_[True, ends_here])
    return remote[starts], local[starts], np.add.reduceat(lengths, starts)


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
