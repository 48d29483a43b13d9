"""Memory that processes of one host share, and that has no name in any file system (`memfd_create`).

Nothing is left of it when the last process that has mapped it is gone, however that ends. Others find it through
`/proc`, if they are of the same host, PID namespace and user.
"""

from __future__ import annotations

import mmap
import os
import secrets

_NONCE_BYTES = 16


class NamelessMemory:
    """Memory that this process makes, and where others find it.

    Args:
        name: what the kernel calls it where it lists mappings.
        nbytes: how many bytes it has.
        reserve: whether all of it is allocated now, so that too little is an error here and not a signal later.

    Attributes:
        memory: all of it, and a nonce behind.
        path: opens it for any process of the same host.
        nonce: what stands behind its last byte, so that it is not taken for another one.

    Raises:
        OSError: this machine has no such memory, or not as much.
    """

    def __init__(self, name: str, nbytes: int, *, reserve: bool = False) -> None:
        if not hasattr(os, "memfd_create"):
            raise OSError("memory without a name takes Linux")
        self._file = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._file, nbytes + _NONCE_BYTES)
            if reserve:
                os.posix_fallocate(self._file, 0, nbytes + _NONCE_BYTES)
            self.memory = mmap.mmap(self._file, nbytes + _NONCE_BYTES)
            self.nonce = secrets.token_bytes(_NONCE_BYTES)
            self.memory[-_NONCE_BYTES:] = self.nonce
            self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        except BaseException:
            self.close_file()
            raise

    def close_file(self) -> None:
        """Let nobody find it any more; who has mapped it keeps it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def open_memory(path: str, nonce: bytes, nbytes: int, owner: str, *, writable: bool) -> mmap.mmap:
    """Return memory that another process, `owner`, has made, mapped.

    Raises:
        OSError: it cannot be opened from here, has another size, or is another one.
    """
    file = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        if os.fstat(file).st_size != nbytes + _NONCE_BYTES:
            raise OSError(f"the page of {owner} has another size")
        memory = mmap.mmap(file, nbytes + _NONCE_BYTES, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
    finally:
        os.close(file)
    if memory[-_NONCE_BYTES:] != nonce:
        raise OSError(f"what {owner} offers is another page")
    return memory
