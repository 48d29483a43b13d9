"""The host and namespaces of a process, which decide whether it can share memory with another process."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """The location of one process. Containers of one host share the kernel and have separate namespaces.

    Attributes:
        name: the host's name, for people: containers have different names, and hosts may share one.
        boot: an identifier of the host's kernel since it was booted; empty if unknown.
        pid_namespace: of its process ids; 0 if unknown.
        net_namespace: of its sockets; 0 if unknown.
    """

    name: str
    boot: str
    pid_namespace: int
    net_namespace: int

    @classmethod
    def here(cls) -> HostIdentity:
        """Return the location of this process."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        except OSError:
            boot = ""
        return cls(socket.gethostname(), boot, _namespace("pid"), _namespace("net"))

    @property
    def loopback(self) -> bytes:
        """An identity shared by processes that can reach one another over sockets of the host, 24 bytes."""
        return bytes.fromhex(self.boot.replace("-", "")).ljust(16, b"\0") + self.net_namespace.to_bytes(8, "little")


def _namespace(kind: str) -> int:
    try:
        return os.stat(f"/proc/self/ns/{kind}").st_ino
    except OSError:
        return 0
