"""The entry point of `sglang.srt.plugins`. SGLang calls it in every process; it may be called several times."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

from eplb_sglang import choice, signatures

if TYPE_CHECKING:
    from eplb_sglang.hooks import Hooks

log = logging.getLogger("eplb_sglang")


def register() -> None:
    """Register this plugin's hooks with SGLang, if the environment asks for any; SGLang puts them in place."""
    installed()


@functools.cache
def installed() -> Hooks | None:
    """Return the hooks of this process, registered on the first call; None where there are none.

    Raises:
        SystemExit: SGLang is not as this plugin knows it, and is not to be left as it is. No smaller exception would
            do: SGLang logs those and goes on.
    """
    asked = choice.read()
    if asked.backend is None and asked.policy is None:
        return None
    unknown = signatures.differences()
    if unknown:
        text = f"eplb-sglang leaves SGLang {signatures.engine_version()} as it is: {'; '.join(unknown)}"
        if asked.on_unknown != "leave":
            raise SystemExit(f"{text}; {choice.ON_UNKNOWN}={asked.on_unknown}")
        log.warning("%s", text)
        return None
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from eplb_sglang.hooks import Hooks

    hooks = Hooks(asked)
    for path, hook, kind in hooks.table():
        HookRegistry.register(path, hook, HookType[kind])
    return hooks
