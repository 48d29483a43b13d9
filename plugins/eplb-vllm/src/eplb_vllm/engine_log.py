"""Logging of this plugin: vLLM configures only the loggers below `vllm`, in all of its processes."""

from __future__ import annotations

import logging
from typing import Final

NAME: Final = "vllm.plugins.eplb"

log: logging.Logger = logging.getLogger(NAME)


def share_handlers() -> None:
    """Let the loggers of `eplb_core` and the backends write where vLLM's do, unless they already have handlers."""
    engine = logging.getLogger("vllm")
    for name in ("eplb_core", "eplb_backends"):
        ours = logging.getLogger(name)
        if ours.handlers or not engine.handlers:
            continue
        ours.handlers = list(engine.handlers)
        ours.setLevel(engine.level)
        ours.propagate = False
