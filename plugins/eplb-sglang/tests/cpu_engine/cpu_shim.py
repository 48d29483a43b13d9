"""Stands in for what SGLang's EPLB finds on a GPU and not on a CPU, so that a real SGLang can run it on CPU ranks.

Test code only, a plugin of SGLang (`sglang.srt.plugins`). Nothing of what moves experts, or says where they are, is
replaced: the name of the device, the expert kernel (SGLang's own in torch takes no slots of other ranks), and functions
of streams that `torch.cpu` lacks. It also gives the scheduler what the tests ask of it beside serving.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch


def register() -> None:
    """Install the stand-ins; called by SGLang in every process."""
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.utils.common.get_device", lambda *_: "cpu", HookType.REPLACE)
    HookRegistry.register("sglang.srt.layers.moe.fused_moe_native.moe_forward_native", local_experts, HookType.REPLACE)
    torch.cpu.empty_cache = lambda: None  # type: ignore[attr-defined]
    torch.cpu.is_current_stream_capturing = lambda: False  # type: ignore[attr-defined]
    Scheduler.eplb_step = step


def local_experts(layer: Any, x: torch.Tensor, topk_output: Any, _config: Any) -> torch.Tensor:
    """Return what this rank's slots add to each token; slots of other ranks are numbered -1.

    Each token is multiplied by itself: in a product of several the roundings depend on how many there are, and that
    depends on which of an expert's slots each of them is sent to.
    """
    weights, slots, _ = topk_output
    added = torch.zeros_like(x)
    for token, column in (slots >= 0).nonzero().tolist():
        slot = int(slots[token, column])
        gate, up = torch.mv(layer.w13_weight[slot], x[token]).chunk(2)
        out = torch.mv(layer.w2_weight[slot], torch.nn.functional.silu(gate) * up)
        added[token] += out * weights[token, column]
    return added


# --- what the tests ask, by `Engine.collective_rpc` ------------------------------------------------------------------


def step(self: Any, path: str, name: str, arguments: list[Any]) -> None:
    """Do one step on this rank, and leave its answer in a file."""
    runner = self.tp_worker.model_runner
    answer = _STEPS[name](runner, *arguments)
    Path(f"{path}.{torch.distributed.get_rank()}").write_text(json.dumps(answer))


def _use(runner: Any, backend: str | None) -> None:
    """Let the next rearrangement make a communicator of this backend."""
    from eplb_sglang.plugin import installed

    hooks = installed()
    assert hooks is not None
    hooks.release()
    hooks.asked = dataclasses.replace(hooks.asked, backend=backend)


def _placement(runner: Any) -> list[list[int]]:
    """Return which expert each slot of all ranks holds, by layer, as SGLang on this rank sees it."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    return get_global_expert_location_metadata().physical_to_logical_map.tolist()  # type: ignore[no-any-return]


def _routed(runner: Any) -> list[list[list[int]]]:
    """Return the slots that the router may send each expert's tokens to, by layer, as this rank sees it."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata()
    return [
        [[slot for slot in slots if slot >= 0] for slots in layer]
        for layer in metadata.logical_to_all_physical_map.tolist()
    ]


def _hashes(runner: Any) -> list[list[str]]:
    """Return a hash of all bytes of each local slot, by layer."""
    layers = []
    for _, tensors in sorted(runner.model.routed_experts_weights_of_layer.items()):
        hashes = []
        for slot in range(tensors[0].shape[0]):
            digest = hashlib.sha256()
            for tensor in tensors:
                digest.update(tensor.detach()[slot].contiguous().view(torch.uint8).numpy().tobytes())
            hashes.append(digest.hexdigest())
        layers.append(hashes)
    return layers


def _begin(runner: Any, seed: int, layers_per_chunk: int | None) -> bool:
    """Begin a rearrangement as if the experts had random loads, the same on all ranks; return whether more is to do.

    With a number of layers, SGLang moves so many between two forward passes.
    """
    from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder

    recorder, manager = get_global_expert_distribution_recorder(), runner.eplb_manager
    random = torch.Generator().manual_seed(seed)
    shape = (4, len(_placement(runner)), runner.model_config.hf_config.num_experts)
    loads = torch.randint(0, 1000, shape, generator=random)
    recorder.dump_record = lambda output_mode: {
        "logical_count": loads,
        "average_utilization_rate_over_window": None,
    }
    manager._rebalance_layers_per_chunk = layers_per_chunk
    manager.under_way = manager.rebalance()
    try:
        more = _go_on(runner, 1)
    finally:
        del recorder.dump_record
    return more


def _go_on(runner: Any, steps: int) -> bool:
    """Go on with it; return whether more is to do."""
    return all(next(runner.eplb_manager.under_way, "done") != "done" for _ in range(steps))


def _by_itself(runner: Any, iterations: int) -> None:
    """Let SGLang rearrange by itself after so many forward passes, from the loads that it has recorded."""
    runner.eplb_manager._rebalance_num_iterations = iterations
    runner.eplb_manager._rebalance_layers_per_chunk = None
    runner.eplb_manager.reset_generator()


_STEPS = {
    "use": _use,
    "placement": _placement,
    "routed": _routed,
    "hashes": _hashes,
    "begin": _begin,
    "go_on": _go_on,
    "by_itself": _by_itself,
}
