"""The workloads that are measured on several GPUs, for any number of ranks, and small ones of the same kinds."""

from __future__ import annotations

from dataclasses import dataclass

import make_workload

from eplb_core.bench.workload import Workload

_EXPERTS, _HIDDEN, _INTERMEDIATE, _BLOCK, _REDUNDANT = 256, 7168, 2048, 128, 32


@dataclass(frozen=True)
class Size:
    """A workload but for the number of ranks.

    Attributes:
        name: what it is called in the table.
        layers: how many.
        slots: of a rank in a layer; 0 for as many as the experts of DeepSeek-V3 and its redundant ones take.
        redundant: slots of a layer, of all ranks, that hold a further copy.
        expert_bytes: about the bytes of an expert; 0 for those of DeepSeek-V3.
        steps: rearrangements.
        swaps: how many times a step lets two ranks exchange an expert, over all layers; None for all slots anew.
        scale: by what DeepSeek-V3's numbers are divided.
    """

    name: str
    layers: int
    slots: int = 0
    redundant: int = 0
    expert_bytes: int = 0
    steps: int = 6
    swaps: int | None = None
    scale: int = 1

    def workload(self, ranks: int) -> Workload:
        """Return it for so many ranks."""
        slots, redundant, tensors = self.slots, self.redundant, None
        if not slots:
            experts = _EXPERTS // self.scale
            slots = -(-(experts + _REDUNDANT // self.scale) // ranks)
            redundant, tensors = slots * ranks - experts, deepseek_tensors(self.scale)
        arrays = make_workload.make(
            ranks, self.layers, slots, redundant, self.expert_bytes or 384, self.steps, 1.0, 0, self.swaps
        )
        return Workload(arrays["placements"], tensors or tuple(map(int, arrays["tensor_bytes"])), ranks)


def deepseek_tensors(scale: int) -> tuple[int, ...]:
    """Return the bytes of one expert of DeepSeek-V3: gate, up and down in fp8, and their float32 block scales."""
    rows, columns = _INTERMEDIATE // scale, _HIDDEN // scale
    scales = 4 * -(-rows // _BLOCK) * -(-columns // _BLOCK)
    return (rows * columns,) * 3 + (scales,) * 3


MOST_SWAPS = 20
_SWAPS = {"nothing": 0, "1 swap": 1, "20 swaps": MOST_SWAPS}
"""What a balancer that keeps most of a placement asks for, over all layers of a model."""

SIZES = {
    "cuda": (
        Size("44 MB", layers=8, slots=16, redundant=8, expert_bytes=44_040_192),
        Size("4.7 MB", layers=16, slots=32, redundant=16, expert_bytes=4_718_592),
        # Four of its 58 layers: all of them, on 2 GPUs, would be 368 GB on each.
        Size("DeepSeek-V3", layers=4, steps=4),
        *(
            Size(name, layers=58, slots=32, redundant=16, expert_bytes=4_718_592, steps=21, swaps=swaps)
            for name, swaps in _SWAPS.items()
        ),
    ),
    "cpu": (
        Size("44 MB", layers=3, slots=4, redundant=2, expert_bytes=1_376_256, steps=3),
        Size("4.7 MB", layers=4, slots=8, redundant=4, expert_bytes=147_456, steps=3),
        Size("DeepSeek-V3", layers=2, steps=3, scale=16),
        *(
            Size(name, layers=58, slots=8, redundant=4, expert_bytes=147_456, steps=21, swaps=swaps)
            for name, swaps in _SWAPS.items()
        ),
    ),
}
