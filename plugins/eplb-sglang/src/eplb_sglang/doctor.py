"""What `eplb doctor` says about SGLang: whether it would use this plugin, and whether it is as the plugin knows it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from eplb_core.doctor import Finding, Severity
from eplb_core.hooks import hookimpl
from eplb_sglang import choice, signatures

_NAME = "SGLang"
_ENTRY_POINT = "eplb"
_GROUP = "sglang.srt.plugins"
_ALLOWED = "SGLANG_PLUGINS"


@hookimpl
def eplb_doctor_checks() -> list[Callable[[], Iterator[Finding]]]:
    """Return the one check of this plugin."""
    return [sglang]


def sglang() -> Iterator[Finding]:
    """Look at the SGLang that is installed here. Nothing of it is imported, which would take seconds."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        yield Finding(_NAME, detail="not installed in this environment")
        return
    yield _whether_loaded()
    yield _whether_known(Path(spec.origin).parent)
    yield _what_is_asked()


def _whether_loaded() -> Finding:
    found = importlib.metadata.entry_points(group=_GROUP, name=_ENTRY_POINT)
    if not any(point.value.startswith("eplb_sglang.") for point in found):
        return Finding(
            _NAME, Severity.WARNING, "it does not find this plugin", "install eplb-sglang where SGLang is, with pip"
        )
    allowed = os.environ.get(_ALLOWED, "")
    names = {name.strip() for name in allowed.split(",") if name.strip()}
    if names and _ENTRY_POINT not in names:
        return Finding(
            _NAME,
            Severity.WARNING,
            f"it does not load this plugin: {_ALLOWED} is {allowed!r}",
            f"add {_ENTRY_POINT} to {_ALLOWED}, or unset it",
        )
    return Finding(_NAME, detail=f"SGLang {signatures.engine_version()} loads this plugin in every process")


def _whether_known(package: Path) -> Finding:
    version = signatures.engine_version()
    unknown = [
        line
        for module in signatures.EXPECTED
        for line in signatures.differences_in_source(module, _file_of(package, module))
    ]
    if unknown:
        return Finding(
            _NAME,
            Severity.WARNING,
            f"SGLang {version} is not as this plugin knows it, and is left as it is there: {'; '.join(unknown)}",
            "upgrade eplb-sglang, or use a version that it was tried with: " + ", ".join(signatures.TRIED),
        )
    tried = "" if version in signatures.TRIED else f"; tried with {', '.join(signatures.TRIED)}"
    return Finding(_NAME, detail=f"SGLang {version} has all that this plugin hooks{tried}")


def _what_is_asked() -> Finding:
    asked = choice.read()
    found = choice.problem(asked)
    if found is not None:
        variable, error = found
        return Finding(_NAME, Severity.PROBLEM, f"{error.what} (environment variable {variable})", error.remedy or "")
    said = {choice.BACKEND: asked.backend, choice.POLICY: asked.policy}
    set_here = ", ".join(f"{variable} is {value}" for variable, value in said.items() if value is not None)
    if not set_here:
        return Finding(
            _NAME, detail=f"neither {choice.BACKEND} nor {choice.POLICY} is set here: SGLang is left as it is"
        )
    return Finding(_NAME, detail=f"{set_here}, in the place of SGLang's own")


def _file_of(package: Path, module: str) -> Path:
    inner = package.joinpath(*module.split(".")[1:])
    return inner / "__init__.py" if inner.is_dir() else inner.with_suffix(".py")
