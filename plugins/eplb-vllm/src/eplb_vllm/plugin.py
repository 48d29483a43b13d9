"""The entry point of `vllm.general_plugins`. vLLM calls it in every process; it may be called several times."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

from eplb_vllm import engine_config, signatures
from eplb_vllm.after_import import when_imported


def register() -> None:
    """Hook this plugin into vLLM. Modules that are not loaded yet are hooked on import."""
    when_imported(signatures.CONFIG, engine_config.widen)
    when_imported(signatures.COMMUNICATOR, _if_expected("install_factory"))
    when_imported(signatures.EXECUTE, _if_expected("install_rearrangement"))
    when_imported(signatures.POLICY, _if_expected("install_policy", signatures.DEFAULT_POLICY))
    when_imported(signatures.WORKER, _if_expected("install_refresh"))


def _if_expected(step: str, looked_at: str = "") -> Callable[[ModuleType], None]:
    """Return a function that installs a step in a module, if it and the modules it relies on are as expected."""

    def install(module: ModuleType) -> None:
        from eplb_vllm import seams  # imports torch, which the module has imported anyway

        if seams.expected(sys.modules.get(looked_at, module)):
            getattr(seams, step)(module)

    return install
