"""The communicator that vLLM calls: its interface, over a communicator of eplb.

vLLM moves one layer at a time: it queues sends and receives, row by row, and calls `execute()` on every rank. If it
moves all layers at once (the synchronous path), a `Rearranger` does it instead, many layers per step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from eplb_core import EplbCommunicator, Rearranger, RearrangeResult
from eplb_core.errors import EplbError, TransferError
from eplb_core.transport import Payload
from eplb_vllm.rows import RowBook, in_memory_order


class PluginCommunicator:
    """vLLM's communicator interface. `engine_class` makes it a subclass of vLLM's own abstract class.

    Args:
        communicator: a communicator of eplb; closed with this one.
        expert_weights: `expert_weights[layer][tensor]`, first dimension = local slots.
        expert_buffer: `expert_buffer[tensor]`, the receive buffer for one layer's experts, slot by slot.
        all_layers_at_once: whether vLLM will call `rearrange`: then the window is allocated now, so that vLLM's memory
            profiling counts it.
    """

    def __init__(
        self,
        communicator: EplbCommunicator,
        expert_weights: Sequence[Sequence[torch.Tensor]],
        expert_buffer: Sequence[torch.Tensor],
        *,
        all_layers_at_once: bool = True,
    ) -> None:
        self.communicator = communicator
        self._weights = [[in_memory_order(tensor) for tensor in layer] for layer in expert_weights]
        self._buffer = [in_memory_order(tensor) for tensor in expert_buffer]
        self._rows = RowBook([*expert_weights, expert_buffer])
        self._device = self._weights[0][0].device
        self._sends: dict[int, list[Payload]] = {}
        self._recvs: dict[int, list[Payload]] = {}
        self._queued: list[str] = []
        self._layer: int | None = None
        self._rearranger: Rearranger | None = None
        self._closed = False
        # Both sides of every pair are queued from the two placements, which all ranks compute from the same loads.
        communicator.trust_matching(True)
        communicator.register([tensor for layer in self._weights for tensor in layer])
        communicator.register(self._buffer, landing=True)
        if all_layers_at_once:
            self._rearranger = Rearranger(communicator, self._weights)

    # --- one layer at a time ----------------------------------------------------------------------------------------

    @property
    def needs_profile_buffer_reservation(self) -> bool:
        """Whether vLLM's memory profiling must run a dummy collective to count this transport's buffers."""
        return self.communicator.needs_profile_buffer_reservation

    def set_stream(self, stream: Any) -> None:
        """Order packing, transfers and unpacking on `stream`, a `torch.Stream`; None means the current stream."""
        self._stream = stream
        given = None if self._device.type == "cpu" else stream
        if self._rearranger is not None:
            self._rearranger.set_stream(given)
        else:
            self.communicator.set_stream(given)

    def set_transfer_context(self, old_indices: Any, layer_idx: int) -> None:
        """Set the layer of the next transfers; errors name it."""
        self._layer = int(layer_idx)

    def add_send(self, tensors: Sequence[torch.Tensor], dst_rank: int, expert_id: int) -> None:
        """Queue the rows of one expert to be sent to `dst_rank`."""
        self._sends.setdefault(int(dst_rank), []).extend(self._rows.find(tensors))
        self._queued.append(f"expert {expert_id} to rank {dst_rank}")

    def add_recv(self, tensors: Sequence[torch.Tensor], src_rank: int, expert_id: int) -> None:
        """Queue a receive of the rows of one expert from `src_rank`."""
        self._recvs.setdefault(int(src_rank), []).extend(self._rows.find(tensors))
        self._queued.append(f"expert {expert_id} from rank {src_rank}")

    def execute(self) -> None:
        """Perform all queued transfers.

        Raises:
            TransferError: as `eplb_core.EplbCommunicator.execute`; a note names the layer and the experts.
        """
        sends, recvs, queued = self._sends, self._recvs, self._queued
        self._sends, self._recvs, self._queued = {}, {}, []
        with self._naming(queued):
            self.communicator.add_payloads(sends, recvs)
            self.communicator.execute()

    # --- all layers at once -----------------------------------------------------------------------------------------

    def rearrange(self, old: Any, new: Any) -> RearrangeResult:
        """Move all layers from placement `old` to placement `new`, both `[layers, slots]` and -1 for empty slots.

        Raises:
            EplbError: as `eplb_core.Rearranger.run`.
        """
        if self._rearranger is None:
            self._rearranger = Rearranger(self.communicator, self._weights)
        return self._rearranger.run(old, new)

    # --- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release everything; may be called twice."""
        if not self._closed:
            self._closed = True
            self._rearranger = None
            self.communicator.close()

    def __del__(self) -> None:
        """Release everything: vLLM drops a communicator without closing it."""
        with contextlib.suppress(Exception):
            self.close()

    @contextlib.contextmanager
    def _naming(self, queued: Sequence[str]) -> Iterator[None]:
        try:
            yield
        except EplbError as error:
            peers = {f" rank {peer}" for peer in error.peers} if isinstance(error, TransferError) else set()
            concerned = [each for each in queued if not peers or any(each.endswith(peer) for peer in peers)]
            named = ", ".join(concerned[:8]) + (f" and {len(concerned) - 8} more" if len(concerned) > 8 else "")
            error.add_note(f"layer {self._layer}, queued on this rank: {named or 'nothing'}")
            raise


def mapped_placements(
    old: torch.Tensor, new: torch.Tensor, rank_mapping: Mapping[int, int] | None, world_size: int, engine: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both placements in the ranks of the larger group, as vLLM's own functions do.

    Args:
        old: `[layers, slots]`.
        new: `[layers, slots]`.
        rank_mapping: old rank -> new rank while the group grows or shrinks; None otherwise.
        world_size: ranks of the group that moves the experts.
        engine: the module `vllm.distributed.eplb.rebalance_execute`.
    """
    if rank_mapping is None:
        return old, new
    if len(rank_mapping) == world_size:
        return old, engine._map_new_expert_indices_with_rank_mapping(new, rank_mapping)
    return engine._map_old_expert_indices_with_rank_mapping(old, rank_mapping, world_size), new


def engine_class(engine_base: type) -> type[PluginCommunicator]:
    """Return `PluginCommunicator` as a subclass of vLLM's abstract communicator."""
    return type("EplbPluginCommunicator", (PluginCommunicator, engine_base), {"__doc__": PluginCommunicator.__doc__})
