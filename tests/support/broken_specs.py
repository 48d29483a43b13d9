"""What the broken transports register. Imports nothing heavy, save for the one that is broken in this very way."""

from __future__ import annotations

from typing import Any

from eplb_core import PLUGIN_API_VERSION, BackendSpec, Capabilities


def spec(
    name: str, transport: str = "", *, background: bool = False, stateless: bool = False, **more: Any
) -> BackendSpec:
    """Return the spec of a transport, whose class is called as its backend unless it is named."""
    return BackendSpec(
        name=name,
        summary="a broken transport",
        api_version=PLUGIN_API_VERSION,
        factory=f"tests.support.broken_transports:{transport or ''.join(word.title() for word in name.split('_'))}",
        capabilities=Capabilities(background=background, stateless_groups=stateless),
        **more,
    )


SPECIAL = {
    "declares_stateless_groups": spec("declares_stateless_groups", "Sound", stateless=True),
    "only_on_the_main_thread": spec("only_on_the_main_thread", background=True),
    "has_unspellable_options": spec(
        "has_unspellable_options", "Sound", options="tests.support.broken_transports:UnspellableOptions"
    ),
    "hides_a_capability": spec("hides_a_capability", "Sound"),
    "finds_itself_unavailable": spec(
        "finds_itself_unavailable", "Sound", probe="tests.support.broken_transports:finds_nothing"
    ),
}


def __getattr__(name: str) -> BackendSpec:
    if name.startswith("_"):
        raise AttributeError(name)
    if name == "imports_torch_to_be_listed":
        import torch  # noqa: F401 - this is what is wrong with it

        return spec(name, "Sound")
    return SPECIAL.get(name) or spec(name)
