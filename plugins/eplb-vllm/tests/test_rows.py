"""Rows of vLLM's tensors as their bytes lie in memory, and payloads found by address."""

from __future__ import annotations

import pytest
import torch
from eplb_vllm.rows import RowBook, as_bytes, in_memory_order

from eplb_core.errors import InputError


def test_transposed_rows_are_seen_in_memory_order() -> None:
    memory = torch.arange(2 * 3 * 4 * 5, dtype=torch.int32).view(2, 3, 4, 5)
    seen = in_memory_order(memory.permute(0, 3, 1, 2))
    assert seen.is_contiguous()
    assert torch.equal(seen.reshape(-1), memory.reshape(-1))
    assert seen.data_ptr() == memory.data_ptr()


def test_slots_may_be_apart_and_rows_may_not() -> None:
    apart = torch.zeros(4, 2, 6)[:, 1]
    assert in_memory_order(apart).data_ptr() == apart.data_ptr()
    with pytest.raises(InputError, match="gaps, or elements that share memory"):
        in_memory_order(torch.zeros(4, 6, 2)[:, :, 1])
    with pytest.raises(InputError, match="share memory"):
        in_memory_order(torch.zeros(4, 1, 6).expand(4, 5, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn])
def test_bytes_of_a_row_are_its_memory(dtype: torch.dtype) -> None:
    memory = torch.zeros(3, 4, 8, dtype=torch.uint8)
    row = as_bytes(memory.view(dtype).transpose(1, 2)[1])
    row.fill_(7)
    assert row.dtype == torch.uint8
    assert (memory[1] == 7).all()
    assert (memory[[0, 2]] == 0).all()


def test_known_rows_are_found_and_others_are_made() -> None:
    layer = [torch.zeros(3, 4, 2).transpose(1, 2), torch.zeros(3)]
    book = RowBook([layer])
    found = book.find([tensor[2] for tensor in layer])
    assert book.find([tensor[2] for tensor in layer]) is found
    assert [payload.nbytes for payload in found] == [32, 4]
    whole = book.find([layer[1]])  # begins where a row does, and is another tensor
    assert [payload.nbytes for payload in whole] == [12]
    assert book.find([torch.zeros(5)])[0].nbytes == 20
