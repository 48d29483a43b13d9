"""The `mooncake` communicator: peers READ the chunks that a rank offers, through bounded windows or in place."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import torch

from eplb_core import BackendContext, TransferStats
from eplb_core.errors import BackendUnavailableError, TransferError
from eplb_core.transport import Payloads, QueuedCommunicator
from eplb_mooncake.chunks import cut
from eplb_mooncake.engine import SAMPLE_BYTES, Engine
from eplb_mooncake.links import Card, Kind, Link, connect, exchange_cards, find_host, listen, new_token
from eplb_mooncake.options import MooncakeOptions
from eplb_mooncake.regions import Regions
from eplb_mooncake.round import Round
from eplb_mooncake.window import Window


def create(
    context: BackendContext, options: MooncakeOptions, expert_weights: Sequence[torch.Tensor]
) -> MooncakeCommunicator:
    """Return a connected communicator; a `BackendFactory`."""
    return MooncakeCommunicator(context, options)


class MooncakeCommunicator(QueuedCommunicator):
    """Moves tensors by READs of Mooncake's Transfer Engine.

    Args:
        context: the group.
        options: the options of the config string.

    Raises:
        BackendUnavailableError: Mooncake cannot be loaded or started, or cannot reach a peer.
        TransferTimeoutError: a rank did not connect in time.
    """

    def __init__(self, context: BackendContext, options: MooncakeOptions) -> None:
        super().__init__(context, options)
        self.path = f"mooncake {options.protocol}"
        self._options = options
        self._readable = Regions()
        self._landing = Regions()
        self._links: dict[int, Link] = {}
        self._window: Window | None = None
        self._engine: Engine | None = None
        try:
            self._connect(context)
        except BaseException:
            self.close()
            raise

    def register(self, tensors: Sequence[torch.Tensor], *, landing: bool = False) -> None:
        """Let peers read these tensors in place, and read into them in place if they are `landing`.

        Memory that Mooncake refuses, such as part of an existing registration, goes through the windows.
        """
        self.queue.check_open()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            start, nbytes = storage.data_ptr(), storage.nbytes()
            if self._engine is None or tensor.device.type != "cpu" or nbytes == 0:
                continue
            if not self._readable.cover(start, nbytes):
                if self._readable.touch(start, nbytes) or not self._engine.register(start, nbytes, tensor):
                    continue
                self._readable.add(start, nbytes)
            if landing and tensor.is_contiguous() and not self._landing.touch(tensor.data_ptr(), tensor.nbytes):
                self._landing.add(tensor.data_ptr(), tensor.nbytes)

    def move(self, sends: Payloads, recvs: Payloads) -> TransferStats:
        """Offer and read until all chunks have been moved both ways."""
        if self._window is None or self._engine is None:  # impossible: the queue would be closed
            return TransferStats()
        began = time.perf_counter()
        slot_bytes = self._window.slot_bytes
        round_ = Round(
            self._engine,
            self._window,
            self._links,
            self._readable,
            self._landing,
            cut(sends, slot_bytes),
            cut(recvs, slot_bytes),
            self.timeout_s,
        )
        round_.run()
        reading = time.perf_counter() - began - round_.pack_s - round_.unpack_s
        return TransferStats(
            phases={"pack": round_.pack_s, "read": reading, "unpack": round_.unpack_s},
            descriptors=round_.reads,
            descriptors_merged=round_.reads,
        )

    def give_up(self, error: TransferError) -> None:
        """Inform the peers which rank is to blame."""
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.send(Kind.FAILED, error.peers[0] if error.peers else self.context.rank, text=error.what)

    def release(self) -> None:
        """Close the connections, stop the engine, and release the window.

        READs that are still in flight after an error end with the engine.
        """
        for link in self._links.values():
            link.connection.close()  # before the engine, so that peers of a failed rank know at once
        self._links = {}
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._window = None

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """False: its window is host memory."""
        return False

    @property
    def staging_bytes(self) -> int:
        """Bytes of this rank's window."""
        return 0 if self._window is None else self._window.nbytes

    @property
    def staging_limit_bytes(self) -> int:
        """Four times the window, for the window and the caller's staging: 256 MiB by default."""
        return 4 * int(self._options.window)

    def _connect(self, context: BackendContext) -> None:
        host = find_host(context, self._options.interface, self.timeout_s)
        engine = self._engine = Engine(host, self._options)
        window = self._window = Window(int(self._options.window))
        if not engine.register(window.address(0), window.nbytes, window):
            raise BackendUnavailableError(
                f"Mooncake does not register a window of {window.nbytes} bytes",
                name="mooncake",
                why="its reason is on stderr",
                remedy="if it reports that memory cannot be locked, raise `ulimit -l`",
            )
        token = new_token()
        # The first slot shows the token until the first `execute()`, before which every rank has read it.
        window.memory[: len(token)] = list(token)
        with listen(host, context.world_size) as listener:
            mine = Card(host, listener.getsockname()[1], engine.name, window.address(0), token.hex())
            cards = exchange_cards(context, mine, self.timeout_s)
            self._links = connect(context.rank, listener, cards, self.timeout_s)
        samples = {
            peer: (cards[peer].engine, cards[peer].sample, bytes.fromhex(cards[peer].token)) for peer in self._links
        }
        slot = window.to_receive[0]
        engine.open(samples, window.slot(slot)[:SAMPLE_BYTES], self.timeout_s)
