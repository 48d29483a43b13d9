"""Messages between ranks of one host, in memory that they share: gathering takes microseconds, and asks no store.

Each rank owns a page that it alone writes, and maps those of the others to read. A page has room for two messages: the
last one that all ranks are known to have been here for, which some may not have read yet, and the one after. So a rank
may write and withdraw one message after the other while others are away, and who comes back still finds what it missed.

The memory has no name in any file system (`memfd_create`), so that nothing is left of it when the ranks are gone,
however they end. Others find it through `/proc`, if they are of the same host, PID namespace and user; if any rank is
not, nobody gets a board.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from eplb_core.control.nameless import NamelessMemory, open_memory

CAPACITY = 16_000
"""The longest message that fits, in bytes."""

_SLOT, _SLOTS = 16 << 10, 2
_HEADS = struct.Struct("<QQ" + _SLOTS * "QQ8s")  # withdrawn + 1, its complement; a slot: number + 1, length, digest
_HEAD = struct.Struct("<QQ8s")
_WITHDRAWN = struct.Struct("<QQ")
_ALL = 2**64 - 1
_FIRST = 64  # where the first slot begins, behind the heads
_PAGE = _FIRST + _SLOT * _SLOTS
_ELSEWHERE = 2**32 - 1  # as a length: the message did not fit, and is at the store
_SPIN_S = 300e-6  # as long as ranks that come together are apart; then others may have the core
_NAP_S, _LONGEST_NAP_S = 50e-6, 1e-3


class Offer(msgspec.Struct, array_like=True, frozen=True):
    """Where a rank's page is. All texts are empty on a machine that cannot have one.

    Attributes:
        host: tells one boot of one machine, and one PID namespace there, from others.
        path: opens the page for any process of that host.
        nonce: what it holds, so that it is not taken for another one's.
    """

    host: str = ""
    path: str = ""
    nonce: bytes = b""


class OwnPage(NamelessMemory):
    """The page that this rank writes.

    Raises:
        OSError: this machine has no such memory.
    """

    def __init__(self) -> None:
        host = host_name()
        super().__init__("eplb-board", _PAGE)
        self.offer = Offer(host, self.path, self.nonce)


class Board:
    """The pages of all ranks.

    A message carries a digest of its number and content: one that is seen half written, on any memory model, is
    not there yet. A rank keeps its message of the last number that all were here for, and overwrites any other: who
    has written a number has no use for messages of earlier ones.

    Args:
        own: this rank's page.
        offers: where the pages of all ranks are, in rank order.
        rank: this rank.

    Raises:
        OSError: a page cannot be opened from here.
    """

    def __init__(self, own: OwnPage, offers: Sequence[Offer], rank: int) -> None:
        self._own = own.memory
        self._free = 0  # where the next message goes
        self._written = 0  # where the last one is
        self._pages: list[mmap.mmap] = []
        for other, offer in enumerate(offers):
            if other == rank:
                self._pages.append(own.memory)
                continue
            if not offer.path or offer.host != own.offer.host:
                raise OSError(f"rank {other} is elsewhere")
            page = open_memory(offer.path, offer.nonce, _PAGE, f"rank {other}", writable=False)
            self._pages.append(page)

    def write(self, number: int, message: bytes | None) -> None:
        """Write this rank's message `number`, over the last one unless that is kept; None says it is at the store."""
        content = message or b""
        if len(content) > CAPACITY:
            raise ValueError(f"a message of {len(content)} bytes does not fit")
        length = _ELSEWHERE if message is None else len(content)
        first = _FIRST + self._free * _SLOT
        self._own[first : first + len(content)] = content
        head = _WITHDRAWN.size + self._free * _HEAD.size
        self._own[head : head + _HEAD.size] = _HEAD.pack(number + 1, length, _digest(number, length, content))
        self._written = self._free

    def keep(self) -> None:
        """Keep what was written last, until the next is to be kept: all ranks were here, and some may yet read it."""
        self._free = 1 - self._written

    def withdraw(self, number: int) -> None:
        """Say that this rank does not wait for message `number` any more, nor for earlier ones."""
        self._own[: _WITHDRAWN.size] = _WITHDRAWN.pack(number + 1, _ALL - number - 1)

    def read(self, rank: int, number: int) -> tuple[bool, bytes | None]:
        """Return whether `rank` has written its message `number`, and the message, None if at the store."""
        page = self._pages[rank]
        heads = _HEADS.unpack_from(page)
        for slot in range(_SLOTS):
            written, length, digest = heads[2 + 3 * slot : 5 + 3 * slot]
            if written != number + 1:
                continue
            first = _FIRST + slot * _SLOT
            content = b"" if length == _ELSEWHERE else page[first : first + min(length, CAPACITY)]
            if digest == _digest(number, length, content):
                return True, None if length == _ELSEWHERE else content
        return False, None

    def contested(self, number: int) -> bool:
        """Return whether some rank has withdrawn message `number`, or gone past it without having written it.

        In doubt it has: what is seen half written counts.
        """
        for page in self._pages:
            withdrawn, complement, first, _, _, second, _, _ = _HEADS.unpack_from(page)
            if withdrawn > number or withdrawn + complement not in (0, _ALL):
                return True
            if (first > number + 1 or second > number + 1) and number + 1 not in (first, second):
                return True
        return False

    def furthest(self) -> tuple[int, int]:
        """Return the highest number that any rank has written, and that any rank has withdrawn; -1 for none."""
        written = withdrawn = 0
        for page in self._pages:
            back, complement, first, _, _, second, _, _ = _HEADS.unpack_from(page)
            written = max(written, first, second)
            if back + complement == _ALL:
                withdrawn = max(withdrawn, back)
        return written - 1, withdrawn - 1

    def wait(
        self, number: int, deadline: float, *, until_contested: bool = False
    ) -> tuple[list[bytes | None], list[int]]:
        """Wait until all ranks have written message `number`, or `time.monotonic()` is `deadline`.

        Args:
            number: of the message.
            deadline: when to end.
            until_contested: end also when some rank has withdrawn it, or gone past it.

        Returns:
            The message of each rank, and the ranks that have written none.
        """
        found: list[bytes | None] = [None] * len(self._pages)
        missing = list(range(len(self._pages)))
        began = time.monotonic()
        while True:
            late = []
            for rank in missing:
                written, found[rank] = self.read(rank, number)
                if not written:
                    late.append(rank)
            missing = late
            now = time.monotonic()
            if not missing or now >= deadline or (until_contested and self.contested(number)):
                return found, missing
            rest(now - began, deadline - now)


def rest(waited_s: float, left_s: float) -> None:
    """Let others have the core, the longer the longer this rank has waited, and no longer than `left_s`."""
    if waited_s < _SPIN_S:
        os.sched_yield()
    else:
        time.sleep(min(_LONGEST_NAP_S, max(_NAP_S, waited_s / 8), max(left_s, 0.0)))


def _digest(number: int, length: int, content: bytes) -> bytes:
    return hashlib.blake2b(
        content, digest_size=8, salt=number.to_bytes(8, "little") + length.to_bytes(8, "little")
    ).digest()


def host_name() -> str:
    """Return what tells one boot of one machine, and one PID namespace there, from others."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    space = os.stat("/proc/self/ns/pid")
    return f"{boot}/{space.st_dev}:{space.st_ino}"
