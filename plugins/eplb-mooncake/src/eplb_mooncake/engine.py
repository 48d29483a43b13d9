"""Mooncake's Transfer Engine, as far as this backend uses it.

Measured with mooncake-transfer-engine-non-cuda 0.3.13.post1 over tcp:

- Only memory that was registered can be read; whoever asks for other memory gets an error.
- Opening a peer that does not answer blocks for 60 s, and blocks READs from all other peers meanwhile. So every peer is
  opened when the communicator is made, and never again.
- A READ from a peer that was killed fails within milliseconds, one from a peer that is stopped after 30 s. None can be
  taken back; but letting go of the engine ends all of them, and nothing arrives after that.
- Letting go of it takes up to a second, in which no other Python thread runs; `sockets` makes that 50 ms.
- A thread that is left inside the library while the interpreter ends aborts the process.
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
"""What is read from each peer when it is opened, to see that the path works."""

_NO_BATCH = (0, -1, 2**64 - 1)  # what the library returns in place of a batch that it could not start
_GOES_ON = (0, -2)  # -2: it takes long, and its bytes may still come
_SYSTEM_LIBRARIES = "apt-get install libibverbs1 libnuma1 libcurl4"
_RDMA_DEVICES = Path("/sys/class/infiniband")
_PAUSE_S = 50e-6
_END_S = 2.0  # for a thread to come back after its connection was ended


class Engine:
    """One Transfer Engine, which peers know as `name`.

    Args:
        host: the address at which the peers reach this rank.
        options: the options of the config string.

    Attributes:
        name: `host:port`.

    Raises:
        BackendUnavailableError: the library cannot be loaded or started, or there is no RDMA device and one was
            asked for.
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
                remedy="set MC_LOG_LEVEL=INFO to see more of it",
            )
        port = int(self._engine.get_rpc_port())
        self.name = f"{host}:{port}"
        shorten_listening(port)
        self._registered: list[object] = []

    def register(self, address: int, nbytes: int, owner: object) -> bool:
        """Let peers read, and write, this memory until the engine is closed; return whether that is possible.

        Args:
            address: where it begins.
            nbytes: its length.
            owner: what is kept alive, so that the memory is.
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
            BackendUnavailableError: a peer cannot be read from, or other bytes came.
        """
        opening = _Opening(samples, landing, time.monotonic() + timeout_s)
        # In a thread, since opening has no timeout of its own. The thread alone holds on to the engine and its memory,
        # so that closing the engine ends it although an error's traceback refers to here.
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
                f"Mooncake does not reach rank {rank} at {samples[rank][0]}",
                name="mooncake",
                why=f"{why}; the library's reason is on stderr",
                remedy="see that a firewall lets the ranks connect to one another, or name another interface",
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
        """Return True once all bytes are here, False if the READ failed, None as long as it goes on."""
        status = self._engine.transfer_check_status(batch)
        return None if status in _GOES_ON else bool(status == 1)

    def close(self) -> None:
        """End all READs, stop serving those of peers, and let go of the memory. May be called twice."""
        self._engine = None
        self._registered.clear()


class _Opening:
    """Reads a few bytes from one peer after the other.

    Args:
        samples: as `Engine.open` is given them.
        landing: as `Engine.open` is given it.
        deadline: when to give up, in `time.monotonic()` seconds.

    Attributes:
        waiting: the ranks that have not answered, in order.
        fault: the rank that ended it, and what was wrong with it.
    """

    def __init__(self, samples: Mapping[int, tuple[str, int, bytes]], landing: Bytes, deadline: float) -> None:
        self.deadline = deadline
        self.waiting = sorted(samples)
        self.fault: tuple[int, str] | None = None
        self._samples = samples
        self._landing = landing

    def run(self, engine: Any, kept: object) -> None:
        """Go on until all have answered, one is at fault, or it is too late."""
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
                self.fault = (rank, "other bytes came")
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
    """Without a device, and with MC_FORCE_TCP, Mooncake takes tcp and does not say so."""
    if "MC_FORCE_TCP" in os.environ:
        why, remedy = "MC_FORCE_TCP is set", "unset it, or use protocol=tcp"
    elif not _RDMA_DEVICES.is_dir() or not any(_RDMA_DEVICES.iterdir()):
        why, remedy = f"there is no RDMA device in {_RDMA_DEVICES}", "use protocol=tcp"
    else:
        return
    raise BackendUnavailableError("Mooncake cannot use RDMA here", name="mooncake", why=why, remedy=remedy)


@contextlib.contextmanager
def _environment(protocol: str) -> Iterator[None]:
    """What Mooncake reads from the environment while it is loaded and started, and the old values after that."""
    wanted = {"MC_LOG_LEVEL": os.environ.get("MC_LOG_LEVEL", "ERROR")}  # it tells of every start otherwise
    if protocol == "tcp":
        wanted["MC_FORCE_TCP"] = "1"  # it takes RDMA otherwise, where there is a device
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
