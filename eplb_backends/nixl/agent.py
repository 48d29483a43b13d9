"""The boundary to NIXL: one agent per communicator, and the only module that imports the package.

Everything foreign stops here. NIXL's exceptions, which share no base class, leave as `NixlError`. Its metadata is
checked before use, because truncated metadata poisons a peer's name permanently. Its memory is released in the only
safe order.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import time
import uuid
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eplb_backends.nixl.netlink import REMEDY, keep_apart
from eplb_core.arrays import IntArray
from eplb_core.errors import BackendNotInstalledError, EplbError
from eplb_core.transport.streams import ordinal_of

_PACKAGES = ("nixl", "nixl_rocm", "rixl")  # the CUDA build, the ROCm build, and the ROCm build's older name

ENVIRONMENT = {
    # By default UCX claims a signal that a server may be using.
    "UCX_DEBUG_SIGNO": "0",
    "NIXL_LOG_LEVEL": "WARN",
}
"""Set before NIXL loads, unless the user has set it."""

CUDA_ENVIRONMENT = {
    # Without NVLink, UCX disables reads over CUDA IPC and falls back to tcp: 0.5 instead of 1,300 GB/s on one H200.
    "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",
}
"""Also set if the memory is on a CUDA device."""

_SETTLING_NAP_S = 1e-3

logger = logging.getLogger(__name__)


class NixlError(EplbError, RuntimeError):
    """NIXL refused or failed. `disconnected` tells whether a peer is gone."""

    def __init__(
        self, what: str, *, why: str | None = None, remedy: str | None = None, disconnected: bool = False
    ) -> None:
        self.disconnected = disconnected
        super().__init__(what, why=why, remedy=remedy)


class Agent:
    """A NIXL agent with the UCX backend.

    Args:
        label: becomes part of the agent's name, to recognise it in logs.
        device: the device whose memory is moved.
        progress_thread: whether NIXL runs a progress thread.

    Raises:
        BackendNotInstalledError: no NIXL package is installed.
        NixlError: the agent could not be made.
    """

    def __init__(self, label: str, device: torch.device, *, progress_thread: bool) -> None:
        api = _load(device)
        self.name = f"{label}-{uuid.uuid4().hex}"
        self.memory_type = "DRAM" if device.type == "cpu" else "VRAM"
        self.device_number = 0 if device.type == "cpu" else ordinal_of(device)
        with mapped("NIXL cannot create an agent", remedy=_restrictions()):
            config = api.nixl_agent_config(enable_prog_thread=progress_thread, backends=[])
            agent = api.nixl_agent(self.name, config)
            agent.create_backend("UCX", {})
        self._numbers = {"": self.device_number}  # of each agent's device, as numbered in the agent's process
        self._starts: dict[str, IntArray] = {"": np.empty(0, np.int64)}
        self._held = _Held(agent, stays_after_failure=self.memory_type == "VRAM")
        self._finalizer = weakref.finalize(self, self._held.release)

    @property
    def _agent(self) -> Any:
        if self._held.agent is None:
            raise NixlError(f"agent {self.name} was closed")
        if self._held.abandoned:
            raise NixlError(f"agent {self.name} was abandoned with READs in flight")
        return self._held.agent

    @property
    def abandoned(self) -> bool:
        """Whether it was abandoned with READs in flight."""
        return self._held.abandoned

    def register(self, regions: Sequence[tuple[int, int]], owners: Sequence[torch.Tensor]) -> None:
        """Make `regions`, pairs of address and bytes, readable by peers. Keeps `owners` alive."""
        rows = [(address, nbytes, self.device_number, "") for address, nbytes in regions]
        with mapped(f"NIXL cannot register {sum(nbytes for _, nbytes in regions)} bytes of {self.memory_type}"):
            descriptors = self._agent.register_memory(rows, self.memory_type)
        self._held.registered.append(Registration(descriptors, list(owners)))
        self._starts[""] = np.sort(np.append(self._starts[""], [address for address, _ in regions])).astype(np.int64)

    def starts(self, name: str = "") -> IntArray:
        """Return the start of each memory region that an agent has registered, int64, sorted; by default of this agent.

        For a peer, these are the starts that came with its metadata.
        """
        return self._starts[name]

    def metadata(self) -> bytes:
        """Return the metadata with which peers read from this agent: how to connect, and the registered memory."""
        with mapped("NIXL cannot describe this agent"):
            metadata: bytes = self._agent.get_agent_metadata()
        return metadata

    def add_peer(self, name: str, metadata: bytes, device_number: int, starts: Sequence[int] = ()) -> None:
        """Load a peer's metadata, or newer metadata of a known peer that has registered more memory.

        Args:
            name: the peer's name.
            metadata: complete metadata: truncated metadata poisons the peer's name permanently.
            device_number: the peer's `device_number`, by which NIXL finds the peer's memory. Processes that see
                different devices, or in a different order, number the same device differently.
            starts: the peer's `starts()`.

        Raises:
            NixlError: NIXL does not accept it, or it belongs to another agent.
        """
        with mapped(f"NIXL does not accept the metadata of agent {name}"):
            added = self._agent.add_remote_agent(metadata).decode()
        if added != name:
            raise NixlError(f"the metadata of agent {name} is that of {added}")
        self._numbers[name] = device_number
        self._starts[name] = np.sort(np.array(starts, np.int64))
        if name not in self._held.peers:
            self._held.peers.append(name)

    def prepare(self, peer: str, blocks: IntArray) -> Any:
        """Let NIXL look up pieces once, for `read`. `drop` releases the list, at the latest `close`.

        Args:
            peer: the owner of the memory, a peer that was added; an empty text for this rank.
            blocks: int64 `[blocks, 4]`: address, bytes, distance to the next piece, pieces. A block lies within one
                registration.
        """
        table = np.insert(blocks, 2, self._numbers[peer], axis=1).astype(np.uint64)
        with mapped(f"NIXL cannot prepare {len(blocks)} blocks of {peer or 'this rank'}"):
            prepared = self._agent.prep_xfer_dlist(peer, table, self.memory_type)
        self._held.prepared.append(prepared)
        return prepared

    def drop(self, prepared: Any) -> None:
        """Release a prepared list; requests keep copies of what they need."""
        self._held.prepared.remove(prepared)
        with mapped("a prepared list cannot be released"):
            self._agent.release_dlist_handle(prepared)

    def read(
        self, peer: str, remote: IntArray, local: IntArray, lengths: IntArray, numbered: Numbered | None = None
    ) -> Read:
        """Post one READ of several pieces; the arrays are int64 `[pieces]`: addresses and bytes.

        `numbered` names the same pieces, before neighbours were merged, in prepared lists, which is faster.
        """
        with mapped(f"NIXL cannot read from agent {peer}"):
            if numbered is not None:  # here NIXL itself merges neighbours
                places, rows = np.array(numbered.places, np.int32), np.array(numbered.rows, np.int32)
                handle = self._agent.make_prepped_xfer("READ", numbered.local, places, numbered.remote, rows)
            else:
                table = np.empty((2, len(lengths), 3), np.uint64)
                for side, addresses, owner in ((table[0], local, ""), (table[1], remote, peer)):
                    side[:, 0], side[:, 1], side[:, 2] = addresses, lengths, self._numbers[owner]
                sides = [self._agent.get_xfer_descs(side, self.memory_type) for side in table]
                handle = self._agent.initialize_xfer("READ", *sides, peer)
        read = Read(self._agent, handle)
        self._held.reads.append(read)
        read.post()
        return read

    def finished(self, read: Read) -> bool:
        """Return whether the READ is done; releases it if so. Raises `NixlError` if it failed."""
        if not read.poll():
            return False
        self._held.reads.remove(read)
        read.release()
        return True

    def settle(self, timeout_s: float) -> None:
        """Give READs in flight a last moment; if some do not end, never poll this agent again.

        NIXL cannot abort a READ. One that waits for its source would continue whenever this agent is polled, and write
        into memory that its owner may have reused by then.
        """
        deadline = time.monotonic() + timeout_s
        while self._held.agent is not None and not self._held.abandoned:
            for read in self._held.reads:
                with contextlib.suppress(NixlError):
                    read.poll()
            if not any(read.in_flight for read in self._held.reads):
                return
            self._held.abandoned = time.monotonic() > deadline
            time.sleep(_SETTLING_NAP_S)  # also after the last check: a copy on a GPU that has begun ends by itself

    def notify(self, peer: str, message: bytes) -> None:
        """Send a small message to a peer: fire and forget, in order."""
        # A READ's own notification is not used: NIXL 1.5.1 sends it only once the reader posts something else.
        with mapped(f"NIXL cannot notify agent {peer}"):
            self._agent.send_notif(peer, message)

    def notifications(self) -> dict[str, list[bytes]]:
        """Return the messages received since the last call, by sender. This call also makes progress."""
        with mapped("NIXL cannot poll for notifications"):
            received: dict[str, list[bytes]] = self._agent.get_new_notifs()
        return received

    def close(self) -> None:
        """Release everything; idempotent. With READs in flight everything is kept permanently, see `_keep`."""
        self._finalizer()


@dataclass(frozen=True, slots=True, eq=False)
class Registration:
    """Registered memory, and the tensors that own it."""

    descriptors: Any
    owners: list[torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Numbered:
    """The pieces of a READ by number.

    Attributes:
        remote: the source's prepared list.
        rows: numbers in it, one per piece.
        local: the prepared list of this rank's memory.
        places: numbers in it, one per piece.
    """

    remote: Any
    rows: Sequence[int] | IntArray
    local: Any
    places: Sequence[int] | IntArray


class Read:
    """One READ."""

    def __init__(self, agent: Any, handle: Any) -> None:
        self._agent = agent
        self._handle = handle
        self._state = "PROC"

    @property
    def in_flight(self) -> bool:
        """Whether it is not known to have ended or failed."""
        return self._state == "PROC"

    @property
    def failed(self) -> bool:
        """Whether NIXL reported a failure."""
        return self._state == "ERR"

    def post(self) -> None:
        """Start it."""
        self._note(self._agent.transfer)

    def poll(self) -> bool:
        """Return whether it is done; raises `NixlError` if it failed."""
        if self.in_flight:
            self._note(self._agent.check_xfer_state)
        return self._state == "DONE"

    def release(self) -> None:
        """Release the handle of a READ that is not in flight."""
        agent, handle, self._agent, self._handle = self._agent, self._handle, None, None
        with mapped("a READ's handle cannot be released"):
            agent.release_xfer_handle(handle)

    def _note(self, call: Any) -> None:
        try:
            with mapped("a READ failed"):
                self._state = call(self._handle)
            if self._state not in ("DONE", "PROC"):
                raise NixlError("a READ failed", why=f"its state is {self._state}")
        except NixlError:
            self._state = "ERR"
            raise


class _Held:
    """All resources of an agent, separate from its owner so that a finalizer can release them.

    The order is NIXL's: READs, then prepared lists, then peers, then memory, then the agent, then the tensors.

    Args:
        agent: NIXL's.
        stays_after_failure: whether bytes of a failed READ may still land once its agent is gone. Copies between GPUs
            in flight end on their own; anything else moves only while an agent is polled.
    """

    def __init__(self, agent: Any, *, stays_after_failure: bool) -> None:
        self.agent: Any = agent
        self.reads: list[Read] = []
        self.prepared: list[Any] = []
        self.peers: list[str] = []
        self.registered: list[Registration] = []
        self.abandoned = False
        self._stays_after_failure = stays_after_failure

    def release(self) -> None:
        agent, self.agent = self.agent, None
        if agent is None:
            return
        in_flight = []
        for read in self.reads:
            if not self.abandoned:
                with contextlib.suppress(NixlError):
                    read.poll()
            if read.in_flight or (read.failed and self._stays_after_failure):
                in_flight.append(read)
            else:
                self._try("release a READ", Read.release, read)
        self.reads = []
        if in_flight:
            logger.warning(
                "%d READs were in flight when the communicator was closed; the memory they may write to is kept",
                len(in_flight),
            )
            _keep((agent, in_flight, self.prepared, self.registered))
            return
        for prepared in self.prepared:
            self._try("release a prepared list", agent.release_dlist_handle, prepared)
        for peer in self.peers:
            self._try(f"remove agent {peer}", agent.remove_remote_agent, peer)
        for registration in self.registered:
            self._try("deregister memory", agent.deregister_memory, registration.descriptors)
        self.prepared, self.peers, self.registered = [], [], []
        del agent

    @staticmethod
    def _try(what: str, call: Any, argument: Any) -> None:
        try:
            call(argument)
        except Exception as error:  # noqa: BLE001 - NIXL's errors have no common base; the rest is released all the same
            logger.warning("NIXL could not %s: %s", what, error)


def _keep(what: object) -> None:
    """Never free an object, not even when the interpreter ends.

    NIXL cannot abort a READ, so the memory that it may land in cannot be freed. Dropping the whole agent does end it:
    over tcp, with the source stopped in the middle of 512 MB, no byte landed afterwards in 12 of 12 runs. But when
    the source resumed, UCX 1.23 killed the source's process (SIGABRT in 10 of 12 runs, "stubs.c:107 Assertion"),
    and a rank that was only slow must not be killed. If the reader kept its agent until its process ended, the
    source survived (6 of 6).
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(what))


