"""Makes a transport allocate its buffers early, so that an engine's memory profiling counts them.

An engine measures how much memory is left for its KV cache before the first rebalance. A transport such as NCCL
allocates its buffers at its first use, which would then fail, long after the start.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eplb_core.contract.communicator import EplbCommunicator

_LARGEST_BYTES = 8 << 20  # beyond this, transports reuse their buffers


def reserve_profile_buffers(communicator: EplbCommunicator, expert_weights: Sequence[torch.Tensor] = ()) -> int:
    """Send something between every pair of ranks, if the transport needs that to allocate its buffers.

    Call it on every rank inside the engine's memory profiling, where the original interface ran a dummy collective.
    Its own memory is temporary: two tensors of one expert's size, 8 MiB at most.

    Args:
        communicator: made by `create_eplb_communicator`, with nothing queued.
        expert_weights: the tensors of one layer, first dimension = local slots; the largest row sets the size.

    Returns:
        The growth, in bytes, of device memory outside torch's allocator: the transport's buffers, if nothing else on
        the device allocates meanwhile. 0 on a CPU, if `needs_profile_buffer_reservation` is False, and if the transport
        was already warmed up.

    Raises:
        TransferError: as `execute()` does.
    """
    if not communicator.needs_profile_buffer_reservation:
        return 0
    context = communicator.binding.context
    rows = [tensor[0].numel() * tensor.element_size() for tensor in expert_weights if tensor.dim() and len(tensor)]
    nbytes = min(max(rows, default=1 << 20), _LARGEST_BYTES)
    limit = communicator.transfer_limit_bytes
    if limit is not None:
        nbytes = min(nbytes, limit)
    before = _outside_torch(context.device)
    outgoing, landing = (torch.zeros(nbytes, dtype=torch.uint8, device=context.device) for _ in range(2))
    # One peer at a time per rank: all at once would need a receive tensor for every rank.
    for distance in range(1, context.world_size):
        communicator.add_send(outgoing, (context.rank + distance) % context.world_size)
        communicator.add_recv(landing, (context.rank - distance) % context.world_size)
        communicator.execute()
    return max(0, _outside_torch(context.device) - before)


def _outside_torch(device: torch.device) -> int:
    """Return the bytes of device memory in use by any process, excluding torch's allocator."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
