"""The window that experts land in: how it is cut into parts, and the experts in a part, as views.

Views are kept, since rearrangements come back to the same places.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from eplb_core.contract.payload import Payload
from eplb_core.rearrange.weights import WORD, ExpertWeights
from eplb_core.scheduling.schedule import ALIGNMENT

_T = TypeVar("_T")

_MOST_PLACES = 1 << 13
"""How many places are kept, a few hundred bytes for each tensor of an expert: a window of 192 MiB has 40 for experts of
4.7 MB, but with layers of many sizes there may be any number."""


class StagedExperts:
    """The experts that lie in one part of a window.

    Args:
        weights: knows their sizes.
        part: uint8 `[bytes]`, beginning at a multiple of 8 bytes.
    """

    def __init__(self, weights: ExpertWeights, part: torch.Tensor) -> None:
        self._weights = weights
        self._part = part
        self._words = part[: len(part) // WORD * WORD].view(torch.int64)
        self._payloads: dict[tuple[int, int], tuple[Payload, ...]] = {}
        self._copied: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}

    def payloads(self, layer: int, offset: int) -> tuple[Payload, ...]:
        """Return the tensors of an expert of `layer` that lies at byte `offset`, each as uint8 `[bytes]`."""
        layout = self._weights.layers[layer]
        found = self._payloads.get((layout.form, offset))
        if found is None:
            starts = zip(layout.offsets, layout.rows, strict=True)
            found = tuple(
                Payload(self._part[offset + start : offset + start + rows.shape[1]]) for start, rows in starts
            )
            _keep(self._payloads, (layout.form, offset), found)
        return found

    def words(self, layer: int, offset: int) -> tuple[torch.Tensor, ...]:
        """Return the same for copies, in the dtypes of `ExpertWeights.slot_words`."""
        layout = self._weights.layers[layer]
        found = self._copied.get((layout.form, offset))
        if found is None:
            like = layout.words[0] if layout.words else ()
            found = tuple(self._view(offset + start, row) for start, row in zip(layout.offsets, like, strict=False))
            _keep(self._copied, (layout.form, offset), found)
        return found

    def _view(self, first: int, like: torch.Tensor) -> torch.Tensor:
        if like.dtype is torch.int64:
            return self._words[first // WORD : first // WORD + len(like)]
        return self._part[first : first + len(like)]


def _keep(places: dict[tuple[int, int], _T], at: tuple[int, int], views: _T) -> None:
    if len(places) >= _MOST_PLACES:
        places.clear()
    places[at] = views


def cut_window(window: torch.Tensor, largest_expert: int, count: int) -> list[torch.Tensor]:
    """Cut a window (uint8 `[bytes]`) into up to `count` equal parts, each large enough for one expert if it is itself.

    Args:
        window: the window.
        largest_expert: bytes of the largest expert as it lies in a window.
        count: the most parts.
    """
    needed = -(-largest_expert // ALIGNMENT) * ALIGNMENT
    count = max(1, min(count, len(window) // max(needed, 1)))
    part = len(window) // count // ALIGNMENT * ALIGNMENT if count > 1 else len(window)
    return [window[number * part : (number + 1) * part] for number in range(count)]
