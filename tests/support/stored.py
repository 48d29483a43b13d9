"""Checkpoints written byte by byte, with no help of torch or safetensors, which remember whose each byte is."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

BITS = {
    "F4": 4,
    "F64": 64,
    "C64": 64,
    "U64": 64,
    "F32": 32,
    "U32": 32,
    "I32": 32,
    "F16": 16,
    "BF16": 16,
    "U16": 16,
    "I16": 16,
}


@dataclass
class Stored:
    """A checkpoint in the making. Every tensor has random bytes.

    Attributes:
        tensors: name -> dtype, shape, bytes.
        expected: (layer, expert) -> what must be found: name of the tensor -> bytes.
    """

    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = field(default_factory=dict)
    expected: dict[tuple[int, int], dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(3))

    def content(self, dtype: str, shape: tuple[int, ...]) -> bytes:
        return self.random.bytes(math.prod(shape) * BITS.get(dtype, 8) // 8)

    def add(self, name: str, dtype: str = "BF16", shape: tuple[int, ...] = (4, 4)) -> None:
        """Add a tensor that is no expert's."""
        self.tensors[name] = (dtype, shape, self.content(dtype, shape))

    def numbered(
        self, template: str, layers: range, parts: dict[str, tuple[str, tuple[int, ...]]], experts: int = 8
    ) -> None:
        """Add tensors of their own for each expert; `{l}`, `{e}` and `{p}` stand for layer, expert and part."""
        for layer in layers:
            for expert in range(experts):
                for part, (dtype, shape) in parts.items():
                    content = self.content(dtype, shape)
                    self.tensors[template.format(l=layer, e=expert, p=part)] = (dtype, shape, content)
                    self.expected[layer, expert][part.removesuffix(".weight")] = content

    def fused(
        self, template: str, layers: range, parts: dict[str, tuple[str, tuple[int, ...]]], experts: int = 8
    ) -> None:
        """Add tensors `[experts, *shape]`."""
        self._together(template, layers, parts, experts, stacked=True)

    def joined(
        self, template: str, layers: range, parts: dict[str, tuple[str, tuple[int, ...]]], experts: int = 8
    ) -> None:
        """Add tensors `[experts * shape[0], *shape[1:]]`."""
        self._together(template, layers, parts, experts, stacked=False)

    def _together(
        self,
        template: str,
        layers: range,
        parts: dict[str, tuple[str, tuple[int, ...]]],
        experts: int,
        *,
        stacked: bool,
    ) -> None:
        for layer in layers:
            for part, (dtype, shape) in parts.items():
                rows = [self.content(dtype, shape) for _ in range(experts)]
                whole = (experts, *shape) if stacked else (experts * shape[0], *shape[1:])
                self.tensors[template.format(l=layer, p=part)] = (dtype, whole, b"".join(rows))
                for expert, row in enumerate(rows):
                    self.expected[layer, expert][part.removesuffix(".weight")] = row

    def write(self, directory: Path, config: dict[str, Any] | None = None, name: str = "config.json") -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor, (dtype, shape, content) in self.tensors.items():
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(content)]}
            offset += len(content)
        text = json.dumps(header).encode()
        contents = b"".join(content for _, _, content in self.tensors.values())
        (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + contents)
        if config is not None:
            (directory / name).write_text(json.dumps(config))
        return directory
