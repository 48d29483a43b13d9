"""The `eplb doctor` check of vLLM: whether it would use this plugin, and whether the plugin knows its interfaces."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from eplb_core.doctor import Finding, Severity
from eplb_core.errors import EplbError
from eplb_core.hooks import hookimpl
from eplb_vllm import choice, signatures
from eplb_vllm.engine_config import KNOWN_NAMES, engine_version

_NAME = "vLLM"
_ENTRY_POINT = "eplb"


@hookimpl
def eplb_doctor_checks() -> list[Callable[[], Iterator[Finding]]]:
    """Return the one check of this plugin."""
    return [vllm]


def vllm() -> Iterator[Finding]:
    """Check the installed vLLM. Does not import it, which would take ten seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        yield Finding(_NAME, detail="not installed in this environment")
        return
    yield _whether_loaded()
    yield _whether_known(Path(spec.origin).parent)
    if (problem := _problem_of_variable()) is not None:
        yield problem


def _whether_loaded() -> Finding:
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name=_ENTRY_POINT)
    if not any(point.value.startswith("eplb_vllm.") for point in found):
        return Finding(
            _NAME, Severity.WARNING, "it does not find this plugin", "install eplb-vllm where vLLM is, with pip"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and _ENTRY_POINT not in allowed.split(","):
        return Finding(
            _NAME,
            Severity.WARNING,
            f"it does not load this plugin: VLLM_PLUGINS is {allowed!r}",
            f"add {_ENTRY_POINT} to VLLM_PLUGINS, or unset it",
        )
    return Finding(_NAME, detail=f"vLLM {engine_version()} loads this plugin in every process")


def _whether_known(package: Path) -> Finding:
    version = engine_version()
    unknown = [
        line
        for module in signatures.EXPECTED
        for line in signatures.differences_in_source(module, _file_of(package, module))
    ]
    if unknown:
        return Finding(
            _NAME,
            Severity.WARNING,
            f"vLLM {version} differs from what this plugin expects, and is left unchanged there: {'; '.join(unknown)}",
            "upgrade eplb-vllm, or use a version that it was tested with: " + ", ".join(signatures.TRIED),
        )
    tried = "" if version in signatures.TRIED else f"; tested with {', '.join(signatures.TRIED)}"
    return Finding(_NAME, detail=f"vLLM {version} has all that this plugin replaces{tried}")


def _problem_of_variable() -> Finding | None:
    chosen = choice.choose(None, KNOWN_NAMES)
    if chosen is None:
        return None
    try:
        choice.check(chosen, KNOWN_NAMES, beside_inference=False)
    except EplbError as error:
        return Finding(_NAME, Severity.PROBLEM, f"{error.what} ({chosen.origin})", error.remedy or "")
    return Finding(_NAME, detail=f"{chosen.origin} is {chosen.config}: it replaces vLLM's own communicators")


def _file_of(package: Path, module: str) -> Path:
    inner = package.joinpath(*module.split(".")[1:])
    return inner / "__init__.py" if inner.is_dir() else inner.with_suffix(".py")
