"""Bytes that every rank can compute, on any device, so that no transport is compared with itself."""

from __future__ import annotations

import hashlib

import torch

_WORD = 8  # bytes of an int64
_STRIDE = 0x1E3779B97F4A7C15  # odd, so that all words of a tensor differ
_FACTOR = 0x2545F4914F6CDD1D


class Pattern:
    """Generates bytes that depend on a key of numbers and on their position.

    Args:
        most_bytes: the most bytes of one key.
        device: where the bytes are generated.
    """

    def __init__(self, most_bytes: int, device: torch.device) -> None:
        words = -(-most_bytes // _WORD)
        self._counter = torch.arange(words, dtype=torch.int64, device=device).mul_(_STRIDE)

    def row(self, nbytes: int, *key: int) -> torch.Tensor:
        """Return the first bytes of a key, uint8 `[nbytes]`."""
        name = "/".join(map(str, key)).encode()
        start = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)
        # A mixing function of the counter, in int64 arithmetic that wraps around, so any device can compute it.
        words = self._counter[: -(-nbytes // _WORD)] + start
        words ^= words >> 31
        words *= _FACTOR
        words ^= words >> 29
        return words.view(torch.uint8)[:nbytes]


def pattern(nbytes: int, device: torch.device, *key: int) -> torch.Tensor:
    """Return the first bytes of a key, uint8 `[nbytes]`, when only a few are needed."""
    return Pattern(nbytes, device).row(nbytes, *key)
