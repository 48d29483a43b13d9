"""The NIXL agents of the other ranks: looked up on first use, and again when they have registered more memory.

Each rank publishes its identity in the control plane's store under a version number. A rank contacts only ranks that
it exchanges experts with.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from typing import Annotated

import msgspec

from eplb_backends.nixl import messages
from eplb_backends.nixl.agent import Agent, NixlError, Numbered
from eplb_backends.nixl.links import Links, Place
from eplb_backends.nixl.messages import Kind, Message, Writer
from eplb_backends.nixl.prepared import Block, LandingPieces, PeerRows, Rows
from eplb_core.arrays import IntArray
from eplb_core.control.plane import ControlPlane
from eplb_core.errors import ControlPlaneError, TransferError, TransferTimeoutError

_PARTING_S = 1.0  # how long a closing rank waits for the others to close too
_NAP_S = 1e-3
_HIGHEST_DEVICE_NUMBER = 1 << 16


class Identity(msgspec.Struct, array_like=True, frozen=True):
    """The description of an agent that a rank publishes.

    Attributes:
        name: the agent's name, unique for every incarnation.
        metadata: NIXL's serialised metadata: how to connect, and which memory is registered.
        digest: SHA-256 of the metadata.
        memory: the kind of memory it moves: `DRAM` or `VRAM`.
        device_number: of the device that holds it, as numbered in the rank's process.
        starts: start addresses of its registered memory regions.
        place: where the rank runs.
        page: address of a page with known bytes, to be read before anything else.
        rows: the numbered pieces of the memory.
    """

    name: str
    metadata: bytes
    digest: bytes
    memory: str
    device_number: Annotated[int, msgspec.Meta(ge=0, le=_HIGHEST_DEVICE_NUMBER)]
    starts: list[int]
    place: Place
    page: int
    rows: list[Block]


class Peers:
    """The known agents of all ranks, and the notifications between them.

    Args:
        agent: this rank's.
        control: where identities are published.
        links: receives the location of each peer.
        timeout_s: how long a peer may take to publish its identity, in seconds.
        page: address of this rank's page with known bytes.

    Attributes:
        own_rows: rows of this rank that others may read by number.
        places: pieces that this rank reads into by number.
        lost: ranks that no rank should wait for any more.
        proven: ranks from which correct bytes were read.
    """

    def __init__(self, agent: Agent, control: ControlPlane, links: Links, timeout_s: float, page: int) -> None:
        self.agent = agent
        self.rank = control.rank
        self._links = links
        self.version = 0
        self.token = b""
        self._control = control
        self._timeout_s = timeout_s
        self._identities: dict[int, Identity] = {}
        self._versions: dict[int, int] = {}
        self._ranks: dict[str, int] = {}
        self._left: set[int] = set()
        self._page = page
        self._rows: dict[int, PeerRows] = {}
        self.own_rows = Rows()
        self.places = LandingPieces()
        self.lost: set[int] = set()
        self.proven: set[int] = set()

    def meet(self, names: list[str]) -> None:
        """Record all agents' names, in rank order; they form the token of this communicator's messages."""
        self.token = hashlib.blake2b("\n".join(names).encode(), digest_size=8).digest()
        self._ranks = {name: rank for rank, name in enumerate(names)}

    def publish(self) -> None:
        """Publish the current registrations as a new version."""
        self.version += 1
        metadata = self.agent.metadata()
        digest = hashlib.sha256(metadata).digest()
        rows = self.own_rows.blocks
        identity = Identity(
            self.agent.name,
            metadata,
            digest,
            self.agent.memory_type,
            self.agent.device_number,
            self.agent.starts().tolist(),
            Place.here(),
            self._page,
            rows,
        )
        self._control.publish(f"identity/{self.version}", msgspec.msgpack.encode(identity))

    def know(self, rank: int, version: int) -> str:
        """Make sure that `version` of a rank's identity is known here; return the agent's name.

        Raises:
            TransferTimeoutError: the rank has not published it in time.
            TransferError: it is damaged.
        """
        if self._versions.get(rank, 0) < version:
            try:
                raw = self._control.fetch(rank, f"identity/{version}", self._timeout_s)
                identity = msgspec.msgpack.decode(raw, type=Identity)
                if self._ranks.get(identity.name) != rank:
                    raise NixlError(f"agent {identity.name} does not belong to rank {rank}")
                if hashlib.sha256(identity.metadata).digest() != identity.digest:
                    raise NixlError("it arrived damaged", why=f"{len(identity.metadata)} bytes, wrong digest")
                if identity.memory != self.agent.memory_type:
                    raise NixlError(f"it moves {identity.memory}, but this rank moves {self.agent.memory_type}")
                rows = PeerRows(identity.name, identity.rows)
                self.agent.add_peer(identity.name, identity.metadata, identity.device_number, identity.starts)
                self._links.add(rank, identity.place)
                if rank in self._rows:
                    self._rows[rank].drop(self.agent)
            except ControlPlaneError as error:
                raise TransferTimeoutError(error.what, peers=[rank], phase="connect", why=error.why) from error
            except (NixlError, msgspec.DecodeError, ValueError, OverflowError) as error:
                raise TransferError(
                    f"the metadata of rank {rank} cannot be used", peers=[rank], phase="connect", why=str(error)
                ) from error
            self._identities[rank] = identity
            self._rows[rank] = rows
            self._versions[rank] = version
        return self._identities[rank].name

    def name(self, rank: int) -> str:
        """Return the name of a rank's agent, after loading its identity if necessary."""
        return self.know(rank, max(1, self._versions.get(rank, 0)))

    def page_to_read(self, rank: int) -> int | None:
        """Return the address of a known rank's page, or None if the path from it is proven."""
        return None if rank in self.proven else self._identities[rank].page

    def rows(self, rank: int) -> PeerRows:
        """Return the published rows of a known rank."""
        return self._rows[rank]

    def starts(self, rank: int) -> tuple[IntArray, IntArray]:
        """Return the starts of the registered regions of a known rank, and those of this rank."""
        return self.agent.starts(self._identities[rank].name), self.agent.starts()

    def prepared(self, rank: int, rows: IntArray, places: IntArray) -> Numbered | None:
        """Return prepared lists of a rank's rows and of places here, or None while they do not pay."""
        local = self.places.prepared(self.agent, places)
        return None if local is None else Numbered(self._rows[rank].prepared(self.agent), rows, local, places)

    @property
    def known(self) -> set[int]:
        """Return the ranks that this one knows."""
        return set(self._identities)

    def send(self, rank: int, raw: bytes) -> None:
        """Send one notification."""
        self.agent.notify(self.name(rank), raw)

    def receive(self) -> list[tuple[int, Message]]:
        """Return `(rank, message)` of all received notifications, in the order in which each rank sent them.

        Raises:
            TransferError: NIXL failed.
        """
        try:
            received = self.agent.notifications()
        except NixlError as error:
            raise TransferError("this rank cannot receive notifications", phase="notify", why=str(error)) from error
        arrived: list[tuple[int, Message]] = []
        for name, raws in received.items():
            rank = self._ranks.get(name)
            if rank is None:
                continue
            parsed = (messages.parse(self.token, raw) for raw in raws)
            arrived.extend((rank, message) for message in parsed if message is not None)
        self._left.update(rank for rank, message in arrived if message.kind == Kind.BYE)
        return arrived

    def part(self) -> None:
        """Send BYE to all known ranks, and wait a moment for theirs.

        Until then one of them may be reading memory of this rank, or waiting for progress that only polling here makes.
        """
        for rank in self.known:
            with contextlib.suppress(NixlError, TransferError):
                self.send(rank, Writer(self.token, 0).bye())
        deadline = time.monotonic() + _PARTING_S
        while self.known - self._left - self.lost and time.monotonic() < deadline:
            with contextlib.suppress(TransferError):
                self.receive()
            time.sleep(_NAP_S)
