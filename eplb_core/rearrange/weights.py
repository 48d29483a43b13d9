"""The expert weights of one rank, seen as bytes: which rows belong to an expert, and how it lies in a window."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eplb_core.arrays import IntArray
from eplb_core.contract.payload import Payload
from eplb_core.errors import InputError

_ALIGNMENT = 16  # bytes; every dtype's rows stay aligned inside a window
WORD = 8
"""Bytes that copies on a device move at a time."""


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One layer.

    Attributes:
        rows: its tensors as uint8 `[slots, bytes of a row]`.
        offsets: each one's offset in a staged expert, in bytes.
        payloads: for each slot its row of every tensor; made once, since making views costs more than using them.
        words: the same for copies, as int64 where a row's bytes and places allow that; a GPU copies words faster.
        form: a number; layers whose experts look alike in a window have the same.
    """

    rows: tuple[torch.Tensor, ...]
    offsets: tuple[int, ...]
    payloads: tuple[tuple[Payload, ...], ...]
    words: tuple[tuple[torch.Tensor, ...], ...]
    form: int


class ExpertWeights:
    """The local slots of every layer.

    Args:
        weights: `weights[layer][tensor]`, first dimension = local slots; any further shape, any dtype, layers may
            differ. A row, one slot of one tensor, must be without gaps in memory, in any order of its dimensions; the
            tensor need not be.

    Raises:
        InputError: no layers, no tensors, different slot counts or devices, rows that are not contiguous, or rows that
            share memory with others; it names the layer and the tensor.
    """

    def __init__(self, weights: Sequence[Sequence[torch.Tensor]]) -> None:
        if not weights or not all(len(layer) for layer in weights):
            raise InputError("weights must hold at least one layer, and every layer at least one tensor")
        first = weights[0][0]
        _check_kind(first, "layer 0, tensor 0")
        self._by_layer = [list(layer) for layer in weights]
        self.tensors = [tensor for layer in weights for tensor in layer]
        self.device = first.device
        self.num_slots = first.shape[0] if first.dim() else 0
        self._forms: dict[tuple[tuple[int, torch.dtype], ...], int] = {}
        self.layers = [self._layout(number, layer) for number, layer in enumerate(weights)]
        self._refuse_shared_memory()
        self._places = [tensor.data_ptr() for tensor in self.tensors]
        self.expert_bytes: IntArray = np.array(
            [sum(_aligned(row.shape[1]) for row in layer.rows) for layer in self.layers], np.int64
        )
        """Bytes that one expert of each layer takes in a window, int64 `[layers]`."""
        self.payload_bytes: IntArray = np.array(
            [sum(row.shape[1] for row in layer.rows) for layer in self.layers], np.int64
        )
        """Bytes of one expert of each layer, int64 `[layers]`."""

    def slot(self, layer: int, slot: int) -> tuple[torch.Tensor, ...]:
        """Return the tensors of one slot, each as uint8 `[bytes]`, as views."""
        return tuple(payload.tensor for payload in self.payloads(layer, slot))

    def write(self, layer: int, slot: int, tensors: Sequence[torch.Tensor], what: str) -> None:
        """Copy the tensors of one expert into a slot, on the current stream.

        Args:
            layer: which layer.
            slot: which local slot.
            tensors: one for each of the layer's tensors, of a row's shape and dtype, on any device.
            what: what they are, for messages.

        Raises:
            InputError: their number, a shape or a dtype is wrong. Nothing was written then.
        """
        targets = [tensor[slot].detach() for tensor in self._by_layer[layer]]
        where = f"{what} of layer {layer}"
        if len(tensors) != len(targets):
            raise InputError(f"{len(tensors)} tensors instead of {len(targets)}", where=where)
        for number, (tensor, target) in enumerate(zip(tensors, targets, strict=True)):
            if tensor.shape != target.shape or tensor.dtype != target.dtype:
                raise InputError(
                    f"tensor {number} is {tuple(tensor.shape)} of {tensor.dtype}, "
                    f"a slot's is {tuple(target.shape)} of {target.dtype}",
                    where=where,
                )
        for tensor, target in zip(tensors, targets, strict=True):
            target.copy_(tensor.detach())

    def payloads(self, layer: int, slot: int) -> tuple[Payload, ...]:
        """Return the tensors of one slot as they are sent and received, each as uint8 `[bytes]`."""
        return self.layers[layer].payloads[slot]

    def slot_words(self, layer: int, slot: int) -> tuple[torch.Tensor, ...]:
        """Return the tensors of one slot for copies, as views: int64 `[words]` where that is possible, else uint8."""
        return self.layers[layer].words[slot]

    @functools.cached_property
    def description(self) -> str:
        """What must be the same on every rank: bytes, dtypes and order in memory of each layer's tensors."""
        tensors = iter(self.tensors)
        layers = [
            # The rows come first: zip then takes no tensor too many.
            " + ".join(
                f"{row.shape[1]} B {tensor.dtype}{_order_of(tensor)}"
                for row, tensor in zip(layer.rows, tensors, strict=False)
            )
            for layer in self.layers
        ]
        return f"{self.num_slots} slots, " + "; ".join(layers)

    def check_places(self) -> None:
        """Raise if a tensor has other memory than at first, as after `parameter.data = ...`.

        Raises:
            InputError: it names the layer and the tensor.
        """
        places = [tensor.data_ptr() for tensor in self.tensors]
        if places == self._places:
            return
        for number, (now, at_first) in enumerate(zip(places, self._places, strict=True)):
            if now != at_first:
                layers = [(n, i) for n, layer in enumerate(self._by_layer) for i in range(len(layer))]
                layer, index = layers[number]
                raise InputError(
                    "a tensor has other memory than when the rearranger was made",
                    where=f"layer {layer}, tensor {index}",
                    why="experts would be moved in memory that the engine does not read any more",
                    remedy="make a new Rearranger, on all ranks",
                )

    def _refuse_shared_memory(self) -> None:
        """Raise if any two rows have a byte in common: what is received for one would end up in the other."""
        rows = [rows for layer in self.layers for rows in layer.rows]
        widths = np.array([row.shape[1] for row in rows], np.int64)
        begins = [np.arange(self.num_slots) * row.stride(0) + row.data_ptr() for row in rows]
        begin, tensor = np.concatenate(begins), np.repeat(np.arange(len(rows)), self.num_slots)
        kept = widths[tensor] > 0
        begin, tensor = begin[kept], tensor[kept]
        order = np.argsort(begin, kind="stable")
        begin, tensor = begin[order], tensor[order]
        shared = np.flatnonzero(begin[:-1] + widths[tensor[:-1]] > begin[1:])
        if len(shared):
            alone = shared[tensor[shared] == tensor[shared + 1]]
            found = int((alone if len(alone) else shared)[0])
            names = [f"layer {n}, tensor {i}" for n, layer in enumerate(self.layers) for i in range(len(layer.rows))]
            one, other = sorted(tensor[[found, found + 1]].tolist())
            raise InputError(
                "slots lie on top of one another" if one == other else "two tensors share memory",
                where=names[one] if one == other else f"{names[one]} and {names[other]}",
                why="what is received for one would overwrite the other",
                remedy="give every slot of every tensor memory of its own; tied tensors need to be given once",
            )

    def _layout(self, number: int, layer: Sequence[torch.Tensor]) -> LayerLayout:
        rows = []
        for index, tensor in enumerate(layer):
            where = f"layer {number}, tensor {index}"
            _check_kind(tensor, where)
            where += f", shape {tuple(tensor.shape)}"
            if tensor.dim() == 0 or tensor.shape[0] != self.num_slots:
                raise InputError(
                    "the first dimension must be the local slots", where=where, why=f"the first has {self.num_slots}"
                )
            if tensor.device != self.device:
                raise InputError("all weights must lie on one device", where=where, why=f"{tensor.device}")
            if self.num_slots and not _is_dense(tensor[0]):
                raise InputError(
                    "a slot's row has gaps",
                    where=where,
                    why=f"strides {tuple(tensor.stride())}",
                    remedy="give a view of the same memory whose rows have none; a copy would be moved in its place",
                )
            rows.append(_rows_as_bytes(tensor))
        starts = np.cumsum([0] + [_aligned(row.shape[1]) for row in rows])
        slots = zip(*(row.unbind(0) for row in rows), strict=True)
        payloads = tuple(tuple(map(Payload, tensors)) for tensors in slots)
        words = tuple(zip(*(_as_words(row).unbind(0) for row in rows), strict=True))
        form = tuple((row.shape[1], word.dtype) for row, word in zip(rows, words[0] if words else rows, strict=True))
        number = self._forms.setdefault(form, len(self._forms))
        return LayerLayout(tuple(rows), tuple(int(start) for start in starts[:-1]), payloads, words, number)


