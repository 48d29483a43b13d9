"""The link to each peer: the location of both ends, the expected path, and the measured rate.

UCX falls back to tcp silently, up to 2000 times slower. So the locations of two ranks are compared with the measured
rate, and a fault is reported once, with its remedy.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import msgspec

from eplb_core.errors import TransferError
from eplb_core.transport import HostIdentity

logger = logging.getLogger(__name__)

_FLOOR_GBPS = {"DRAM": 0.05, "VRAM": 5.0}
"""The lowest rate expected between two ranks of one host, in GB/s. For DRAM, tcp can be as fast as shared memory on a
busy machine, so there the locations of the ranks decide."""

_SAMPLES = 3
"""READs after which a link is judged, by the fastest of them: the machine may be busy during the first ones."""

_TELLING_BYTES = 1 << 20
"""Smaller READs say nothing about the rate."""

_LOCAL_TRANSPORTS = (
    "all",
    "cma",
    "sm",
    "shm",
    "posix",
    "sysv",
    "knem",
    "xpmem",
    "cuda_ipc",
    "cuda",
    "rocm_ipc",
    "rocm",
)


class Place(msgspec.Struct, array_like=True, frozen=True):
    """The location of a rank.

    Attributes:
        host: its name, for people.
        boot: identifies the running kernel.
        pid_namespace: identifies the container; ranks in different ones cannot read each other's memory.
        transports: the value of `UCX_TLS` there.
    """

    host: str
    boot: str
    pid_namespace: str
    transports: str

    @classmethod
    def here(cls) -> Place:
        """Return the location of this process."""
        here = HostIdentity.here()
        namespace = f"pid:[{here.pid_namespace}]" if here.pid_namespace else ""
        return cls(here.name, here.boot, namespace, os.environ.get("UCX_TLS", ""))


@dataclass(slots=True)
class Link:
    """One peer, seen from here.

    Attributes:
        kind: the expected path: `same host, shared memory`, `same host, CUDA IPC` or `network to HOST`.
        obstacle: why the fast path cannot work, and the remedy, or an empty text.
        gbps: measured rate in GB/s (1e9 bytes), or None before the first large transfer.
    """

    kind: str
    obstacle: str
    gbps: float | None = None

    def __str__(self) -> str:
        """Return kind and rate."""
        rate = "not measured yet" if self.gbps is None else f"{self.gbps:.2f} GB/s"
        return f"UCX, {self.kind}, {rate}"


def link_between(here: Place, there: Place, memory: str) -> Link:
    """Return the link from `there` to `here`; `memory` is `DRAM` or `VRAM`."""
    if here.boot != there.boot or not here.boot:
        return Link(f"network to {there.host}", "")
    kind = "same host, shared memory" if memory == "DRAM" else "same host, CUDA IPC"
    for place in (here, there):
        chosen = place.transports.lstrip("^")
        if chosen and not place.transports.startswith("^") and not _names_local(chosen):
            return Link(f"same host, over {chosen}", f"UCX_TLS={place.transports} allows only the network; unset it")
    if memory == "DRAM" and here.pid_namespace != there.pid_namespace:
        return Link("same host, other container", "the ranks are in different PID namespaces; start them in one")
    return Link(kind, "")


class Links:
    """The links of one rank.

    Args:
        memory: `DRAM` or `VRAM`.
        min_gbps: below this rate a link is an error; 0 for none.
    """

    def __init__(self, memory: str, min_gbps: float) -> None:
        self._memory = memory
        self._min_gbps = min_gbps
        self._here = Place.here()
        self._links: dict[int, Link] = {}
        self._reads: dict[int, int] = {}

    @property
    def boot(self) -> str:
        """The identifier of the running kernel of this rank's host."""
        return self._here.boot

    def add(self, rank: int, place: Place) -> None:
        """Record the location of a rank."""
        self._links[rank] = link_between(self._here, place, self._memory)

    def describe(self, rank: int) -> str:
        """Return a line on a rank's link."""
        return str(self._links.get(rank, "UCX"))

    def measured(self, rank: int, nbytes: int, seconds: float) -> None:
        """Record the rate of a READ from a rank, and warn once if it is too slow.

        Raises:
            TransferError: it is slower than `min_gbps`.
        """
        link = self._links.get(rank)
        if link is None or nbytes < _TELLING_BYTES:
            return  # it measures latency
        reads = self._reads[rank] = self._reads.get(rank, 0) + 1
        rate = nbytes / seconds / 1e9
        link.gbps = rate = max(rate, link.gbps or 0.0)
        if reads != _SAMPLES:
            return
        if rate < self._min_gbps:
            raise TransferError(
                f"the link from rank {rank} gives {rate:.2f} GB/s, less than min_gbps={self._min_gbps:g}",
                peers=[rank],
                phase="probe",
                where=link.kind,
                why=link.obstacle or self._suspicion(),
            )
        slow = link.kind.startswith("same host") and rate < _FLOOR_GBPS[self._memory]
        if slow or link.obstacle:
            logger.warning(
                "the link from rank %d (%s) gives %.2f GB/s: %s",
                rank,
                link.kind,
                rate,
                link.obstacle or self._suspicion(),
            )

    def _suspicion(self) -> str:
        if self._memory == "VRAM":
            return (
                "UCX probably goes over tcp; set UCX_CUDA_IPC_ENABLE_GET_ZCOPY=on before the process starts, "
                "and do not allocate the weights with expandable_segments"
            )
        return "UCX probably goes over tcp, or the machine is busy; see UCX_LOG_LEVEL=info"


def _names_local(transports: str) -> bool:
    return any(name.strip() in _LOCAL_TRANSPORTS for name in transports.split(","))
