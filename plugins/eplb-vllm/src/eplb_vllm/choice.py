"""Which backend moves the experts: read from vLLM's `communicator` setting and the environment. Imports no vLLM.

    eplb:nixl?window=512MiB    a config string of eplb; after the prefix, vLLM's own names are allowed too
    shm, cuda_ipc?..., auto    the same without the prefix, if vLLM has no communicator of that name
    nixl, torch_gloo, ...      vLLM's own communicator of that name

`EPLB_BACKEND`, if set, replaces vLLM's own communicators, chosen or preset, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from eplb_core import CommonOptions
from eplb_core.errors import BackendUnavailableError, ConfigError, EplbError
from eplb_core.registry.config import AUTO, BACKEND_VARIABLE, BackendConfig, parse_config, resolve_options
from eplb_core.registry.registry import default_registry, load_options_class
from eplb_core.words import did_you_mean

PREFIX: Final = "eplb:"


@dataclass(frozen=True, slots=True)
class Choice:
    """The requested backend of eplb.

    Attributes:
        config: the config string.
        origin: where it was set, for messages.
        bare: whether it is in vLLM's setting without the prefix, where vLLM's own names take precedence.
    """

    config: str
    origin: str
    bare: bool = False


def choose(
    communicator: str | None, engine_names: Collection[str], environment: Mapping[str, str] = os.environ
) -> Choice | None:
    """Return the requested backend, or None for vLLM's own communicator.

    Args:
        communicator: vLLM's setting; None if vLLM chooses.
        engine_names: the names of vLLM's own communicators.
        environment: the environment variables.
    """
    if communicator is not None and communicator.startswith(PREFIX):
        return Choice(communicator.removeprefix(PREFIX), "communicator")
    if communicator is not None and communicator not in engine_names:
        return Choice(communicator, "communicator", bare=True)
    config = environment.get(BACKEND_VARIABLE)
    return Choice(config, f"environment variable {BACKEND_VARIABLE}") if config else None


def check(choice: Choice, engine_names: Collection[str], *, beside_inference: bool) -> None:
    """Check everything about a choice that can be checked before there are ranks.

    Args:
        choice: the requested backend.
        engine_names: the names of vLLM's own communicators.
        beside_inference: whether vLLM moves experts on a separate thread (`use_async`).

    Raises:
        ConfigError: the text is not a config string, an option in it is wrong, or it may mean vLLM's own communicator.
        BackendError: there is no such backend, or it cannot be used, or not beside inference.
    """
    config = parse_config(choice.config)
    if choice.bare:
        _check_bare(choice.config, config, engine_names)
    if config.name == AUTO:
        return
    registry = default_registry()
    entry = registry.select(config)
    resolve_options(config, load_options_class(entry))
    if beside_inference and entry.spec is not None and not entry.spec.capabilities.background:
        able = [each.name for each in registry.entries() if each.spec and each.spec.capabilities.background]
        raise BackendUnavailableError(
            f"backend {config.name!r} cannot move experts beside inference",
            name=config.name,
            why="vLLM's use_async is on, and the backend declares no background capability",
            remedy=f"set use_async to false, or choose one that can: {', '.join(able)}",
        )


def patience(config: str, start_timeout_s: float) -> dict[str, object]:
    """Return the option `start_timeout` as an argument of the factory, unless the string or the environment sets it.

    Nothing if the backend has no such option, or if the string is wrong, which the factory reports on all ranks.
    """
    try:
        parsed = parse_config(config)
        options_class = CommonOptions if parsed.name == AUTO else load_options_class(default_registry().select(parsed))
        origin = resolve_options(parsed, options_class).origins.get("start_timeout")
    except EplbError:
        return {}
    return {"start_timeout": start_timeout_s} if origin == "default" else {}


def _check_bare(text: str, config: BackendConfig, engine_names: Collection[str]) -> None:
    if config.name in engine_names:
        raise ConfigError(
            f"{text!r} names a communicator of vLLM, which takes no options",
            remedy=f"write {PREFIX}{text} for the backend of eplb, or {config.name} for vLLM's own",
        )
    ours = default_registry().names()
    if config.name != AUTO and config.name not in ours:
        near = did_you_mean(config.name, sorted({*ours, *engine_names, AUTO}))
        if near:
            raise ConfigError(
                f"there is no communicator {config.name!r}{near}",
                why=f"vLLM has {', '.join(sorted(engine_names))}; eplb has {', '.join(ours)}",
                remedy=f"write one of these; {PREFIX}NAME always selects eplb's",
            )
