"""vLLM's CPU worker, with what the end-to-end tests ask of it beside serving."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.v1.worker.cpu_worker import CPUWorker

from cpu_engine.cpu_shim import patch_worker_process

patch_worker_process()


class EplbTestWorker(CPUWorker):  # type: ignore[misc]
    """Answers `LLM.collective_rpc`."""

    def eplb_use(self, communicator: str) -> str:
        """Exchange the communicator, as vLLM's elastic scaling does; return the class of the new one."""
        state = self._state()
        self.parallel_config.eplb_config.communicator = communicator
        with set_current_vllm_config(self.vllm_config):
            from vllm.distributed.parallel_state import get_eplb_group

            made = state.create_communicator(self.model_config, get_eplb_group())
        state.update_communicator(self.model_config, made)
        return type(made).__name__

    def eplb_use_async(self, use_async: bool) -> None:
        """Move experts beside inference, or between steps."""
        state = self._state()
        state.is_async = use_async
        self.parallel_config.eplb_config.use_async = use_async
        if use_async:
            state.start_async_loop()

    def eplb_batching(self, enabled: bool) -> None:
        """Turn migration batching on or off."""
        self.parallel_config.eplb_config.enable_migration_batching = enabled

    def eplb_rearrange(self, seed: int) -> None:
        """Rearrange now, as if the experts had random loads: the same on all ranks."""
        state = self._state()
        random = torch.Generator().manual_seed(seed)
        for model_state in state.model_states.values():
            window = model_state.expert_load_window
            window.copy_(torch.randint(0, 1000, window.shape, generator=random, dtype=window.dtype))
        state.rearrange()

    def eplb_settle(self, timeout_s: float) -> bool:
        """Apply what the asynchronous thread brings, as a step does, until it is done; return whether it is."""
        from vllm.distributed.eplb.eplb_state import _move_to_workspace
        from vllm.distributed.parallel_state import get_ep_group

        state = self._state()
        rank = get_ep_group().device_group.rank()
        deadline = time.monotonic() + timeout_s
        for model_state in state.model_states.values():
            while model_state.rebalanced:
                if time.monotonic() > deadline:
                    return False
                if state._all_ranks_result_ready(model_state):
                    _move_to_workspace(model_state=model_state, ep_rank=rank)
                else:
                    time.sleep(0.002)
        return True

    def eplb_placement(self) -> list[list[int]]:
        """Return which expert each slot of the group holds, by layer, as this rank sees it."""
        return self._model_state().physical_to_logical_map.tolist()  # type: ignore[no-any-return]

    def eplb_hashes(self) -> list[list[str]]:
        """Return a hash of all bytes of each local slot, by layer."""
        layers = []
        for tensors in self._model_state().model.expert_weights:
            hashes = []
            for slot in range(tensors[0].shape[0]):
                digest = hashlib.sha256()
                for tensor in tensors:
                    digest.update(tensor.detach()[slot].contiguous().view(torch.uint8).numpy().tobytes())
                hashes.append(digest.hexdigest())
            layers.append(hashes)
        return layers

    def eplb_refresh(self, path: str, prefix: str, repaired: bool) -> str:
        """Refresh the weights from a file, as in reinforcement learning; unless `repaired`, as vLLM does by itself."""
        info = {"path": path, "prefix": prefix}

        def call(name: str, *arguments: Any) -> None:
            method = getattr(CPUWorker, name)
            (method if repaired else method.__eplb_original__)(self, *arguments)

        call("_start_weight_update")
        try:
            call("update_weights", info)
        except FileNotFoundError as error:
            return type(error).__name__
        call("finish_weight_update")
        return ""

    def eplb_call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the communicator."""
        return getattr(self._model_state().communicator, method)(*arguments)

    def _state(self) -> Any:
        return self.model_runner.eplb_state

    def _model_state(self) -> Any:
        return next(iter(self._state().model_states.values()))
