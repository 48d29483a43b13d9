"""Reads the registered tensors of a lost rank from its memory, which stays mapped here when the process ends."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import numpy as np
import torch

from eplb_core.errors import InputError, TransferTimeoutError
from eplb_cuda_ipc.mapped import Mapped
from eplb_cuda_ipc.memory import Copies, Mark, Memory, MemoryMapError
from eplb_cuda_ipc.messages import Tensor

_PATIENCE_S = 10.0  # for copies at the memory's rate
_NAP_S = 30e-6


class Rescue:
    """The registered tensors of a lost rank; made by `CudaIpcCommunicator.rescue`, for use in a `with` block.

    Leaving the block unmaps that rank's memory, which is freed once no other process maps it either.

    Args:
        memory: this rank's.
        device: where rescued tensors go.
        rank: the lost rank.
        mapped: its memory.
    """

    def __init__(self, memory: Memory, device: torch.device, rank: int, mapped: Mapped) -> None:
        self.rank = rank
        self._memory = memory
        self._device = device
        self._mapped = mapped

    def __enter__(self) -> Self:
        """Return this object."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Unmap the rank's memory."""
        self._mapped.let_go()

    def __len__(self) -> int:
        """Return how many tensors of the rank this one knows."""
        return len(self._mapped.tensors)

    def tensor(self, index: int, row: int | None = None) -> torch.Tensor:
        """Return a copy of a registered tensor, or of one of its rows (of one slot, where it is a layer's weights).

        Args:
            index: its number, counted over all calls of `register` on that rank.
            row: index in its first dimension; None for the whole tensor.

        Raises:
            InputError: there is no such tensor or row, or its memory is not mapped.
            TransferTimeoutError: the copy did not end.
        """
        if not 0 <= index < len(self):
            raise InputError(
                f"rank {self.rank} has registered no tensor {index}", why=f"this rank knows of {len(self)} tensors"
            )
        tensor = self._mapped.tensors[index]
        if row is not None and not (tensor.shape and 0 <= row < tensor.shape[0]):
            raise InputError(f"tensor {index} of rank {self.rank} has no row {row}", why=f"its shape is {tensor.shape}")
        dtype = getattr(torch, tensor.dtype)
        target = torch.empty(tensor.shape if row is None else tensor.shape[1:], dtype=dtype, device=self._device)
        if target.nbytes:
            rows = list(target.unbind(0)) if row is None and tensor.shape else [target]
            first = tensor.offset + (row or 0) * tensor.stride
            self._copy(index, tensor, rows, [first + number * tensor.stride for number in range(len(rows))])
        return target

    def _copy(self, index: int, tensor: Tensor, rows: list[torch.Tensor], offsets: list[int]) -> None:
        nbytes = np.array([row.nbytes for row in rows], np.int64)
        try:
            sources = self._mapped.addresses(np.full(len(rows), tensor.region), np.array(offsets, np.int64), nbytes)
        except (ValueError, MemoryMapError) as error:
            raise InputError(
                f"tensor {index} of rank {self.rank} cannot be rescued",
                why="its memory could not be mapped" if tensor.region < 0 else str(error),
            ) from error
        targets = np.array([row.data_ptr() for row in rows], np.int64)
        # The previous user of the target's memory may still be using it, on the engine's stream.
        self._await(self._memory.end_of(None))
        # The memory may be unmapped as soon as this returns.
        self._await(self._memory.copy(Copies(targets, sources, nbytes).merged()))

    def _await(self, mark: Mark) -> None:
        ends = time.monotonic() + _PATIENCE_S
        while not mark.query():
            if time.monotonic() > ends:
                raise TransferTimeoutError(
                    f"copies out of the memory of rank {self.rank} did not end within {_PATIENCE_S:g} s",
                    peers=[self.rank],
                    phase="rescue",
                )
            time.sleep(_NAP_S)
