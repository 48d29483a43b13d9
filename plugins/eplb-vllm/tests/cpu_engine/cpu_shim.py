"""Stands in for what vLLM's EPLB finds on a GPU and not on a CPU, so that a real vLLM can run it on CPU ranks.

Test code only, a plugin of vLLM (`vllm.general_plugins`) and a worker class. Nothing of what moves experts is replaced:
the platform check, the routing kernel, the expert kernel's numbering of slots, streams and events.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch


def register() -> None:
    """Install the stand-ins; called by vLLM in every process."""
    import vllm.config.parallel as parallel

    if isinstance(parallel.current_platform, _CudaLike):
        return
    parallel.current_platform = _CudaLike(parallel.current_platform)
    use_stand_ins()


def use_stand_ins() -> None:
    """Let torch make our streams and events; vLLM's CPU runner leaves others of its own behind, which know less."""
    torch.Stream = _Stream  # type: ignore[misc, assignment]
    torch.Event = _Event  # type: ignore[misc, assignment]
    torch.accelerator.current_stream = lambda *_: _Stream()  # type: ignore[assignment]
    torch.accelerator.set_stream = lambda *_: None
    torch.accelerator.set_device_index = lambda *_: None
    torch.accelerator.current_accelerator = lambda *_: torch.device("cpu")  # type: ignore[assignment]


class _CudaLike:
    """A platform that says it is like CUDA, asked by `ParallelConfig` alone."""

    def __init__(self, platform: object) -> None:
        self._platform = platform

    def is_cuda_alike(self) -> bool:
        return True

    def __getattr__(self, name: str) -> object:
        return getattr(self._platform, name)


class _Stream:
    """A stream on which nothing is ever pending."""

    def __init__(self, *_: object, **__: object) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        """Return: nothing is pending."""

    def wait_stream(self, *_: object) -> None:
        """Return: nothing is pending."""


class _Event:
    """An event that has always happened."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def record(self, *_: object) -> None:
        """Return: it has happened."""

    def wait(self, *_: object) -> None:
        """Return: it has happened."""

    def synchronize(self) -> None:
        """Return: it has happened."""

    def elapsed_time(self, _: object) -> float:
        """Return no time."""
        return 0.0


def map_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """What vLLM's Triton kernel does: choose a copy of each expert by the token's number, and count the choices."""
    ids = topk_ids.long()
    tokens = torch.arange(ids.shape[0]).unsqueeze(1).expand_as(ids)
    copies = logical_replica_count[ids].clamp_min(1)
    physical = logical_to_physical_map[ids, ((tokens * 2654435769) & 0xFFFFFFFF) % copies]
    if bool(record_enabled):
        real = tokens < (ids.shape[0] if num_unpadded_tokens is None else int(num_unpadded_tokens))
        chosen = physical[real & (physical >= 0)]
        expert_load_view += torch.bincount(chosen, minlength=len(expert_load_view)).to(expert_load_view.dtype)
    return physical.to(topk_ids.dtype)


def local_apply(apply: Callable[..., None]) -> Callable[..., None]:
    """Return `CPUUnquantizedExperts.apply`, given local slot numbers and no weight on slots of other ranks."""
    signature = inspect.signature(apply)

    def wrapped(*arguments: object, **named: object) -> None:
        given = signature.bind(*arguments, **named).arguments
        expert_map = given["expert_map"]
        if isinstance(expert_map, torch.Tensor):
            local = expert_map[given["topk_ids"].long()]
            given["topk_weights"] = given["topk_weights"] * (local >= 0)
            given["topk_ids"] = local.clamp_min(0).to(given["topk_ids"].dtype)
        apply(**given)

    return wrapped


def patch_worker_process() -> None:
    """Replace the kernels and let the CPU's model runner make an `EplbState`; called by the worker."""
    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.model_executor.layers.fused_moe.router import base_router
    from vllm.model_executor.models.interfaces import is_mixture_of_experts
    from vllm.v1.worker import cpu_model_runner

    WeightTransferEngineFactory.register_engine("disk", "cpu_engine.disk_engine", "DiskEngine")
    base_router.eplb_map_to_physical_and_record = map_and_record
    cpu_moe.CPUUnquantizedExperts.apply = local_apply(cpu_moe.CPUUnquantizedExperts.apply)
    load_model = cpu_model_runner.CPUModelRunner.load_model

    def load(self: object, load_dummy_weights: bool = False) -> None:
        load_model(self, load_dummy_weights)
        use_stand_ins()
        model = self.get_model()  # type: ignore[attr-defined]
        assert is_mixture_of_experts(model)
        self._moe_model = model  # type: ignore[attr-defined]
        state = EplbState(self.parallel_config, self.device)  # type: ignore[attr-defined]
        state.device_index = 0
        self.eplb_state = state  # type: ignore[attr-defined]
        state.add_model(model, self.model_config)  # type: ignore[attr-defined]
        if state.is_async:
            state.start_async_loop()

    cpu_model_runner.CPUModelRunner.load_model = load
