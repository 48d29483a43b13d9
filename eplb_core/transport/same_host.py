"""Which host a process runs on, and in which namespaces: what decides whether it can share memory with another one."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """Where one process is. Containers of one host have the same kernel and namespaces of their own.

    Attributes:
        name: the host's name, for people: containers have others, and hosts may have the same.
        boot: an identifier of the host's kernel since it was booted; empty if the system does not tell.
        pid_namespace: of its process ids; 0 if the system does not tell.
        net_namespace: of its sockets; 0 if the system does not tell.
    """

    name: str
    boot: str
    pid_namespace: int
    net_namespace: int

    @classmethod
    def here(cls) -> HostIdentity:
        """Return that of this process."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        except OSError:
            boot = ""
        return cls(socket.gethostname(), boot, _namespace("pid"), _namespace("net"))

    @property
    def loopback(self) -> bytes:
        """What is the same for processes that reach one another over sockets of the host, 24 bytes."""
        return bytes.fromhex(self.boot.replace("-", "")).ljust(16, b"\0") + self.net_namespace.to_bytes(8, "little")


def _namespace(kind: str) -> int:
    try:
        return os.stat(f"/proc/self/ns/{kind}").st_ino
    except OSError:
        return 0
