"""Streams that engines hand over, as what events and copies need. Imports torch, as nothing else of the contract."""

from __future__ import annotations

import torch


def as_cuda_stream(stream: torch.Stream) -> torch.cuda.Stream:
    """Return the CUDA stream that a `torch.Stream` of a CUDA device is: engines hand over these, which know less."""
    if isinstance(stream, torch.cuda.Stream) or not isinstance(stream, torch.Stream) or stream.device.type != "cuda":
        return stream  # type: ignore[return-value]  # whether it suits the tensors' device is asked before
    return torch.cuda.Stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )
