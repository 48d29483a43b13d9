"""A backend that damages what it receives: what the end-to-end checks must notice."""

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
    create_eplb_communicator,
)
from eplb_core.contract.payload import Payloads


class SabotagedCommunicator(EplbCommunicator):
    """Passes everything to a sound communicator, then swaps two bytes of each tensor that was received."""

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

    def execute(self) -> None:
        """Receive, then damage."""
        self._inner.execute()
        for tensor in self._received:
            flat = tensor.reshape(-1).view(torch.uint8)
            flat.copy_(flat.roll(4))
        self._received = []

    def close(self) -> None:
        """Close."""
        self._inner.close()


def create(
    context: BackendContext, options: CommonOptions, expert_weights: Sequence[torch.Tensor]
) -> SabotagedCommunicator:
    """Return a communicator over torch_gloo; a `BackendFactory`."""
    from eplb_core import TorchGroups

    return SabotagedCommunicator(create_eplb_communicator(TorchGroups(context.cpu_group), "torch_gloo", expert_weights))


BACKEND = BackendSpec(
    name="sabotaged",
    summary="damages what it receives",
    api_version=PLUGIN_API_VERSION,
    factory="sabotaged:create",
    capabilities=Capabilities(device_types=("cpu",), background=True),
)
