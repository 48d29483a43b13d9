"""What ranks of one host append to, in an order that the kernel makes the same for all of them.

A journal is memory without a name (`memfd_create`) that every rank has opened to append. The kernel puts one entry
behind the other, each whole or not at all, whoever is killed or stopped at the same moment: an entry never crosses a
page, and a process is not stopped inside a write to memory. So whoever reads the entries reads the same ones in the
same order, and they are there as long as one rank of the host is. A digest in each says that it is seen as a whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import weakref

import msgspec

from eplb_core.control.board import host_name
from eplb_core.control.plane import ControlPlane

ENTRY_BYTES = 2048
"""The size of an entry, which divides that of a page."""

_HEAD = struct.Struct("<H8s")  # length, digest
CAPACITY = ENTRY_BYTES - _HEAD.size
"""The longest entry, in bytes."""

_BATCH = 64 * ENTRY_BYTES

FILES = 2
"""Journals that ranks take turns with, so that one can be emptied while the other is in use."""

_FLAGS = os.O_RDWR | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)


class Offer(msgspec.Struct, array_like=True, frozen=True):
    """Where the files are; all of it is empty on a machine that cannot have any.

    Attributes:
        host: tells one boot of one machine, and one PID namespace there, from others.
        paths: open the files for any process of that host.
        inodes: their device and inode numbers, so that nothing else is taken for them.
    """

    host: str = ""
    paths: tuple[str, ...] = ()
    inodes: tuple[tuple[int, int], ...] = ()


class JournalFile:
    """One file of entries.

    Args:
        path: opens it.
        inode: device and inode that it must have; None for any.

    Raises:
        OSError: it cannot be opened, or is another file.
    """

    def __init__(self, path: str, inode: tuple[int, int] | None = None) -> None:
        self._file = os.open(path, _FLAGS)
        self._close = weakref.finalize(self, os.close, self._file)
        found = os.fstat(self._file)
        if inode is not None and (found.st_dev, found.st_ino) != inode:
            self._close()
            raise OSError(f"{path} is another file than was offered")

    def append(self, entry: bytes) -> None:
        """Append an entry of `CAPACITY` bytes at most.

        Raises:
            OSError: there is no memory for it.
        """
        if len(entry) > CAPACITY:
            raise ValueError(f"an entry of {len(entry)} bytes does not fit")
        whole = _HEAD.pack(len(entry), _digest(entry)) + entry
        if os.write(self._file, whole.ljust(ENTRY_BYTES, b"\0")) != ENTRY_BYTES:
            raise OSError("an entry was not written whole")

    def read(self, number: int) -> list[bytes]:
        """Return the entries from the one with this number on, as far as they are there."""
        entries: list[bytes] = []
        while True:
            found = os.pread(self._file, _BATCH, (number + len(entries)) * ENTRY_BYTES)
            for begin in range(0, len(found) - ENTRY_BYTES + 1, ENTRY_BYTES):
                length, digest = _HEAD.unpack_from(found, begin)
                first = begin + _HEAD.size
                entry = found[first : first + min(length, CAPACITY)]
                if digest != _digest(entry):
                    return entries
                entries.append(entry)
            if len(found) < _BATCH:
                return entries

    def clear(self) -> None:
        """Remove all entries, once no rank reads or appends any."""
        os.ftruncate(self._file, 0)


def meet_at_journal(control: ControlPlane, timeout_s: float) -> tuple[JournalFile, ...] | None:
    """Return the files that all ranks append to, in turn; None on all ranks if they are not all of one host.

    Args:
        control: a control plane of all ranks, which nothing else uses.
        timeout_s: how long to wait for the slowest rank, in seconds.

    Raises:
        ControlPlaneError: a rank did not answer, or the store is gone.
    """
    own: list[int] = []
    try:
        mine = Offer()
        if control.rank == 0:
            with contextlib.suppress(OSError):
                mine = _offered(own)
        else:
            with contextlib.suppress(OSError):
                mine = Offer(host_name())
        said = control.all_gather("where decisions are written", msgspec.msgpack.encode(mine), timeout_s)
        files: tuple[JournalFile, ...] | None = None
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            offers = [msgspec.msgpack.decode(each, type=Offer) for each in said]
            if mine.host and all(each.host == mine.host for each in offers) and len(offers[0].paths) == FILES:
                files = tuple(map(JournalFile, offers[0].paths, offers[0].inodes))
        can = control.all_gather("who can write decisions", b"y" if files else b"n", timeout_s)
        return files if set(can) == {b"y"} else None
    finally:
        for file in own:
            os.close(file)


def _offered(own: list[int]) -> Offer:
    """Make the files, put their numbers into `own`, and return what others open them by.

    Raises:
        OSError: this machine has no such memory.
    """
    if not hasattr(os, "memfd_create"):
        raise OSError("memory without a name takes Linux")
    own.extend(os.memfd_create("eplb-journal", os.MFD_CLOEXEC) for _ in range(FILES))
    found = [os.fstat(file) for file in own]
    paths = tuple(f"/proc/{os.getpid()}/fd/{file}" for file in own)
    return Offer(host_name(), paths, tuple((each.st_dev, each.st_ino) for each in found))


def _digest(entry: bytes) -> bytes:
    return hashlib.blake2b(entry, digest_size=8).digest()
