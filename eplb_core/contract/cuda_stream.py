"""CUDA streams from the generic streams that engines pass. The only module of the contract that imports torch."""

from __future__ import annotations

import torch


def as_cuda_stream(stream: torch.Stream) -> torch.cuda.Stream:
    """Return the `torch.cuda.Stream` for a `torch.Stream` of a CUDA device, which engines may pass."""
    if isinstance(stream, torch.cuda.Stream) or not isinstance(stream, torch.Stream) or stream.device.type != "cuda":
        return stream  # type: ignore[return-value]  # whether it suits the tensors' device is asked before
    return torch.cuda.Stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )
