"""The shape of expert weights, and the interface of their sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of one expert.

    Attributes:
        name: its role in the layer, such as `w13` or `w2.weight_scale_inv`.
        shape: of one expert's tensor; a rank holds it as `[local slots, *shape]`.
        dtype: the name of a torch dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of that name."""
        import torch

        dtype = getattr(torch, self.dtype)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"torch.{self.dtype} is not a dtype")
        return dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one expert's tensor."""
        count = self.torch_dtype.itemsize
        for extent in self.shape:
            count *= extent
        return count


class ExpertSource(Protocol):
    """A source of expert weights. Layers are MoE layers, counted from 0.

    All ranks get the same bytes for the same layer and expert, so that a rank can check what it received from others.
    """

    @property
    def num_layers(self) -> int:
        """How many MoE layers there are."""
        ...

    @property
    def num_experts(self) -> int:
        """How many logical experts each of them has."""
        ...

    def tensor_specs(self, layer: int) -> tuple[TensorSpec, ...]:
        """Return the tensors of one expert of the layer."""
        ...

    def expert_tensors(self, layer: int, expert: int) -> list[torch.Tensor]:
        """Return the CPU tensors of one expert, as `tensor_specs(layer)` describes them."""
        ...