@contextlib.contextmanager
def mapped(what: str, *, remedy: str | None = None) -> Iterator[None]:
    """Turn any exception of NIXL into a `NixlError` that names the operation."""
    try:
        yield
    except EplbError:
        raise
    except Exception as error:
        kind = type(error).__name__
        lost = kind == "nixlRemoteDisconnectError"
        raise NixlError(what, why=f"{kind}: {error}", remedy=remedy, disconnected=lost) from error


def _restrictions() -> str | None:
    """Return what to look at where UCX finds nothing to use: the variables that leave it only some of what there is."""
    given = [f"{name}={os.environ[name]}" for name in ("UCX_NET_DEVICES", "UCX_TLS") if name in os.environ]
    return f"unset {' and '.join(given)}, or name what this machine has" if given else None


def _load(device: torch.device) -> Any:
    for name, value in (ENVIRONMENT | (CUDA_ENVIRONMENT if device.type == "cuda" else {})).items():
        os.environ.setdefault(name, value)
    if crash := keep_apart():
        logger.warning("%s; %s", crash, REMEDY)
    for package in _PACKAGES:
        try:
            return importlib.import_module(f"{package}._api")
        except Exception as error:  # a broken library may raise anything, and the other ranks must know
            if isinstance(error, ModuleNotFoundError) and error.name == package:
                continue
            kind = type(error).__name__
            raise NixlError(f"the package {package} cannot be imported", why=f"{kind}: {error}") from error
    raise BackendNotInstalledError(
        "the nixl backend needs the NIXL package", name="nixl", remedy='pip install "eplb[nixl]"'
    )
