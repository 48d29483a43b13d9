"""Devices and stream order, in one place: on a GPU the current or the given stream, on a CPU nothing to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def ordinal_of(device: torch.device) -> int:
    """Return the number of a CUDA device in this process; one without a number is the current device."""
    return torch.cuda.current_device() if device.index is None else device.index


def as_cuda_stream(stream: torch.Stream) -> torch.cuda.Stream:
    """Return the CUDA stream that a `torch.Stream` of a CUDA device is: engines hand over these, which know less."""
    if isinstance(stream, torch.cuda.Stream) or not isinstance(stream, torch.Stream) or stream.device.type != "cuda":
        return stream  # type: ignore[return-value]  # whether it suits the tensors' device is asked before
    return torch.cuda.Stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )


@contextlib.contextmanager
def on_stream(device: torch.device, stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Enqueue what the block launches on `stream`; None means the current stream of `device`."""
    if device.type == "cpu":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield


def mark(device: torch.device, stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """Return an event that is done when all that was enqueued on `stream` is; None on a CPU, where all is done."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event()
    event.record(stream or torch.cuda.current_stream(device))
    return event


def synchronize(device: torch.device, stream: torch.cuda.Stream | None) -> None:
    """Wait until all that was enqueued on `stream` (None: the current stream of `device`) is done."""
    if device.type != "cpu":
        (stream or torch.cuda.current_stream(device)).synchronize()
