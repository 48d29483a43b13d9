"""A weight transfer engine for vLLM that reads checkpoints: what those of reinforcement learning do, without CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class NoInfo:
    """Nothing to tell at the start."""


@dataclass
class FileInfo:
    """Which file to read, and which of its tensors.

    Attributes:
        path: a safetensors file.
        prefix: only tensors whose names begin so.
    """

    path: str
    prefix: str = ""


class DiskEngine(WeightTransferEngine[Any, Any]):  # type: ignore[misc]
    """Loads weights as vLLM's engines over NCCL do: layer by layer, by the model's own loader."""

    init_info_cls = NoInfo
    update_info_cls = FileInfo

    def init_transfer_engine(self, init_info: NoInfo) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Prepare layers for being loaded anew."""
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Process what was loaded."""
        finalize_layerwise_reload(self.model, self.model_config)

    def receive_weights(self, update_info: FileInfo) -> None:
        """Load tensors of a file."""
        tensors = load_file(update_info.path)
        self.model.load_weights((n, t) for n, t in tensors.items() if n.startswith(update_info.prefix))

    def shutdown(self) -> None:
        """Nothing to do."""

    @staticmethod
    def trainer_send_weights(*_: Any) -> None:
        """Trainers do not take part."""
