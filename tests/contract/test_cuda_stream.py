"""Streams that engines hand over: a `torch.Stream` of a CUDA device is the CUDA stream of the same number."""

from __future__ import annotations

import pytest
import torch

from eplb_core.contract.cuda_stream import as_cuda_stream


@pytest.mark.gpu
def test_a_plain_stream_becomes_the_cuda_stream_that_it_is() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    plain = torch.Stream(device=torch.device("cuda", 0))
    stream = as_cuda_stream(plain)
    assert isinstance(stream, torch.cuda.Stream)
    assert (stream.stream_id, stream.device) == (plain.stream_id, plain.device)
    assert as_cuda_stream(stream) is stream
