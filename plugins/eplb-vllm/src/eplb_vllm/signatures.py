"""What this plugin relies on in vLLM, and checks that the installed vLLM has it: parameter names, compared exactly.

The same table is checked on live objects when vLLM loads the plugin, and on source files by `eplb doctor`, which does
not import vLLM.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Final

TRIED: Final = ("0.32.0", "0.33.0")
"""Versions of vLLM that the plugin was tested or read against; others are judged by their signatures alone."""

COMMUNICATOR: Final = "vllm.distributed.eplb.eplb_communicator"
EXECUTE: Final = "vllm.distributed.eplb.rebalance_execute"
STATE: Final = "vllm.distributed.eplb.eplb_state"
POLICY: Final = "vllm.distributed.eplb.policy"
DEFAULT_POLICY: Final = "vllm.distributed.eplb.policy.default"
CONFIG: Final = "vllm.config.parallel"
WORKER: Final = "vllm.v1.worker.gpu_worker"

EXPECTED: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    COMMUNICATOR: {
        "create_eplb_communicator": ("group_coordinator", "backend", "expert_weights", "expert_buffer"),
        "EplbCommunicator.add_send": ("self", "tensors", "dst_rank", "expert_id"),
        "EplbCommunicator.add_recv": ("self", "tensors", "src_rank", "expert_id"),
        "EplbCommunicator.execute": ("self",),
        "EplbCommunicator.set_transfer_context": ("self", "old_indices", "layer_idx"),
        "EplbCommunicator.set_stream": ("self", "stream"),
    },
    EXECUTE: {
        "rearrange_expert_weights_inplace": (
            "old_global_expert_indices",
            "new_global_expert_indices",
            "expert_weights",
            "expert_buffer",
            "ep_group",
            "communicator",
            "is_profile",
            "rank_mapping",
        ),
        "_map_old_expert_indices_with_rank_mapping": ("old_global_expert_indices", "rank_mapping", "new_ep_size"),
        "_map_new_expert_indices_with_rank_mapping": ("new_global_expert_indices", "rank_mapping"),
    },
    DEFAULT_POLICY: {
        "DefaultEplbPolicy.rebalance_experts": (
            "weight",
            "num_replicas",
            "num_groups",
            "num_nodes",
            "num_ranks",
            "old_global_expert_indices",
        ),
    },
    WORKER: {
        "Worker._start_weight_update": ("self", "is_draft"),
        "Worker.update_weights": ("self", "update_info"),
        "Worker.finish_weight_update": ("self",),
    },
}
"""Module -> function or method -> the names of its parameters, in order."""


def differences(module: ModuleType) -> list[str]:
    """Return the differences of a live vLLM module, one line each; nothing if all is as expected."""
    found = []
    for name, parameters in EXPECTED.get(module.__name__, {}).items():
        target: object = module
        for part in name.split("."):
            target = getattr(target, part, None)
        target = getattr(target, "__eplb_original__", target)
        here = tuple(inspect.signature(target).parameters) if callable(target) else None
        found += _difference(f"{module.__name__}.{name}", parameters, here)
    return found


def differences_in_source(name: str, file: Path) -> list[str]:
    """Return the same for a vLLM module that is read, not imported."""
    if not file.is_file():
        return [f"{name} is not there"]
    here: dict[str, tuple[str, ...]] = {}
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        inner = [(f"{node.name}.", child) for child in node.body] if isinstance(node, ast.ClassDef) else []
        for prefix, each in [("", node), *inner]:
            if isinstance(each, ast.FunctionDef):
                arguments = each.args
                named = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
                here[prefix + each.name] = tuple(argument.arg for argument in named if argument.arg != "cls")
    return [
        line
        for each, parameters in EXPECTED[name].items()
        for line in _difference(f"{name}.{each}", parameters, here.get(each))
    ]


def _difference(name: str, expected: tuple[str, ...], here: tuple[str, ...] | None) -> list[str]:
    if here is None:
        return [f"{name} is not there"]
    if here != expected:
        return [f"{name} takes ({', '.join(here)}), not ({', '.join(expected)})"]
    return []
