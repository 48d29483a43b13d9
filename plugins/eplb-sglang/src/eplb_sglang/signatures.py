"""What this plugin relies on in SGLang, and whether the installed one has it: names and parameters, compared exactly.

The same table is checked on live objects when SGLang loads the plugin, and on source files by `eplb doctor`, which does
not import SGLang.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Final

TRIED: Final = ("0.5.23",)
"""Versions of SGLang that the plugin was tested with; others are judged by the table below alone."""

UPDATER: Final = "sglang.srt.eplb.expert_location_updater"
LOCATION: Final = "sglang.srt.eplb.expert_location"
ALGORITHMS: Final = "sglang.srt.eplb.eplb_algorithms"
MANAGER: Final = "sglang.srt.eplb.eplb_manager"
ELASTIC: Final = "sglang.srt.elastic_ep.elastic_ep"
RUNNER: Final = "sglang.srt.model_executor.model_runner"
WEIGHTS: Final = "sglang.srt.managers.scheduler_components.weight_updater"
REGISTRY: Final = "sglang.srt.plugins.hook_registry"

MOVE: Final = f"{UPDATER}._update_expert_weights"
REBALANCE: Final = f"{ALGORITHMS}.rebalance_experts"
START: Final = f"{MANAGER}.EPLBManager.__init__"
LOADED: Final = f"{RUNNER}.ModelRunner.initialize"
SLEEP: Final = f"{WEIGHTS}.SchedulerWeightUpdaterManager.release_memory_occupation"
"""The dotted paths that are hooked."""

_MOVED = (
    "routed_experts_weights_of_layer",
    "old_expert_location_metadata",
    "new_expert_location_metadata",
    "update_layer_ids",
    "nnodes",
    "rank",
)

EXPECTED: Final[Mapping[str, Mapping[str, tuple[str, ...] | None]]] = {
    UPDATER: {
        "_update_expert_weights": ("kwargs",),
        "_update_expert_weights_raw": _MOVED,
    },
    ALGORITHMS: {
        "rebalance_experts": (
            "tokens_per_expert",
            "num_physical_experts",
            "num_local_physical_experts",
            "num_groups",
            "num_nodes",
            "algorithm",
        ),
    },
    MANAGER: {"EPLBManager.__init__": None},
    LOCATION: {
        "get_global_expert_location_metadata": (),
        "compute_logical_to_rank_dispatch_physical_map": (
            "logical_to_all_physical_map",
            "ep_size",
            "num_physical_experts",
            "ep_rank",
            "seed",
        ),
    },
    ELASTIC: {"ElasticEPStateManager.instance": ()},
    RUNNER: {"ModelRunner.initialize": ("self",)},
    WEIGHTS: {"SchedulerWeightUpdaterManager.release_memory_occupation": ("self", "recv_req")},
    REGISTRY: {"HookRegistry.register": ("target", "hook", "hook_type", "source")},
}
"""Module -> function or method -> the names of its parameters, in order; None where any will do."""

FIELDS: Final = (
    "physical_to_logical_map",
    "physical_to_logical_map_cpu",
    "logical_to_all_physical_map",
    "logical_to_all_physical_map_cpu",
    "logical_to_all_physical_map_num_valid",
    "ep_size",
    "logical_to_rank_dispatch_physical_map",
)
"""The fields of `ExpertLocationMetadata`, all of which must agree after a failure; compared exactly too."""
_METADATA = "ExpertLocationMetadata"


def engine_version() -> str:
    """Return the version of the SGLang that is installed."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def differences() -> list[str]:
    """Return what the SGLang of this process lacks or has differently, one line each; nothing if all is as expected."""
    found: list[str] = []
    for name in EXPECTED:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            found.append(f"{name} cannot be imported: {error}")
            continue
        for function, parameters in EXPECTED[name].items():
            target: object = module
            for part in function.split("."):
                target = getattr(target, part, None)
            # A hook, ours or another plugin's, carries the signature of what it wraps.
            here = tuple(inspect.signature(target).parameters) if callable(target) else None
            found += _difference(f"{name}.{function}", parameters, here)
        if name == LOCATION:
            fields = getattr(getattr(module, _METADATA, None), "__dataclass_fields__", None)
            found += _difference(f"{name}.{_METADATA}", FIELDS, None if fields is None else tuple(fields))
    return found


def differences_in_source(name: str, file: Path) -> list[str]:
    """Return the same for one module of SGLang's that is read, not imported."""
    if not file.is_file():
        return [f"{name} is not there"]
    here: dict[str, tuple[str, ...]] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        inner = [(f"{node.name}.", child) for child in node.body] if isinstance(node, ast.ClassDef) else []
        for prefix, each in [("", node), *inner]:
            if isinstance(each, ast.FunctionDef):
                here[prefix + each.name] = _parameters(each)
        if isinstance(node, ast.ClassDef) and node.name == _METADATA:
            annotated = [each for each in node.body if isinstance(each, ast.AnnAssign)]
            here[_METADATA] = tuple(each.target.id for each in annotated if isinstance(each.target, ast.Name))
    expected = {**EXPECTED[name], **({_METADATA: FIELDS} if name == LOCATION else {})}
    return [
        line
        for each, parameters in expected.items()
        for line in _difference(f"{name}.{each}", parameters, here.get(each))
    ]


def _parameters(function: ast.FunctionDef) -> tuple[str, ...]:
    arguments = function.args
    starred = [each for each in (arguments.vararg,) if each is not None]
    last = [each for each in (arguments.kwarg,) if each is not None]
    named = (*arguments.posonlyargs, *arguments.args, *starred, *arguments.kwonlyargs, *last)
    return tuple(argument.arg for argument in named if argument.arg != "cls")


def _difference(name: str, expected: tuple[str, ...] | None, here: tuple[str, ...] | None) -> list[str]:
    if here is None:
        return [f"{name} is not there"]
    if expected is not None and here != expected:
        return [f"{name} has ({', '.join(here)}), not ({', '.join(expected)})"]
    return []
