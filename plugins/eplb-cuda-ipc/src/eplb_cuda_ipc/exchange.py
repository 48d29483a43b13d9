"""Drives the rounds in flight: listens to all peers, notices lost ones, and never waits without a deadline."""

from __future__ import annotations

import select
import time
from collections.abc import Collection, Iterator

from eplb_core.errors import PeerLostError, TransferError, TransferMismatchError, TransferTimeoutError
from eplb_core.words import ranks_text
from eplb_cuda_ipc.links import Link
from eplb_cuda_ipc.messages import Bye, GaveUp, Message, OfRound, Show
from eplb_cuda_ipc.round import Round, Shared

_SPIN_S = 300e-6  # a peer in step answers within this time, and sleeping would take longer
_NAP_S = 30e-6  # between two polls of the device, which sends no wake-up
_LONGEST_WAIT_S = 0.5
_NO_MORE = object()

_CLASSES = {each.__name__: each for each in (PeerLostError, TransferMismatchError, TransferTimeoutError)}


class Exchange:
    """The rounds of one communicator.

    Args:
        shared: what all rounds share.
        rank: this rank.
        timeout_s: how long a peer that owes something may do nothing, in seconds.
    """

    def __init__(self, shared: Shared, rank: int, timeout_s: float) -> None:
        self._shared = shared
        self._rank = rank
        self._timeout_s = timeout_s
        self._rounds: dict[int, Round] = {}
        self._early: dict[int, list[tuple[int, OfRound]]] = {}  # for rounds that this rank has not begun
        self._next = 0
        self._gave_up: dict[int, GaveUp] = {}
        self._closed_by: set[int] = set()
        self._broken = False
        self._peers = {link.fileno(): link for link in shared.links.values()}
        self._polled = select.poll()
        self._interests = dict.fromkeys(self._peers, 0)  # what is polled for

    # --- rounds -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise if a known failure would keep a new round from ending.

        Raises:
            TransferError: a peer is gone, or has given up.
        """
        self.listen()
        self._check_lost(self._shared.links)

    def begin(self, round_: Round) -> None:
        """Add a round after all others, and do what can be done at once."""
        self._next = round_.epoch + 1
        self._rounds[round_.epoch] = round_
        for peer, message in self._early.pop(round_.epoch, ()):
            round_.handle(peer, message)
        self._advance()

    def wait(self, round_: Round, work: Iterator[object]) -> None:
        """Wait until the round has ended; `work` advances while copies are in flight and nothing else happens.

        Raises:
            TransferTimeoutError: a peer, or this rank's stream, did nothing for too long.
            PeerLostError: a peer is gone, or gave up because of another one.
            TransferMismatchError: a peer sends something different from what is expected.
            TransferError: a peer violates the protocol.
        """
        idle_since = 0.0
        while not round_.ended:
            if self._advance():
                idle_since = 0.0
                continue
            if round_.copying and next(work, _NO_MORE) is not _NO_MORE:
                continue
            self._check_overdue()
            now = time.monotonic()
            idle_since = idle_since or now
            if now - idle_since > _SPIN_S:
                if any(each.copying or not each.arrived for each in self._rounds.values()):
                    time.sleep(_NAP_S)
                else:
                    self._await_word()

    def _advance(self) -> bool:
        """Do what can be done; return whether there was anything."""
        acted = self._look()
        acted |= self.listen()
        self._check_lost(set().union(*(each.waits_for for each in self._rounds.values())))
        for each in list(self._rounds.values()):
            acted |= each.act()
            if each.ended:
                del self._rounds[each.epoch]
            elif not each.arrived:
                break  # later rounds may be on another stream; they would take the slots that it needs
        return acted

    def _look(self) -> bool:
        seen = [each.look() for each in self._rounds.values()]
        return any(seen)

    def quiesce(self, timeout_s: float) -> bool:
        """Wait for the copies in flight, and never begin others; return whether all are done."""
        self._broken = True
        ends = time.monotonic() + timeout_s
        while any(each.copying for each in self._rounds.values()):
            self._look()
            if time.monotonic() > ends:
                return False
            time.sleep(_NAP_S)
        self._rounds.clear()
        return True

    # --- messages ---------------------------------------------------------------------------------------------------

    def listen(self, patience_ms: float = 0) -> bool:
        """Process the peers' messages; return whether there were any."""
        heard = False
        for handle, _ in self._poll().poll(patience_ms):
            link = self._peers[handle]
            link.flush()
            for message in link.receive():
                heard = True
                self._take(link, message)
        return heard

    def died(self, peer: int, patience_s: float) -> bool:
        """Return whether a peer's process has ended without closing its communicator; another rank may know sooner."""
        ends = time.monotonic() + patience_s
        link = self._shared.links[peer]
        while not link.lost and time.monotonic() < ends:
            self.listen(20)
        return bool(link.lost) and peer not in self._closed_by

    def give_up(self, error: TransferError) -> None:
        """Inform all peers that this rank's transfer has failed, and which rank is to blame."""
        blamed = error.peers[0] if error.peers else self._rank
        for link in self._shared.links.values():
            link.send(GaveUp(blamed, type(error).__name__, error.what[:1000]))

    def part(self, timeout_s: float) -> None:
        """Send `Bye` to all peers, and wait until they have done so too, or are gone."""
        ends = time.monotonic() + timeout_s
        for link in self._shared.links.values():
            link.send(Bye())
        while any(link.interest for link in self._peers.values()) and time.monotonic() < ends:
            self.listen(20)

    def _poll(self) -> select.poll:
        """Return a poll object that reports, in one call, which peers have sent something."""
        for handle, link in self._peers.items():
            interest = link.interest
            if interest == self._interests[handle]:
                continue
            if interest:
                self._polled.register(handle, interest)
            else:
                self._polled.unregister(handle)
            self._interests[handle] = interest
        return self._polled

    def _take(self, link: Link, message: Message) -> None:
        match message:
            case Show():
                self._shared.mapped[link.peer].add(message)
            case GaveUp():
                self._gave_up.setdefault(link.peer, message)
            case Bye():
                link.lost = link.lost or "it has closed its communicator"
                self._closed_by.add(link.peer)
            case _ if self._broken:
                pass
            case _ if message.epoch in self._rounds:
                self._rounds[message.epoch].handle(link.peer, message)
            case _ if message.epoch >= self._next:
                self._early.setdefault(message.epoch, []).append((link.peer, message))
            case _:
                raise TransferError(
                    f"rank {link.peer} violates the protocol",
                    peers=[link.peer],
                    phase="copy",
                    why=f"{type(message).__name__} of round {message.epoch}, which has ended",
                )

    def _await_word(self) -> None:
        """Sleep until a peer sends something, or one of them is overdue."""
        heard = [each.heard[peer] for each in self._rounds.values() for peer in each.waits_for]
        patience_s = min(heard, default=0.0) + self._timeout_s - time.monotonic()
        self._poll().poll(1000 * min(max(patience_s, 0.001), _LONGEST_WAIT_S))

    # --- failure ----------------------------------------------------------------------------------------------------

    def _check_lost(self, needed: Collection[int]) -> None:
        for peer, said in self._gave_up.items():
            if said.rank == self._rank and any(not each.arrived for each in self._rounds.values()):
                raise self._late_stream(said.text)
            blamed = peer if said.rank in (peer, self._rank) else said.rank
            raise _CLASSES.get(said.error, PeerLostError)(
                f"rank {peer} gave up" + (f" because of rank {blamed}" if blamed != peer else ""),
                peers=[blamed],
                phase="copy",
                why=said.text,
            )
        lost = sorted(peer for peer in needed if self._shared.links[peer].lost)
        if lost:
            raise PeerLostError(
                f"{ranks_text(lost)} {'is' if len(lost) == 1 else 'are'} gone",
                peers=lost,
                phase="copy",
                why=self._shared.links[lost[0]].lost,
                remedy="the registered tensors of such a rank can be read with rescue(), until this communicator is "
                "closed",
            )

    def _check_overdue(self) -> None:
        now = time.monotonic()
        for each in self._rounds.values():
            if not each.arrived and each.began + self._timeout_s < now:
                raise self._late_stream()
            silent = sorted(peer for peer in each.waits_for if each.heard[peer] + self._timeout_s < now)
            if each.arrived and silent:
                raise TransferTimeoutError(
                    f"{ranks_text(silent)} did nothing for {self._timeout_s:g} s",
                    peers=silent,
                    phase="copy",
                    why=each.undone(silent[0]),
                    remedy="check the log of that rank; if it was only slow, raise the timeout option",
                )

    def _late_stream(self, why: str | None = None) -> TransferTimeoutError:
        return TransferTimeoutError(
            f"this rank's stream did not reach the transfer within {self._timeout_s:g} s",
            phase="ready",
            why=why,
            remedy="check the work enqueued before; if it is only slow, raise the timeout option",
        )