def _check_kind(tensor: object, where: str) -> None:
    """Raise if something is no plain tensor with memory of its own."""
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"a {type(tensor).__name__} instead of a torch tensor", where=where)
    kind = type(tensor).__name__
    remedy = "give the tensors that hold its bytes"
    if callable(getattr(tensor, "to_local", None)):
        raise InputError(f"a {kind} is spread over ranks", where=where, remedy="give this rank's part, .to_local()")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        what = "a quantised tensor" if tensor.is_quantized else f"a tensor of layout {tensor.layout}"
        raise InputError(f"{what} has no rows of bytes", where=where, remedy=remedy)
    if tensor.device.type == "meta":
        raise InputError("a tensor on the meta device has no bytes", where=where)
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # a wrapper, which has no memory itself
        raise InputError(f"a {kind} wraps other tensors", where=where, remedy=remedy)


def _is_dense(row: torch.Tensor) -> bool:
    """Whether a row has no gaps in memory, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(row.stride(), row.shape, strict=True) if size != 1
    ):
        if stride != expected:
            return not row.numel()
        expected *= size
    return True


def _order_of(tensor: torch.Tensor) -> str:
    """Return how rows lie in memory, unless their last dimension is the innermost."""
    if not tensor.shape[0] or tensor[0].is_contiguous():
        return ""
    return f" with strides {tuple(tensor.stride()[1:])}"


def _rows_as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of `tensor`, `[slots, ...]`, as uint8 `[slots, bytes of a row]`."""
    slots = tensor.shape[0]
    width = tensor[0].numel() if slots else 0
    flat = tensor.as_strided((slots, width), (tensor.stride(0), 1))
    return flat.view(torch.uint8)


def _as_words(rows: torch.Tensor) -> torch.Tensor:
    """Return uint8 `[slots, bytes of a row]` as int64 `[slots, words of a row]`, or as it is where that cannot be."""
    places = (rows.data_ptr(), rows.storage_offset(), rows.stride(0), rows.shape[1])
    return rows if not rows.numel() or any(place % WORD for place in places) else rows.view(torch.int64)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
