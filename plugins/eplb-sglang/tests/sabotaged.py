"""Backends that do harm: one damages what it receives, which the checks must notice, one fails half-way."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eplb_core import (
    PLUGIN_API_VERSION,
    BackendContext,
    BackendSpec,
    Capabilities,
    CommonOptions,
    EplbCommunicator,
    TorchGroups,
    create_eplb_communicator,
)
from eplb_core.errors import TransferTimeoutError
from eplb_core.transport import Payloads

WINDOW_BYTES = 100 << 10
"""Staging of the one that fails, so that a rearrangement takes several steps."""


class _Passing(EplbCommunicator):
    """Passes everything to a sound communicator."""

    def __init__(self, inner: EplbCommunicator) -> None:
        self._inner = inner
        self._received: list[torch.Tensor] = []

    def add_send(self, tensor: torch.Tensor, dst_rank: int) -> None:
        """Queue a send."""
        self._inner.add_send(tensor, dst_rank)

    def add_recv(self, tensor: torch.Tensor, src_rank: int) -> None:
        """Queue a receive."""
        self._inner.add_recv(tensor, src_rank)
        self._received.append(tensor)

    def add_payloads(self, sends: Payloads, recvs: Payloads) -> None:
        """Queue many."""
        self._inner.add_payloads(sends, recvs)
        self._received += [payload.tensor for payloads in recvs.values() for payload in payloads]

    def close(self) -> None:
        """Close."""
        self._inner.close()


class SabotagedCommunicator(_Passing):
    """Swaps bytes of each tensor that was received."""

    def execute(self) -> None:
        """Receive, then damage."""
        self._inner.execute()
        for tensor in self._received:
            flat = tensor.reshape(-1).view(torch.uint8)
            flat.copy_(flat.roll(4))
        self._received = []


class FailingCommunicator(_Passing):
    """Moves one step, and none after it."""

    executed = 0
    may_land_late = True  # so everything goes through the window

    @property
    def staging_limit_bytes(self) -> int:
        """As little as makes several steps of a small model."""
        return WINDOW_BYTES

    def execute(self) -> None:
        """Receive, the first time; what is received the second time is spoilt, and an error raised."""
        self.executed += 1
        self._inner.execute()
        if self.executed > 1:
            for tensor in self._received:
                tensor.reshape(-1).view(torch.uint8).fill_(0xA5)
            self._received = []
            raise TransferTimeoutError("this transport fails in its second step", usable=True)
        self._received = []


class FailingInPlaceCommunicator(FailingCommunicator):
    """The same, received in place where slots can be given up for it: a failure leaves some empty."""

    may_land_late = False


def _inner(context: BackendContext, expert_weights: Sequence[torch.Tensor]) -> EplbCommunicator:
    return create_eplb_communicator(TorchGroups(context.cpu_group), "torch_gloo", expert_weights)


def create(
    context: BackendContext, options: CommonOptions, expert_weights: Sequence[torch.Tensor]
) -> SabotagedCommunicator:
    """Return a communicator over torch_gloo; a `BackendFactory`."""
    return SabotagedCommunicator(_inner(context, expert_weights))


def create_failing(
    context: BackendContext, options: CommonOptions, expert_weights: Sequence[torch.Tensor]
) -> FailingCommunicator:
    """Return a communicator over torch_gloo; a `BackendFactory`."""
    return FailingCommunicator(_inner(context, expert_weights))


def create_failing_in_place(
    context: BackendContext, options: CommonOptions, expert_weights: Sequence[torch.Tensor]
) -> FailingInPlaceCommunicator:
    """Return a communicator over torch_gloo; a `BackendFactory`."""
    return FailingInPlaceCommunicator(_inner(context, expert_weights))


BACKEND = BackendSpec(
    name="sabotaged",
    summary="damages what it receives",
    api_version=PLUGIN_API_VERSION,
    factory="sabotaged:create",
    capabilities=Capabilities(device_types=("cpu",)),
)
FAILING = BackendSpec(
    name="failing",
    summary="fails in its second step",
    api_version=PLUGIN_API_VERSION,
    factory="sabotaged:create_failing",
    capabilities=Capabilities(device_types=("cpu",)),
)
FAILING_IN_PLACE = BackendSpec(
    name="failing_in_place",
    summary="fails in its second step, in place",
    api_version=PLUGIN_API_VERSION,
    factory="sabotaged:create_failing_in_place",
    capabilities=Capabilities(device_types=("cpu",)),
)
