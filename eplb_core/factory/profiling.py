"""Makes a transport allocate what it allocates by itself, so that an engine's memory profiling counts it.

An engine that measures how much memory is left for its KV cache does so before the first rebalancing. A transport such
as NCCL allocates its buffers at its first use, which would then fail, long after the start.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eplb_core.contract.communicator import EplbCommunicator

_LARGEST_BYTES = 8 << 20  # beyond this, transports use the same buffers again


def reserve_profile_buffers(communicator: EplbCommunicator, expert_weights: Sequence[torch.Tensor] = ()) -> int:
    """Send something between every pair of ranks, if the transport needs that to show what memory it takes.

    Call it on every rank inside the engine's memory profiling, where the original interface ran a dummy collective.
    It keeps nothing: two tensors of one expert's size, 8 MiB at most, exist meanwhile.

    Args:
        communicator: made by `create_eplb_communicator`, with nothing queued.
        expert_weights: the tensors of one layer, first dimension = local slots; the largest row sets the size.

    Returns:
        By how many bytes the device's memory that torch's allocator does not manage grew: the transport's own
        buffers, if nothing else on the device allocates meanwhile. 0 on a CPU, where `needs_profile_buffer_reservation`
        says that nothing is needed, and where the transport was warmed up before.

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
    # One pair at a time for each rank: all at once would need as many landing places as there are ranks.
    for distance in range(1, context.world_size):
        communicator.add_send(outgoing, (context.rank + distance) % context.world_size)
        communicator.add_recv(landing, (context.rank - distance) % context.world_size)
        communicator.execute()
    return max(0, _outside_torch(context.device) - before)


def _outside_torch(device: torch.device) -> int:
    """Return the bytes of the device's memory that are in use, by anybody, but not by torch's allocator."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
