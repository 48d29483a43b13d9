"""Checksums of tensors, computed on their device, that detect changed, missing, shifted and swapped bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from eplb_core.arrays import IntArray

_COLUMNS = 1024  # words per row; a word is 8 bytes
_BLOCK = 4096  # bytes of a sampled block
_BLOCKS = 64  # sampled in one message, including the first and the last
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as a signed number: spreads the weights


def checksums(messages: Sequence[torch.Tensor], *, sample: bool) -> IntArray:
    """Return one number per message, int64 `[messages]`, equal on both sides if the bytes are.

    The words of a message are arranged in rows of 1024; the sum of each row and column has a different weight, modulo
    2^64. Waits for the current stream.

    Args:
        messages: uint8 `[bytes]` tensors on one device, each with at least one byte.
        sample: read 64 blocks of 4 KiB of each message instead of all of it.
    """
    if not messages:
        return np.empty(0, np.int64)
    return torch.stack([_checksum(_sampled(m) if sample else m) for m in messages]).cpu().numpy()


def _checksum(message: torch.Tensor) -> torch.Tensor:
    whole = len(message) // (8 * _COLUMNS) * (8 * _COLUMNS)
    total = torch.full((), len(message), dtype=torch.int64, device=message.device)
    if whole:
        total = total + _weighted(_words(message[:whole]).view(-1, _COLUMNS), 1)
    if whole < len(message):
        tail = torch.zeros(8 * _COLUMNS, dtype=torch.uint8, device=message.device)
        tail[: len(message) - whole] = message[whole:]
        total = total + _weighted(tail.view(torch.int64).view(1, _COLUMNS), 3)
    return total


def _weighted(words: torch.Tensor, salt: int) -> torch.Tensor:
    """Return one number for int64 words `[rows, columns]`.

    A word counts with the sum of its row's and its column's weight. That must be odd, or changes of a word's highest
    bits vanish modulo 2^64; so rows have even weights and columns odd ones.
    """
    rows, columns = words.sum(1), words.sum(0)
    return (rows * (_odd_weights(len(rows), salt, words.device) - 1)).sum() + (
        columns * _odd_weights(len(columns), salt + 1, words.device)
    ).sum()


def _odd_weights(count: int, salt: int, device: torch.device) -> torch.Tensor:
    index = torch.arange(1, count + 1, dtype=torch.int64, device=device)
    mixed = (index + salt * 1_000_003) * _ODD
    return (mixed ^ (mixed >> 29)) | 1


def _words(message: torch.Tensor) -> torch.Tensor:
    aligned = message.storage_offset() % 8 == 0 and message.data_ptr() % 8 == 0
    return (message if aligned else message.clone()).view(torch.int64)


def _sampled(message: torch.Tensor) -> torch.Tensor:
    if len(message) <= _BLOCK * _BLOCKS:
        return message
    last = len(message) - _BLOCK
    spread = message.as_strided((_BLOCKS - 1, _BLOCK), (last // (_BLOCKS - 1), 1))  # one operation for all but the last
    return torch.cat([spread.reshape(-1), message[last:]])
