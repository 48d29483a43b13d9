"""Reports transfers to plugins. Without plugins, nothing is wrapped and nothing is slower."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from eplb_core.contract.communicator import EplbCommunicator, PendingTransfer
from eplb_core.contract.context import Binding, EventSink
from eplb_core.contract.stats import TransferStats
from eplb_core.hooks.events import TransferFailed, TransferFinished, TransferStarted
from eplb_core.hooks.host import PluginHost

if TYPE_CHECKING:
    import torch

    from eplb_core.contract.payload import Payloads


@functools.cache
def default_plugins() -> PluginHost:
    """Return the host of the installed plugins, loaded at the first call."""
    return PluginHost().load()


def plugins_of(communicator: EplbCommunicator) -> EventSink:
    """Return the event sink that a communicator was made with, or that of the installed plugins.

    Raises:
        EplbError: the communicator is not bound to a group.
    """
    return communicator.binding.plugins or default_plugins()


def about_group(communicator: EplbCommunicator) -> dict[str, Any]:
    """Return the common event fields of a communicator: `backend`, `rank` and `world_size`, as keyword arguments.

    Raises:
        EplbError: the communicator is not bound to a group.
    """
    binding = communicator.binding
    return {
        "backend": binding.config.partition("?")[0],
        "rank": binding.context.rank,
        "world_size": binding.context.world_size,
    }


def observed(communicator: EplbCommunicator, plugins: PluginHost) -> EplbCommunicator:
    """Return a communicator that reports each transfer to `plugins`, or the same one if none listens."""
    listens = plugins.listens(TransferStarted, TransferFinished, TransferFailed)
    return ObservedCommunicator(communicator, plugins) if listens else communicator


class ObservedCommunicator(EplbCommunicator):
    """Delegates everything to `inner`, and reports to plugins when a transfer starts, finishes or fails.

    Args:
        inner: a bound communicator.
        plugins: receives the events.
    """

    def __init__(self, inner: EplbCommunicator, plugins: PluginHost) -> None:
        self.inner = inner
        self.plugins = plugins
        self._sent: dict[int, int] = {}
        self._received: dict[int, int] = {}
        self._messages = 0
        self.bind(inner.binding)

    def bind(self, binding: Binding) -> None:
        """Bind both."""
        super().bind(binding)
        self.inner.bind(binding)

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        """Queue a send."""
        self.inner.add_send(tensor, dst_rank)
        self._sent[dst_rank] = self._sent.get(dst_rank, 0) + tensor.nbytes
        self._messages += 1

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        """Queue a receive."""
        self.inner.add_recv(tensor, src_rank)
        self._received[src_rank] = self._received.get(src_rank, 0) + tensor.nbytes
        self._messages += 1

    def add_payloads(self, sends: Payloads, recvs: Payloads) -> None:
        """Queue many sends and receives."""
        self.inner.add_payloads(sends, recvs)
        for added, counted in ((sends, self._sent), (recvs, self._received)):
            for rank, payloads in added.items():
                counted[rank] = counted.get(rank, 0) + sum(payload.nbytes for payload in payloads)
                self._messages += len(payloads)

    def execute(self) -> None:
        """Perform all queued transfers."""
        self.start().wait()

    def start(self) -> PendingTransfer:
        """Start all queued transfers."""
        about = about_group(self) | {
            "bytes_sent": sum(self._sent.values()),
            "bytes_received": sum(self._received.values()),
            "messages": self._messages,
            "bytes_sent_to": self._sent,
            "bytes_received_from": self._received,
        }
        self._sent, self._received, self._messages = {}, {}, 0
        self.plugins.notify(TransferStarted(**about))
        try:
            pending = self.inner.start()
        except BaseException as error:
            self.plugins.notify(TransferFailed(**about, error=error))
            raise
        return _ObservedTransfer(pending, self, about)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the inner communicator: a backend may offer more than the contract."""
        if name == "inner":  # not set yet
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def max_in_flight(self) -> int:
        """Delegated to the inner communicator."""
        return self.inner.max_in_flight

    def set_stream(self, stream: torch.Stream | None) -> None:
        """Set the stream."""
        self.inner.set_stream(stream)

    def trust_matching(self, trusted: bool) -> None:
        """Trust matching."""
        self.inner.trust_matching(trusted)

    def register(self, tensors: Sequence[torch.Tensor], *, landing: bool = False) -> None:
        """Register tensors."""
        self.inner.register(tensors, landing=landing)

    def close(self) -> None:
        """Close."""
        self.inner.close()

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """Delegated to the inner communicator."""
        return self.inner.needs_profile_buffer_reservation

    @property
    def may_land_late(self) -> bool:
        """Delegated to the inner communicator."""
        return self.inner.may_land_late

    @property
    def transfer_limit_bytes(self) -> int | None:
        """Delegated to the inner communicator."""
        return self.inner.transfer_limit_bytes

    @property
    def staging_bytes(self) -> int:
        """Delegated to the inner communicator."""
        return self.inner.staging_bytes

    @property
    def staging_limit_bytes(self) -> int:
        """Delegated to the inner communicator."""
        return self.inner.staging_limit_bytes

    @property
    def last_stats(self) -> TransferStats | None:
        """Delegated to the inner communicator."""
        return self.inner.last_stats


class _ObservedTransfer(PendingTransfer):
    def __init__(self, pending: PendingTransfer, communicator: ObservedCommunicator, about: dict[str, Any]) -> None:
        self._pending = pending
        self._communicator = communicator
        self._about = about

    def use_idle_time(self, work: Iterator[object]) -> None:
        self._pending.use_idle_time(work)

    def wait(self) -> TransferStats | None:
        plugins = self._communicator.plugins
        try:
            stats = self._pending.wait()
        except BaseException as error:
            plugins.notify(TransferFailed(**self._about, error=error))
            raise
        staging_bytes = self._communicator.staging_bytes
        plugins.notify(TransferFinished(**self._about, stats=stats or TransferStats(), staging_bytes=staging_bytes))
        return stats
