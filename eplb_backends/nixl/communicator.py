"""The `nixl` communicator: registered tensors are read in place, the others through packed windows."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import torch

from eplb_backends.nixl.agent import Agent, Identity, NixlError
from eplb_backends.nixl.exchange import Exchange, Incoming, Mailbox
from eplb_backends.nixl.memory import Regions, Window, aligned, allocation_of
from eplb_backends.nixl.options import NixlOptions
from eplb_core.backend import BackendContext
from eplb_core.coalesce import as_bytes
from eplb_core.communicator import EplbCommunicator, TransferStats
from eplb_core.control import ControlPlane
from eplb_core.errors import (
    ControlPlaneError,
    EplbError,
    IntegrityError,
    InvalidTransferError,
    TransferError,
    TransferOverflowError,
    TransferTimeoutError,
)
from eplb_core.queues import Transfer, TransferQueue, check_match
from eplb_core.streams import on_stream, synchronize

_PROBE_BYTES = 4096  # a page from every peer at start: proves the path and warms the connection up
_REGISTERED_MORE = b"+"


def create(context: BackendContext, options: NixlOptions, expert_weights: Sequence[torch.Tensor]) -> NixlCommunicator:
    """Return a connected communicator; a `BackendFactory`.

    Raises:
        BackendNotInstalledError: no NIXL package is there.
        TransferError: a step ("agent", "connect", "self-test") failed on some rank; the same on every rank.
    """
    return NixlCommunicator(context, options)


class NixlCommunicator(EplbCommunicator):
    """Moves tensors by READs that the receiving rank drives.

    Args:
        context: the group.
        options: the options of the config string.
    """

    def __init__(self, context: BackendContext, options: NixlOptions) -> None:
        self._control = context.control
        self._device = context.device
        self._timeout_s = float(options.timeout)
        self._mode = options.mode
        self._window_bytes = int(options.window)
        self._queue = TransferQueue(context.rank, context.world_size, context.device)
        self._registered = Regions()
        self._registered_more = False
        self._epoch = 0
        self._stats: TransferStats | None = None
        self._agent: Agent | None = None
        self._mailbox: Mailbox | None = None
        self._send_window: Window | None = None
        self._receive_window: Window | None = None
        try:
            self._connect(f"eplb-rank{context.rank}", options.progress == "on")
            self._self_test()
        except BaseException:
            self.close()
            raise

    # --- the contract -----------------------------------------------------------------------------------------------

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """False: the only memory that it allocates is its windows, `staging_limit_bytes` at most."""
        return False

    @property
    def transfer_limit_bytes(self) -> int | None:
        """Half the window where sent tensors are packed; no limit where they are registered."""
        return self._window_bytes // 2 if self._mode == "packed" else None

    @property
    def staging_bytes(self) -> int:
        """Bytes of the windows that were needed so far."""
        windows = (self._send_window, self._receive_window)
        return sum(window.allocated_bytes for window in windows if window is not None)

    @property
    def staging_limit_bytes(self) -> int:
        """The `window` option, less the send window where everything is packed."""
        return self._window_bytes // 2 if self._mode == "packed" else self._window_bytes

    @property
    def last_stats(self) -> TransferStats | None:
        """What the last finished `execute()` did."""
        return self._stats

    def register(self, tensors: Sequence[torch.Tensor]) -> None:
        """Register the allocations behind `tensors`, each once; peers learn of them in the next `execute()`.

        Registered memory can be read, and written, by every peer of the group.

        Raises:
            InvalidTransferError: a tensor lies on another device.
            TransferError: NIXL cannot register the memory.
        """
        self._queue.check_open()
        fresh: dict[int, tuple[int, torch.Tensor]] = {}
        for tensor in tensors:
            if tensor.device != self._device:
                raise InvalidTransferError(
                    f"cannot register a tensor on {tensor.device}",
                    why=f"this communicator moves tensors on {self._device}",
                )
            address, nbytes = allocation_of(tensor)
            if nbytes and not self._registered.contain(address, nbytes):
                fresh[address] = (nbytes, tensor)
        if not fresh or self._agent is None:
            return
        try:
            self._agent.register(
                [(address, nbytes) for address, (nbytes, _) in fresh.items()], [tensor for _, tensor in fresh.values()]
            )
        except NixlError as error:
            raise TransferError(
                "the tensors cannot be registered", phase="register", usable=True, why=str(error)
            ) from error
        for address, (nbytes, _) in fresh.items():
            self._registered.add(address, nbytes)
        self._registered_more = True

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        """Queue a send."""
        self._queue.add_send(tensor, dst_rank)

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        """Queue a receive."""
        self._queue.add_recv(tensor, src_rank)

    def execute(self) -> None:
        """Compare, pack what is not registered, let the peers read, read, unpack what is not registered."""
        began = time.perf_counter()
        sends, recvs = self._queue.take()
        phases: dict[str, float] = {}
        with self._breaking():
            outgoing, packed, problem = self._place(sends, self._send_window, "send")
            incoming, unpacked, recv_problem = self._place(recvs, self._receive_window, "receive")
            with _timed(phases, "agree"):
                self._agree(sends, recvs, problem or recv_problem)
            with _timed(phases, "pack"):
                self._copy([(window, as_bytes(tensor)) for window, tensor in packed])
                # READs go past the stream: what it has queued, here and in earlier rounds, has to be done first.
                synchronize(self._device, self._stream)
            with _timed(phases, "read"):
                exchange = Exchange(
                    self._connected(),
                    self._epoch,
                    {peer: np.array([address for address, _ in rows], np.int64) for peer, rows in outgoing.items()},
                    {peer: Incoming(*np.array(rows, np.int64).T) for peer, rows in incoming.items()},
                )
                exchange.run(self._timeout_s)
            with _timed(phases, "unpack"):
                self._copy([(as_bytes(tensor), window) for window, tensor in unpacked])
        self._epoch += 1
        self._stats = TransferStats(
            seconds=time.perf_counter() - began,
            bytes_sent=sum(send.nbytes for send in sends),
            bytes_received=sum(recv.nbytes for recv in recvs),
            messages=len(sends) + len(recvs),
            phases=phases,
            paths=dict.fromkeys(sorted({*outgoing, *incoming}), "NIXL UCX READ"),
        )

    def close(self) -> None:
        """Release handles, peers, registrations, agent and windows, in this order."""
        self._queue.close("it was closed")
        for window in (self._send_window, self._receive_window):
            if window is not None:
                window.close()
        if self._agent is not None:
            self._agent.close()

    # --- steps of a transfer ----------------------------------------------------------------------------------------

    def _place(
        self, transfers: Sequence[Transfer], window: Window | None, side: str
    ) -> tuple[dict[int, list[tuple[int, int]]], list[tuple[torch.Tensor, torch.Tensor]], TransferOverflowError | None]:
        """Decide where each message lies: in place if it is registered, else in the window.

        Returns:
            peer -> `(address, bytes)` of its messages; pairs of window slot and tensor that have to be copied; the
            reason why it is refused, if it is.
        """
        in_place = [
            self._registered.contain(transfer.tensor.data_ptr(), transfer.nbytes)
            and (self._mode != "packed" or side == "receive")
            for transfer in transfers
        ]
        staged = [t for t, direct in zip(transfers, in_place, strict=True) if not direct and t.nbytes]
        slots: Iterator[torch.Tensor] = iter(())
        packed: list[tuple[torch.Tensor, torch.Tensor]] = []
        if staged and window is not None:
            needed = sum(aligned(transfer.nbytes) for transfer in staged)
            if self._mode == "direct":
                return (
                    {},
                    [],
                    TransferOverflowError(
                        f"{len(staged)} tensors to {side} are not registered, and mode=direct allows no other",
                        phase="pack",
                        usable=True,
                        remedy="register(tensors) first, or use mode=auto",
                    ),
                )
            if needed > window.capacity:
                return (
                    {},
                    [],
                    TransferOverflowError(
                        f"{needed} bytes to {side} do not fit the {side} window of {window.capacity} bytes",
                        peers={transfer.peer for transfer in staged},
                        phase="pack",
                        usable=True,
                        remedy=f"use a larger window ({2 * needed} bytes would do), or register the tensors",
                    ),
                )
            self._registered_more |= window.allocate()
            packed = list(zip(window.slots([t.nbytes for t in staged]), [t.tensor for t in staged], strict=True))
            slots = iter([slot for slot, _ in packed])
        placed: dict[int, list[tuple[int, int]]] = {}
        for transfer, direct in zip(transfers, in_place, strict=True):
            if transfer.nbytes:
                lies_in = transfer.tensor if direct else next(slots)
                placed.setdefault(transfer.peer, []).append((lies_in.data_ptr(), transfer.nbytes))
        return placed, packed, None

    def _agree(
        self, sends: Sequence[Transfer], recvs: Sequence[Transfer], problem: TransferOverflowError | None
    ) -> None:
        note = _REGISTERED_MORE if self._registered_more else b""
        notes = check_match(self._control, sends, recvs, self._timeout_s, problem, note)
        if any(notes):
            self._exchange_identities("connect")

    def _copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy each second tensor into its first, in few kernels, on the communicator's stream."""
        if pairs:
            with on_stream(self._device, self._stream):
                torch._foreach_copy_([to for to, _ in pairs], [source for _, source in pairs])

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """After an error that leaves READs or peers in an unknown state, refuse everything but `close()`."""
        try:
            yield
        except TransferError as error:
            if not error.usable:
                self._queue.close(f"an earlier transfer failed: {error.what}")
            raise
        except BaseException as error:
            self._queue.close(f"an earlier transfer failed: {type(error).__name__}: {error}")
            raise

    # --- connecting -------------------------------------------------------------------------------------------------

    def _connect(self, label: str, progress_thread: bool) -> None:
        error: EplbError | None = None
        try:
            self._agent = Agent(label, self._device, progress_thread=progress_thread)
            self._send_window = Window(self._agent, self._window_bytes // 2, self._device)
            self._receive_window = Window(self._agent, self._window_bytes // 2, self._device)
        except EplbError as caught:
            error = caught
        _agree_on_step(self._control, "agent", error, self._timeout_s)
        identities = self._exchange_identities("connect")
        names = {rank: identity.name for rank, identity in enumerate(identities)}
        token = hashlib.blake2b("\n".join(names.values()).encode(), digest_size=8).digest()
        if self._agent is not None:
            self._mailbox = Mailbox(self._agent, token, names)

    def _exchange_identities(self, step: str) -> list[Identity]:
        """Tell all ranks what is registered here, and learn what is there."""
        agent = self._agent
        if agent is None:
            raise EplbError("the communicator has no agent")
        try:
            raw = self._control.all_gather("NIXL metadata", msgspec.msgpack.encode(agent.identity()), self._timeout_s)
        except ControlPlaneError as error:
            raise _timeout(error, step) from error
        identities: list[Identity] = []
        problem: EplbError | None = None
        try:
            identities = [msgspec.msgpack.decode(value, type=Identity) for value in raw]
            for rank, identity in enumerate(identities):
                if rank != self._control.rank:
                    agent.add_peer(identity)
        except (NixlError, msgspec.ValidationError, msgspec.DecodeError) as error:
            problem = error if isinstance(error, EplbError) else NixlError("metadata arrived damaged", why=str(error))
        _agree_on_step(self._control, step, problem, self._timeout_s)
        self._registered_more = False
        return identities

    def _self_test(self) -> None:
        """Read a page from every peer, over the path that weights will take, and compare it byte for byte."""
        rank, world_size = self._control.rank, self._control.world_size
        if world_size == 1:
            return
        pages = torch.stack([_page(r) for r in range(world_size)]).to(self._device)
        landed = torch.full_like(pages, 0xEE)
        mode, self._mode = self._mode, "direct"
        try:
            self.register([pages, landed])
            for peer in range(world_size):
                if peer != rank:
                    self.add_send(pages[rank], peer)
                    self.add_recv(landed[peer], peer)
            self.execute()
        finally:
            self._mode = mode
        wrong = [peer for peer in range(world_size) if peer != rank and not torch.equal(landed[peer], pages[peer])]
        error = None
        if wrong:
            error = IntegrityError(f"bytes read from ranks {wrong} are wrong", peers=wrong, phase="self-test")
        _agree_on_step(self._control, "self-test", error, self._timeout_s)

    def _connected(self) -> Mailbox:
        if self._mailbox is None:
            raise EplbError("the communicator is not connected")
        return self._mailbox


def _agree_on_step(control: ControlPlane, step: str, problem: EplbError | None, timeout_s: float) -> None:
    """Raise on every rank if `problem` is set on any: the rank's own error there, its text elsewhere."""
    try:
        said = control.all_gather(f"whether the step '{step}' succeeded", str(problem or "").encode(), timeout_s)
    except ControlPlaneError as error:
        raise _timeout(error, step) from error
    if problem is not None:
        raise problem
    failed = [rank for rank, text in enumerate(said) if text]
    if failed:
        raise TransferError(
            f"the step '{step}' failed on rank {failed[0]}",
            peers=failed,
            phase=step,
            why=said[failed[0]].decode(errors="replace"),
        )


def _timeout(error: ControlPlaneError, phase: str) -> TransferTimeoutError:
    return TransferTimeoutError(error.what, peers=error.missing, phase=phase, why=error.why, remedy=error.remedy)


def _page(rank: int) -> torch.Tensor:
    """Return a rank's page, uint8 `[4096]`; every rank computes all, so none is compared to itself."""
    return torch.arange(_PROBE_BYTES, dtype=torch.int32).mul_(2 * rank + 7).add_(rank).remainder_(251).to(torch.uint8)


@contextlib.contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        phases[name] = phases.get(name, 0.0) + time.perf_counter() - began
