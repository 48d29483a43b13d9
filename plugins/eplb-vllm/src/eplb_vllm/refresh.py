"""Puts experts where the router looks for them after a refresh of the weights.

vLLM loads weights by its initial map, as if no expert had ever moved. Once EPLB has moved some, a refresh (in
reinforcement learning, or `reload_weights`) writes experts into slots that the router uses for others. So experts move
back to the loader's slots before a refresh, and to the router's slots after it; the others are right either way.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Final

import torch

from eplb_vllm.engine_log import log

VARIABLE: Final = "EPLB_VLLM_REFRESH"
"""The environment variable that states how much a refresh writes: `parts` (default: any experts, or none), `whole`
(every expert, every time, so that nothing must move back before it), or `off` (leave refreshes to vLLM)."""

PARTS, WHOLE, OFF = "parts", "whole", "off"


def mode() -> str:
    """Return how much a refresh writes.

    Raises:
        ValueError: the variable holds anything else.
    """
    text = os.environ.get(VARIABLE) or PARTS
    if text not in (PARTS, WHOLE, OFF):
        raise ValueError(f"{VARIABLE} is {text!r}; it must be {PARTS}, {WHOLE} or {OFF}")
    return text


def install(module: ModuleType) -> None:
    """Wrap the refreshing methods of vLLM's worker.

    Args:
        module: `vllm.v1.worker.gpu_worker`.
    """
    worker = module.Worker
    if hasattr(worker._start_weight_update, "__eplb_original__") or mode() == OFF:
        return
    _wrap(worker, "_start_weight_update", _started)
    _wrap(worker, "update_weights", _updated)
    _wrap(worker, "finish_weight_update", _finished)
    _wrap(worker, "reload_weights", _reloaded)


def _wrap(worker: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(worker, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(self, functools.partial(original, self, *args, **kwargs))

    method.__eplb_original__ = original  # type: ignore[attr-defined]
    setattr(worker, name, method)


def _started(worker: Any, start: Callable[[], Any]) -> Any:
    if worker._weight_update_active:
        return start()  # which refuses
    _before(worker)
    try:
        return start()
    except BaseException:
        _after(worker, complete=False)
        raise


def _updated(worker: Any, update: Callable[[], Any]) -> Any:
    try:
        return update()
    except BaseException:
        if not worker._weight_update_active:  # vLLM has ended the refresh
            _after(worker, complete=False)
        raise


def _finished(worker: Any, finish: Callable[[], Any]) -> Any:
    was_active = worker._weight_update_active
    answer = finish()
    if was_active:
        _after(worker)
    return answer


def _reloaded(worker: Any, reload: Callable[[], Any]) -> Any:
    _before(worker)
    try:
        answer = reload()
    except BaseException:
        _after(worker, complete=False)
        raise
    _after(worker)
    return answer


def _before(worker: Any) -> None:
    """Stop moving experts, and move them to where the loader expects them."""
    state = _state(worker)
    if state is None:
        return
    state.drain_async()
    worker.model_runner.eep_eplb_suppressed = True
    if mode() == PARTS:
        for model_state, initial, current in _moved(state):
            _rearrange(model_state, current, initial)


def _after(worker: Any, *, complete: bool = True) -> None:
    """Move experts to where the router looks for them, and let vLLM move them again.

    Args:
        worker: vLLM's worker.
        complete: whether the refresh succeeded; if not, experts move only if they were moved before it.
    """
    state = _state(worker)
    if state is None:
        return
    with _steps_again(worker):
        if complete or mode() == PARTS:
            for model_state, initial, current in _moved(state):
                if complete:
                    _check_tensors(model_state)
                _rearrange(model_state, initial, current)
                log.info("eplb: experts are back where they were before the refresh")


@contextlib.contextmanager
def _steps_again(worker: Any) -> Iterator[None]:
    try:
        yield
    finally:
        worker.model_runner.eep_eplb_suppressed = False


def _state(worker: Any) -> Any:
    """Return vLLM's `EplbState`, or None if EPLB is off."""
    return getattr(worker.model_runner, "eplb_state", None) if worker.parallel_config.enable_eplb else None


def _moved(state: Any) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor]]:
    """Yield `(model state, initial map, current map)` of each model whose experts have moved, the same on all ranks."""
    for model_state in state.model_states.values():
        model = model_state.model
        current = model_state.physical_to_logical_map.cpu()
        row = state.build_initial_global_physical_to_logical_map(model.num_routed_experts, model.num_redundant_experts)
        initial = torch.tensor(row, dtype=current.dtype).expand(len(current), -1)
        if initial.shape != current.shape or not torch.equal(initial, current):
            yield model_state, initial.contiguous(), current


def _rearrange(model_state: Any, old: torch.Tensor, new: torch.Tensor) -> None:
    from vllm.distributed.eplb import eplb_state
    from vllm.distributed.parallel_state import get_ep_group

    eplb_state.rearrange_expert_weights_inplace(
        old,
        new,
        model_state.model.expert_weights,
        model_state.expert_buffer,
        get_ep_group().device_group,
        model_state.communicator,
    )


def _check_tensors(model_state: Any) -> None:
    """Refuse to move tensors that the model no longer uses."""
    for number, (layer, known) in enumerate(
        zip(model_state.model.moe_layers, model_state.model.expert_weights, strict=False)
    ):
        current = getattr(layer, "get_expert_weights", None)
        if current is None:
            return
        places = {tensor.data_ptr() for tensor in current()}
        if not {tensor.data_ptr() for tensor in known} <= places:
            raise RuntimeError(
                f"eplb cannot restore experts after a refresh of the weights: layer {number} has other tensors than "
                "when vLLM started, which its own load balancer does not know either"
            )
