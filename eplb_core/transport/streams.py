"""Devices and stream order: on a GPU the current or the given stream, on a CPU nothing to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def ordinal_of(device: torch.device) -> int:
    """Return the number of a CUDA device in this process; a device without a number is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


@contextlib.contextmanager
def on_stream(device: torch.device, stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Enqueue the block's work on `stream`; None means the current stream of `device`."""
    if device.type == "cpu":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield


def mark(device: torch.device, stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """Return an event that completes after all work enqueued on `stream`; None on a CPU, where nothing is pending."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event()
    event.record(stream or torch.cuda.current_stream(device))
    return event


def synchronize(device: torch.device, stream: torch.cuda.Stream | None) -> None:
    """Wait for all work enqueued on `stream` (None: the current stream of `device`)."""
    if device.type != "cpu":
        (stream or torch.cuda.current_stream(device)).synchronize()
