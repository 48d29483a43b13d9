"""The parts of Mooncake's Transfer Engine that this backend uses.

Measured with mooncake-transfer-engine-non-cuda 0.3.13.post1 over tcp:

- Only registered memory can be read; reading other memory is an error.
- Opening a peer that does not answer blocks for 60 s, and blocks READs from all other peers meanwhile. So every peer is
  opened when the communicator is made, and never again.
- A READ from a killed peer fails within milliseconds, one from a stopped peer after 30 s. A READ cannot be cancelled;
  but deleting the engine ends all of them, and nothing arrives after that.
- Deleting it takes up to a second, in which no other Python thread runs; `sockets` reduces that to 50 ms.
- A thread that is inside the library when the interpreter exits aborts the process.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eplb_core.errors import BackendUnavailableError, TransferTimeoutError
from eplb_mooncake.chunks import Bytes, address_of
from eplb_mooncake.options import MooncakeOptions
from eplb_mooncake.sockets import end_connections, shorten_listening

SAMPLE_BYTES = 16
"""The bytes read from each peer when it is opened, to check that the path works."""

_NO_BATCH = (0, -1, 2**64 - 1)  # returned by the library if it could not start a batch
_GOES_ON = (0, -2)  # -2: it takes long, and its bytes may still arrive
_SYSTEM_LIBRARIES = "apt-get install libibverbs1 libnuma1 libcurl4"
_RDMA_DEVICES = Path("/sys/class/infiniband")
_PAUSE_S = 50e-6
_END_S = 2.0  # for a thread to return after its connection was shut down


class Engine:
    """One Transfer Engine, known to peers as `name`.

    Args:
        host: the address at which the peers reach this rank.
        options: the options of the config string.

    Attributes:
        name: `host:port`.

    Raises:
        BackendUnavailableError: the library cannot be loaded or started, or there is no RDMA device although one was
            requested.
    """

    def __init__(self, host: str, options: MooncakeOptions) -> None:
        if options.protocol == "rdma":
            _check_rdma()
        with _environment(options.protocol):
            library = load()
            self._engine = library.TransferEngine()
            code = self._engine.initialize(host, "P2PHANDSHAKE", options.protocol, options.device_name or "")
        if code != 0:
            raise BackendUnavailableError(
                "Mooncake's Transfer Engine does not start",
                name="mooncake",
                why=f"it returned {code} for address {host} and protocol {options.protocol}; its reason is on stderr",
                remedy="set MC_LOG_LEVEL=INFO for details",
            )
        port = int(self._engine.get_rpc_port())
        self.name = f"{host}:{port}"
        shorten_listening(port)
        self._registered: list[object] = []

    def register(self, address: int, nbytes: int, owner: object) -> bool:
        """Let peers read, and write, this memory until the engine is closed; return whether that is possible.

        Args:
            address: its start.
            nbytes: its length.
            owner: kept alive, and with it the memory.
        """
        if self._engine.register_memory(address, nbytes) != 0:
            return False
        self._registered.append(owner)
        return True

    def open(self, samples: Mapping[int, tuple[str, int, bytes]], landing: Bytes, timeout_s: float) -> None:
        """Open every peer, by reading a few bytes from each.

        Args:
            samples: peer rank -> its engine's name, an address of registered memory there, and the bytes at it.
            landing: registered memory that the bytes are read into, uint8, `SAMPLE_BYTES` or more.
            timeout_s: for all of them together, in seconds.

        Raises:
            TransferTimeoutError: a peer did not answer in time.
            BackendUnavailableError: a peer cannot be read from, or wrong bytes arrived.
        """
        opening = _Opening(samples, landing, time.monotonic() + timeout_s)
        # In a thread, since opening has no timeout. Only the thread holds the engine and its memory, so that closing
        # the engine deletes it although an error's traceback refers to this frame.
        thread = threading.Thread(
            target=opening.run, args=(self._engine, list(self._registered)), daemon=True, name="eplb-mooncake opens"
        )
        thread.start()
        thread.join(max(opening.deadline - time.monotonic(), 0.0))
        late = list(opening.waiting)
        if late and thread.is_alive():
            host, _, port = samples[late[0]][0].rpartition(":")
            end_connections(host, int(port))
            thread.join(_END_S)
        elif opening.fault is not None:
            rank, why = opening.fault
            raise BackendUnavailableError(
                f"Mooncake cannot reach rank {rank} at {samples[rank][0]}",
                name="mooncake",
                why=f"{why}; the library's reason is on stderr",
                remedy="check that the firewall lets the ranks connect to one another, or choose another interface",
            )
        if late:
            raise TransferTimeoutError(
                f"rank {late[0]} did not answer Mooncake at {samples[late[0]][0]} within {timeout_s:g} s",
                peers=late[:1],
                phase="connect",
            )

    def start_read(self, name: str, local: int, remote: int, nbytes: int) -> int | None:
        """Start reading `nbytes` at the address `remote` of the engine `name`, which is open; None if it fails."""
        batch = int(self._engine.batch_transfer_async_read(name, [local], [remote], [nbytes]))
        return None if batch in _NO_BATCH else batch

    def finished(self, batch: int) -> bool | None:
        """Return True once all bytes are here, False if the READ failed, None while it is in flight."""
        status = self._engine.transfer_check_status(batch)
        return None if status in _GOES_ON else bool(status == 1)

    def close(self) -> None:
        """End all READs, stop serving peers, and release the memory. May be called twice."""
        self._engine = None
        self._registered.clear()


class _Opening:
    """Reads a few bytes from one peer after another.

    Args:
        samples: as in `Engine.open`.
        landing: as in `Engine.open`.
        deadline: when to give up, in `time.monotonic()` seconds.

    Attributes:
        waiting: the ranks that have not answered, in order.
        fault: the faulty rank, and what was wrong.
    """

    def __init__(self, samples: Mapping[int, tuple[str, int, bytes]], landing: Bytes, deadline: float) -> None:
        self.deadline = deadline
        self.waiting = sorted(samples)
        self.fault: tuple[int, str] | None = None
        self._samples = samples
        self._landing = landing

    def run(self, engine: Any, kept: object) -> None:
        """Continue until all have answered, one is faulty, or the deadline passes."""
        while self.waiting:
            rank = self.waiting[0]
            name, address, expected = self._samples[rank]
            batch = engine.batch_transfer_async_read(name, [address_of(self._landing)], [address], [len(expected)])
            status = -1 if batch in _NO_BATCH else 0
            while status in _GOES_ON:
                if time.monotonic() > self.deadline:
                    return
                time.sleep(_PAUSE_S)
                status = engine.transfer_check_status(batch)
            if status != 1:
                self.fault = (rank, "it cannot be read from")
                return
            if self._landing[: len(expected)].tobytes() != expected:
                self.fault = (rank, "wrong bytes arrived")
                return
            del self.waiting[0]


def load() -> Any:
    """Return the module `mooncake.engine`.

    Raises:
        BackendUnavailableError: it, or a library that it needs, cannot be loaded.
    """
    try:
        return importlib.import_module("mooncake.engine")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        raise BackendUnavailableError(
            "Mooncake's Transfer Engine cannot be loaded",
            name="mooncake",
            why=str(error),
            remedy='pip install "eplb-mooncake[cpu]"' if missing else _SYSTEM_LIBRARIES,
        ) from error


def _check_rdma() -> None:
    """Refuse RDMA without a device or with MC_FORCE_TCP: Mooncake would silently use tcp."""
    if "MC_FORCE_TCP" in os.environ:
        why, remedy = "MC_FORCE_TCP is set", "unset it, or use protocol=tcp"
    elif not _RDMA_DEVICES.is_dir() or not any(_RDMA_DEVICES.iterdir()):
        why, remedy = f"there is no RDMA device in {_RDMA_DEVICES}", "use protocol=tcp"
    else:
        return
    raise BackendUnavailableError("Mooncake cannot use RDMA here", name="mooncake", why=why, remedy=remedy)


@contextlib.contextmanager
def _environment(protocol: str) -> Iterator[None]:
    """Set what Mooncake reads from the environment while it is loaded and started; restore the old values after."""
    wanted = {"MC_LOG_LEVEL": os.environ.get("MC_LOG_LEVEL", "ERROR")}  # by default it logs every start
    if protocol == "tcp":
        wanted["MC_FORCE_TCP"] = "1"  # otherwise it takes RDMA if there is a device
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
