"""Replaces two functions of vLLM wherever they have been imported: the factory, and the rearrangement of all layers."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final

import torch

from eplb_core import create_eplb_communicator
from eplb_vllm import choice, engine_config, policy, refresh, signatures
from eplb_vllm.communicator import PluginCommunicator, engine_class, mapped_placements
from eplb_vllm.engine_log import log, share_handlers
from eplb_vllm.rows import in_memory_order

START_TIMEOUT_S: Final = 600.0
"""How long the ranks wait for one another to make a communicator, unless the config string sets it, in seconds: some
may load their weights minutes longer than others."""


def replace_everywhere(name: str, replacement: Callable[..., Any], original: Callable[..., Any]) -> int:
    """Bind `name` to `replacement` in each loaded vLLM module that binds it to `original`; return how many did."""
    replacement.__eplb_original__ = original  # type: ignore[attr-defined]
    count = 0
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("vllm.") and vars(module).get(name) is original:
            setattr(module, name, replacement)
            count += 1
    return count


def install_factory(module: ModuleType) -> None:
    """Replace `create_eplb_communicator`: backends of eplb are made here, all others by the original.

    Args:
        module: `vllm.distributed.eplb.eplb_communicator`.
    """
    original = module.create_eplb_communicator
    if hasattr(original, "__eplb_original__"):
        return
    communicator_class = engine_class(module.EplbCommunicator)

    @functools.wraps(original)
    def create(
        group_coordinator: Any,
        backend: str | None,
        expert_weights: Sequence[Sequence[torch.Tensor]],
        expert_buffer: Sequence[torch.Tensor],
    ) -> Any:
        chosen = choice.choose(backend, engine_config.engine_names())
        if chosen is None or not expert_weights:
            return original(group_coordinator, backend, expert_weights, expert_buffer)
        return _create(communicator_class, group_coordinator, chosen, expert_weights, expert_buffer)

    replace_everywhere("create_eplb_communicator", create, original)


def install_rearrangement(module: ModuleType) -> None:
    """Replace `rearrange_expert_weights_inplace`: with a communicator of ours all layers move together.

    Args:
        module: `vllm.distributed.eplb.rebalance_execute`.
    """
    original = module.rearrange_expert_weights_inplace
    if hasattr(original, "__eplb_original__"):
        return

    @functools.wraps(original)
    def rearrange(
        old_global_expert_indices: torch.Tensor,
        new_global_expert_indices: torch.Tensor,
        expert_weights: Sequence[Sequence[torch.Tensor]],
        expert_buffer: Sequence[torch.Tensor],
        ep_group: Any,
        communicator: Any,
        is_profile: bool = False,
        rank_mapping: dict[int, int] | None = None,
    ) -> None:
        if is_profile or not isinstance(communicator, PluginCommunicator):
            original(
                old_global_expert_indices,
                new_global_expert_indices,
                expert_weights,
                expert_buffer,
                ep_group,
                communicator,
                is_profile,
                rank_mapping,
            )
            return
        old, new = mapped_placements(
            old_global_expert_indices, new_global_expert_indices, rank_mapping, ep_group.size(), module
        )
        result = communicator.rearrange(old.cpu().numpy(), new.cpu().numpy())
        if ep_group.rank() == 0:
            log.info(
                "eplb moved %d experts (%.1f MB) between ranks in %.3f s, %d steps",
                result.moved,
                result.bytes_moved / 1e6,
                result.seconds,
                result.steps,
            )

    replace_everywhere("rearrange_expert_weights_inplace", rearrange, original)


def _create(
    communicator_class: type[PluginCommunicator],
    group_coordinator: Any,
    chosen: choice.Choice,
    expert_weights: Sequence[Sequence[torch.Tensor]],
    expert_buffer: Sequence[torch.Tensor],
) -> PluginCommunicator:
    share_handlers()
    began = time.perf_counter()
    moves_beside_inference = engine_config.moves_beside_inference()
    made = create_eplb_communicator(
        group_coordinator,
        chosen.config,
        [in_memory_order(tensor) for tensor in expert_weights[0]],
        arguments=choice.patience(chosen.config, START_TIMEOUT_S),
    )
    try:
        communicator = communicator_class(
            made, expert_weights, expert_buffer, all_layers_at_once=moves_beside_inference is False
        )
    except BaseException:
        made.close()
        raise
    if group_coordinator.rank_in_group == 0:
        nbytes = sum(tensor.nbytes for layer in expert_weights for tensor in layer)
        log.info(
            "eplb moves the experts: %s (from %s), %d ranks, %d layers of %d slots, %.1f MB a rank, %s; made in %.2f s",
            made.binding.config,
            chosen.origin,
            group_coordinator.world_size,
            len(expert_weights),
            expert_weights[0][0].shape[0],
            nbytes / 1e6,
            "beside inference" if moves_beside_inference else "all layers at once",
            time.perf_counter() - began,
        )
    return communicator


install_policy = policy.install
install_refresh = refresh.install


def expected(module: ModuleType) -> bool:
    """Return whether a module of vLLM is as this plugin expects it; if not, log that once."""
    unknown = signatures.differences(module)
    if unknown:
        engine_config.leave_alone("; ".join(unknown))
    return not unknown
